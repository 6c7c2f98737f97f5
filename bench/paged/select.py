"""Which paged kernel serves a model, and with blocks of which size."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from bench.paged.backends import PagedBackend
from bench.paged.kernels import kinds, load_kernel
from vattn.attention.base import AttentionSpec, UnsupportedAttention
from vattn.attention.operators import Unavailable

# Tokens of a block. Of the CPU, measured: see bench/paged/gather.py. The others are not measured
# here: levels sweep the sizes on their device and take none of these (bench/levels/block_sweep.py).
BEST_BLOCK: dict[str, int] = {
    "sdpa-gather": 32,
    "sdpa-gather-whole": 32,
    # The smallest that they take; nothing is known to gain from larger ones.
    "fa2": 256,
    "torch": 256,
    # Their users' choices: vLLM's default for these builds, and for FlashInfer.
    "vllm-fa2": 16,
    "vllm-fa3": 16,
    "flashinfer": 16,
    # A multiple of most tiles in half precision, for which it can load by TMA.
    "fa3": 128,
}


def choose_paged(
    specs: Sequence[AttentionSpec], device: torch.device, name: str | None = None
) -> PagedBackend:
    """The first paged kernel that can serve every layer, as an engine's backend.

    Args:
        specs: of the model's layers, in order.
        device: where the model runs.
        name: of the only kernel to consider, a key of :data:`BEST_BLOCK`.

    Raises:
        UnsupportedAttention: there is none; the message says what each one lacks.
        ValueError: no kernel has that name.
    """
    if not specs:
        raise ValueError("specs is empty; give one AttentionSpec per layer")
    known = kinds()
    if name is not None and name not in known:
        raise ValueError(f"kernel={name!r} is not one of {', '.join(known)}")
    reasons = []
    for candidate in known if name is None else (name,):
        try:
            return PagedBackend(load_kernel(candidate, specs, device), specs, device)
        except Unavailable as reason:
            reasons.append(f"{candidate}: {reason}")
    raise UnsupportedAttention(
        f"no paged kernel can serve this model on {device}; " + "; ".join(reasons)
    )
