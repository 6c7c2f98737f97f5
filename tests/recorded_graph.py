"""What stands in for CUDA graphs on a CPU: operators recorded at capture and run again at replay.

Like a graph of CUDA's, a recorded one keeps its memory: replay computes from whatever the tensors
of the capture hold by then, and leaves its results in them. It refuses what a capture refuses.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from vattn.attention.base import AttentionSpec
from vattn.attention.flash import FlashBackend
from vattn.attention.flash_attn import Flash2Kernels, FlashAttention2Backend
from vattn.attention.flash_attn_3 import (
    Flash3Kernel,
    FlashAttention3Backend,
    VllmFlashAttention3Backend,
)
from vattn.attention.torch_flash import TorchFlashBackend

# Operators that wait for the device, or whose result's shape depends on values.
_REFUSED = {
    "_local_scalar_dense",
    "equal",
    "is_nonzero",
    "item",
    "masked_select",
    "nonzero",
    "repeat_interleave.Tensor",
    "unique2",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
    "bincount",
}
# Ways from host memory to tensors and back that no operator shows.
_HOST = (
    *((torch, name) for name in ("tensor", "as_tensor", "from_numpy")),
    *((torch.Tensor, name) for name in ("tolist", "numpy", "cpu", "__array__")),
)


class CaptureError(RuntimeError):
    """What was done cannot be captured."""


def refusal(name: str, arguments: Any) -> str | None:
    """Why an operator cannot be captured; None if it can.

    Args:
        name: with its overload.
        arguments: all of them.
    """
    if name in _REFUSED or name.split(".")[0] in _REFUSED:
        return name
    if name.startswith("index"):
        tensors = [x for x in pytree.tree_leaves(arguments) if isinstance(x, torch.Tensor)]
        if any(x.dtype in (torch.bool, torch.uint8) for x in tensors[1:]):
            return f"{name} with a mask"
    return None


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _storages(tree: Any) -> set[int]:
    return {tensor.untyped_storage()._cdata for tensor in _tensors(tree)}


class _Recording(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Runs operators, and notes those that compute or write something."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operators: list[tuple[Any, Any, Any, list[tuple[int, torch.Tensor]]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.split("::")[1]
        full = f"{name}.{func._schema.overload_name}"
        if (why := refusal(full, (args, kwargs))) is not None:
            raise CaptureError(f"operation not permitted when stream is capturing: {why}")
        with self:
            parts = func.decompose(*args, **kwargs)
        if parts is not NotImplemented:
            return parts
        out = func(*args, **kwargs)
        before = _storages((args, kwargs))
        fresh = [
            (i, tensor)
            for i, tensor in enumerate(_tensors(out))
            if tensor.untyped_storage()._cdata not in before
        ]
        if fresh or func._schema.is_mutable:
            self.operators.append((func, args, kwargs, fresh))
        return out


@dataclass
class RecordedGraph:
    """See :class:`vattn.engine.cuda_graph.Graph`; counts what it did."""

    log: list[str] = field(default_factory=list)

    def capture(self, work: Callable[[], object]) -> None:
        recording = _Recording()
        with recording, _without_host():
            work()
        self._operators = recording.operators
        assert self._operators
        # A capture computes nothing: what its tensors hold now means nothing.
        with torch.inference_mode(), _disable_current_modes():
            for *_, fresh in self._operators:
                for _, tensor in fresh:
                    tensor.fill_(float("nan") if tensor.is_floating_point() else 1)
        self.log.append("capture")

    def replay(self) -> None:
        with torch.inference_mode(), _disable_current_modes():
            for func, args, kwargs, fresh in self._operators:
                out = _tensors(func(*args, **kwargs))
                for i, tensor in fresh:
                    tensor.copy_(out[i])
        self.log.append("replay")


@contextlib.contextmanager
def _without_host() -> Iterator[None]:
    """Tensors are neither made from host memory nor read into it, and who asks is told why."""

    def refuse(*_: Any, **__: Any) -> Any:
        raise CaptureError("operation not permitted when stream is capturing: host memory")

    with contextlib.ExitStack() as stack:
        for owner, name in _HOST:
            stack.enter_context(mock.patch.object(owner, name, refuse))
        stack.enter_context(mock.patch("torch.cuda.is_current_stream_capturing", _yes))
        yield


def _yes() -> bool:
    return True


# Kernels ------------------------------------------------------------------------------------------


def flash2(specs: Sequence[AttentionSpec], *, appends: bool = False) -> FlashBackend:
    """FlashAttention-2 with kernels that are nothing but tensor operations."""
    return FlashAttention2Backend(specs, Flash2Kernels(_with_cache, _packed, appends))


def flash3(specs: Sequence[AttentionSpec], *, appends: bool = False) -> FlashBackend:
    """FlashAttention-3 in the same way."""
    return FlashAttention3Backend(specs, Flash3Kernel(_with_cache, appends, knows_sinks=False))


def vllm_flash3(specs: Sequence[AttentionSpec]) -> FlashBackend:
    """The one that knows sinks itself."""
    return VllmFlashAttention3Backend(specs, Flash3Kernel(_with_cache, True, knows_sinks=True))


def torch_flash(specs: Sequence[AttentionSpec]) -> FlashBackend:
    """The one with the flat form for decodes, too."""

    def kernel(**given: Any) -> Any:
        assert (given["dropout_p"], given["return_debug_mask"]) == (0, False)
        return _packed(
            q=given["query"],
            k=given["key"],
            v=given["value"],
            cu_seqlens_q=given["cum_seq_q"],
            cu_seqlens_k=given["cum_seq_k"],
            max_seqlen_q=given["max_q"],
            max_seqlen_k=given["max_k"],
            seqused_k=given["seqused_k"],
            softmax_scale=given["scale"],
            window=(given["window_size_left"], given["window_size_right"]),
            softcap=0.0,
        )

    return TorchFlashBackend(specs, kernel)


def _with_cache(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    cache_seqlens: torch.Tensor,
    cache_batch_idx: torch.Tensor,
    k: torch.Tensor | None = None,
    v: torch.Tensor | None = None,
    cu_seqlens_q: torch.Tensor | None = None,
    max_seqlen_q: int | None = None,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The kvcache form: queries ``[n, 1, heads, d]``, or packed ones with ``cu_seqlens_q``."""
    assert options.pop("num_splits") == 0
    slots, lens = cache_batch_idx.long(), cache_seqlens.long()
    if k is not None and v is not None:
        k_cache.index_put_((slots, lens), k[:, 0])
        v_cache.index_put_((slots, lens), v[:, 0])
        lens = lens + 1
    if cu_seqlens_q is None:
        out, lse = _decode(q[:, 0], k_cache[slots], v_cache[slots], lens, **options)
        return out[:, None], lse[..., None]
    sequences = [(k_cache[slot], v_cache[slot]) for slot in slots.tolist()]
    return _chunks(q, sequences, cu_seqlens_q, lens, **options)


def _packed(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    seqused_k: torch.Tensor,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The flat form."""
    if max_seqlen_q > 1:
        sequences = [(k[i:], v[i:]) for i in cu_seqlens_k[:-1].tolist()]
        return _chunks(q, sequences, cu_seqlens_q, seqused_k, **options)
    assert len(cu_seqlens_q) == len(cu_seqlens_k) == len(q) + 1
    at = cu_seqlens_k[:-1, None].long() + torch.arange(max_seqlen_k, device=q.device)
    key, value = (x[at.clamp(max=len(x) - 1)] for x in (k, v))
    # The queries, too, are found by their offsets.
    out, lse = _decode(q[cu_seqlens_q[:-1].long()], key, value, seqused_k.long(), **options)
    return out, lse.transpose(0, 1)


def _decode(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lens: torch.Tensor,
    *,
    softmax_scale: float,
    window: tuple[int, int],
    softcap: float,
    sinks: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of one query each, ``[n, heads, d]``, over the first ``lens`` of L tokens.

    Returns:
        The output, and the log-sum-exp ``[n, heads]``.
    """
    places, ends = torch.arange(key.shape[1], device=key.device)[None], lens[:, None]
    seen = places < ends
    if window[0] >= 0:
        seen = seen & (places >= ends - 1 - window[0])
    group = query.shape[1] // key.shape[2]
    # Whatever lies outside is not even multiplied by zero.
    key, value = (
        torch.where(seen[..., None, None], x, 0).repeat_interleave(group, 2) for x in (key, value)
    )
    scores = torch.einsum("nhd,nlhd->nhl", query, key) * softmax_scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    lse = scores.masked_fill(~seen[:, None], -torch.inf).logsumexp(-1)
    if sinks is not None:
        lse = torch.logaddexp(lse, sinks.to(lse.dtype))
    weights = (scores - lse[..., None]).exp() * seen[:, None]
    return torch.einsum("nhl,nlhd->nhd", weights, value), lse


def _chunks(
    query: torch.Tensor,
    sequences: Sequence[tuple[torch.Tensor, torch.Tensor]],
    starts: torch.Tensor,
    lens: torch.Tensor,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Packed queries ``[T, heads, d]``, one after the other; never captured.

    Returns:
        The output, and the log-sum-exp ``[heads, T]``.
    """
    outs, bounds = [], starts.tolist()
    for i, (key, value) in enumerate(sequences):
        first, last = bounds[i], bounds[i + 1]
        for row in range(first, last):
            end = lens[i : i + 1].long() - (last - 1 - row)
            tokens = int(lens[i])
            outs.append(
                _decode(
                    query[row : row + 1], key[None, :tokens], value[None, :tokens], end, **options
                )
            )
    return torch.cat([out for out, _ in outs]), torch.cat([lse for _, lse in outs]).T
