"""Writing a step's new K and V into their slots, by launches of their own.

On a GPU one launch per layer writes both, where Triton works; elsewhere ``index_put_`` writes one
after the other. Some kernels write those of decodes themselves: see ``vattn.attention.flash``.
"""

from __future__ import annotations

import functools
import importlib.util
import warnings
from collections.abc import Callable

import torch

from vattn.attention.base import AppendMode, Step

# Takes K, V, the cache's K and V of the layer, and each token's slot and place in it.
Writer = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], None
]


def append(
    layer: int,
    key: torch.Tensor,
    value: torch.Tensor,
    step: Step,
    rows: slice | None = None,
) -> None:
    """Writes the new tokens' K and V ``[T, kv_heads, head_dim]`` into their slots.

    Args:
        layer: index in the cache.
        key: of all new tokens of the step.
        value: the same of V.
        step: after :func:`vattn.attention.base.prepare_append`.
        rows: only these of the T tokens; None for all.
    """
    slots, positions = step.write_slots, step.write_positions
    assert slots is not None
    assert positions is not None
    if rows is not None:
        key, value, slots, positions = key[rows], value[rows], slots[rows], positions[rows]
    k, v = step.cache.layer(layer)
    writer(k.device.type)(key, value, k, v, slots, positions)


def append_mode(device: torch.device) -> AppendMode:
    """How :func:`append` writes on a device."""
    return "index_put" if writer(device.type) is index_put else "triton"


@functools.cache
def writer(device_type: str) -> Writer:
    """What writes K and V on a kind of device. Triton is imported only where there is a GPU."""
    if device_type != "cuda" or importlib.util.find_spec("triton") is None:
        return index_put
    try:
        from vattn.attention.triton_append import append_kv

        _try(append_kv, torch.device(device_type))
    except Exception as error:  # a C compiler is missing, the driver is too old: any type
        warnings.warn(
            f"Triton does not work here ({type(error).__name__}: {error}); K and V are written by "
            "two launches per layer instead of one",
            RuntimeWarning,
            stacklevel=2,
        )
        return index_put
    return append_kv


def _try(write: Writer, device: torch.device) -> None:
    """Compiles and runs a writer once, on a cache of one token."""
    new = torch.zeros(1, 1, 8, device=device)
    cache = torch.zeros(1, 1, 1, 8, device=device)
    index = torch.zeros(1, dtype=torch.int64, device=device)
    write(new, new, cache, cache.clone(), index, index)


def index_put(
    key: torch.Tensor,
    value: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    slots: torch.Tensor,
    positions: torch.Tensor,
) -> None:
    """Writes K and V one after the other, with what PyTorch has everywhere."""
    k.index_put_((slots, positions), key)
    v.index_put_((slots, positions), value)
