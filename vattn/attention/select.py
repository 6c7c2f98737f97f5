"""Which backend serves a model: the first that can serve all of its layers."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from vattn.attention.base import AttentionSpec, Backend, UnsupportedAttention
from vattn.attention.flash import FlashBackend
from vattn.attention.flash_attn import FlashAttention2Backend, VllmFlashAttention2Backend
from vattn.attention.flash_attn_3 import FlashAttention3Backend, VllmFlashAttention3Backend
from vattn.attention.operators import Unavailable
from vattn.attention.sdpa import SdpaBackend
from vattn.attention.torch_flash import TorchFlashBackend
from vattn.kv.layout import Order

# In order of preference. Kernels of other packages are imported when one is made, not before.
BACKENDS: dict[str, type[FlashBackend | SdpaBackend]] = {
    FlashAttention3Backend.name: FlashAttention3Backend,
    VllmFlashAttention3Backend.name: VllmFlashAttention3Backend,
    FlashAttention2Backend.name: FlashAttention2Backend,
    VllmFlashAttention2Backend.name: VllmFlashAttention2Backend,
    TorchFlashBackend.name: TorchFlashBackend,
    SdpaBackend.name: SdpaBackend,
}


def choose(
    specs: Sequence[AttentionSpec],
    device: torch.device,
    order: Order | None = None,
    name: str | None = None,
) -> Backend:
    """The first backend that can serve every layer.

    Args:
        specs: of the model's layers, in order.
        device: where the model runs.
        order: layout that the cache must have; None leaves it to the backend.
        name: of the only backend to consider, a key of :data:`BACKENDS`.

    Raises:
        UnsupportedAttention: there is none; the message says what each one lacks.
        ValueError: no backend has that name.
    """
    if not specs:
        raise ValueError("specs is empty; give one AttentionSpec per layer")
    if name is not None and name not in BACKENDS:
        raise ValueError(f"attention_backend={name!r} is not one of {', '.join(BACKENDS)}")
    reasons = []
    for candidate in BACKENDS if name is None else (name,):
        backend, reason = _try(candidate, specs, device, order)
        if backend is not None:
            return backend
        reasons.append(f"{candidate}: {reason}")
    raise UnsupportedAttention(
        f"no attention backend can serve this model on {device}; " + "; ".join(reasons)
    )


def _try(
    name: str, specs: Sequence[AttentionSpec], device: torch.device, order: Order | None
) -> tuple[Backend | None, str]:
    """The backend, or None and why not. Only where a kernel could serve is it loaded."""
    kind = BACKENDS[name]
    if order is not None and kind.order not in (None, order):
        return None, f'needs order="{kind.order}", not "{order}"'
    for layer, spec in enumerate(specs):
        reason = kind.refusal(spec, device)
        if reason is not None:
            return None, f"layer {layer}: {reason}"
    try:
        return kind.create(specs, device), ""
    except Unavailable as error:
        return None, str(error)
