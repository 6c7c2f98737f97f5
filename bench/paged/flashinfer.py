"""FlashInfer over block tables: its paged decode and prefill wrappers, versions 0.2 to 0.7.

A wrapper plans on the host, once per step for all layers of a kind: how to split the sequences over
the GPU, from their lengths. ``run`` then launches. Lists of blocks are packed, without the gaps of
a table; they are made on the device, of the table that is there, as its users do. Kernels are
compiled when they are first planned unless a package brings them compiled; ``create`` tries one
call, so that what is missing for that is told there.

In a CUDA graph a wrapper has to plan before each replay, with a number of sequences that is fixed
when it is made. The engine's graphs have no such moment between transfer and replay, so its steps
are launched kernel by kernel: compare the two sides with ``enforce_eager=True`` for both.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import numpy as np
import torch

from bench.paged.block_lists import BlockLists, block_lists
from bench.paged.calls import PagedCall, make_call
from bench.paged.kernels import PagedKernel
from vattn.attention.base import AttentionSpec
from vattn.attention.flash import FlashBackend, New, window_sizes
from vattn.attention.operators import Unavailable, bind
from vattn.attention.upload import Event, Uploader

# As the wrappers' documentation recommends it.
_WORKSPACE_BYTES = 128 << 20
# Query heads of a KV head for which decodes go to the tensor cores; below, plain cores are faster,
# and those are compiled for groups of 1, 2, 3, 4 and 8.
_TENSOR_CORE_GROUP = 4
_HEAD_DIMS = (64, 128, 256)

_INIT = "self float_workspace_buffer kv_layout"
_DECODE_PLAN = (
    "self indptr indices last_page_len num_qo_heads num_kv_heads head_dim page_size window_left "
    "logits_soft_cap q_data_type kv_data_type sm_scale"
)
_PREFILL_PLAN = (
    "self qo_indptr paged_kv_indptr paged_kv_indices paged_kv_last_page_len num_qo_heads "
    "num_kv_heads head_dim_qk page_size causal window_left logits_soft_cap q_data_type "
    "kv_data_type sm_scale"
)
_RUN = "self q paged_kv_cache"


class _Kind(NamedTuple):
    """Layers that share a plan."""

    decodes: bool
    heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    scale: float
    window_left: int
    softcap: float

    @classmethod
    def of(cls, spec: AttentionSpec, *, decodes: bool) -> Self:
        return cls(
            decodes,
            spec.heads,
            spec.kv_heads,
            spec.head_dim,
            spec.dtype,
            spec.scale,
            window_sizes(spec)[0],
            spec.softcap or 0.0,
        )

    @property
    def uses_tensor_cores(self) -> bool:
        return self.heads // self.kv_heads >= _TENSOR_CORE_GROUP


def load() -> tuple[Any, Any]:
    """The wrapper classes for decodes and for prefill.

    Raises:
        Unavailable: FlashInfer is not installed, or takes other arguments than we know.
    """
    try:
        module = importlib.import_module("flashinfer")
    except Exception as error:  # it looks for compilers and GPUs as it loads
        raise Unavailable(f"flashinfer does not load: {error}") from error
    wrappers = []
    for name, plan in (
        ("BatchDecodeWithPagedKVCacheWrapper", _DECODE_PLAN),
        ("BatchPrefillWithPagedKVCacheWrapper", _PREFILL_PLAN),
    ):
        wrapper = getattr(module, name, None)
        if wrapper is None:
            raise Unavailable(f"flashinfer has no {name}")
        uses = " use_tensor_cores" if "Decode" in name else ""
        bind(f"{name}.__init__", wrapper.__init__, _INIT + uses)
        # Newer versions keep what plan() takes by name in another function.
        bind(f"{name}.plan", getattr(wrapper, "_plan_impl", wrapper.plan), plan)
        # Not by bind(): "*args", for kernels that a user brings, would count as demanded.
        parameters = inspect.signature(wrapper.run).parameters
        missing = [argument for argument in _RUN.split() if argument not in parameters]
        if missing:
            raise Unavailable(f"{name}.run has no argument {', '.join(missing)}")
        wrappers.append(wrapper)
    return wrappers[0], wrappers[1]


class FlashInfer(PagedKernel):
    """FlashInfer's wrappers over ``[num_blocks, block_tokens, kv_heads, head_dim]``.

    Args:
        wrappers: as :func:`load` returns them, which is what None stands for.
        device: of the workspace.
    """

    name = "flashinfer"
    graphs = False  # see the module
    block_multiple = 1
    plans_on_host = True

    def __init__(
        self, wrappers: tuple[Any, Any] | None = None, device: torch.device | str = "cuda"
    ) -> None:
        self._decode, self._prefill = load() if wrappers is None else wrappers
        self._device = torch.device(device)
        self._made: dict[_Kind, _Planner] = {}
        self._upload = Uploader(self._device)
        self._workspace: torch.Tensor | None = None

    @classmethod
    def create(cls, specs: Sequence[AttentionSpec], device: torch.device) -> Self:
        """See :meth:`PagedKernel.create`; compiles and runs what the layers need once."""
        kernel = cls(None, device)
        for spec in dict.fromkeys(specs):
            for tokens in (1, 2):
                try:
                    kernel._try(spec, tokens)
                except Exception as error:  # no compiler, no such kernel: any type
                    raise Unavailable(
                        f"flashinfer does not work here: {type(error).__name__}: "
                        f"{str(error).strip()[:300]}"
                    ) from error
        return kernel

    def _try(self, spec: AttentionSpec, tokens: int) -> None:
        call = make_call(np.zeros((1, 1), np.int32), [2], [tokens], 16, self._device)
        k, v = self.empty(spec, 1, 16, self._device)
        self.plan(call, [spec])
        query = torch.zeros(
            tokens, spec.heads, spec.head_dim, dtype=spec.dtype, device=self._device
        )
        self.attend(call, spec, query, k, v)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    @classmethod
    def refusal(cls, spec: AttentionSpec, device: torch.device) -> str | None:
        """See :meth:`PagedKernel.refusal`."""
        # What every FlashAttention kernel wants; the same holds here.
        reason = FlashBackend.refusal(spec, device)
        if reason is not None:
            return reason
        if spec.head_dim not in _HEAD_DIMS:
            return f"head_dim={spec.head_dim} is not one of {', '.join(map(str, _HEAD_DIMS))}"
        if spec.sinks:
            return "has no attention sinks in its default kernels"
        return None

    @classmethod
    def tile_tokens(cls, spec: AttentionSpec) -> tuple[int, ...]:
        """See :meth:`PagedKernel.tile_tokens`; it loads no token behind the last."""
        del spec
        return (1,)

    @classmethod
    def block_sizes(cls, spec: AttentionSpec) -> tuple[int, ...]:
        """See :meth:`PagedKernel.block_sizes`; 1 is the size that SGLang gives it."""
        return (1, *super().block_sizes(spec))

    def plan(self, call: PagedCall, specs: Sequence[AttentionSpec]) -> None:
        """See :meth:`PagedKernel.plan`: once per kind of layer, on the host."""
        lists = None
        for kind in dict.fromkeys(_Kind.of(spec, decodes=call.decodes) for spec in specs):
            lists = lists or block_lists(call, self._upload)
            planner = self._planner(kind)
            planner.plan(kind, lists, call.block_tokens)
            call.plan[kind] = planner.wrapper

    def _planner(self, kind: _Kind) -> _Planner:
        """One per kind, for good: it owns buffers. They share the workspace of partial results."""
        if self._workspace is None:
            self._workspace = torch.zeros(_WORKSPACE_BYTES, dtype=torch.uint8, device=self._device)
        if kind not in self._made:
            if kind.decodes:
                wrapper = self._decode(
                    self._workspace, "NHD", use_tensor_cores=kind.uses_tensor_cores
                )
            else:
                wrapper = self._prefill(self._workspace, "NHD")
            self._made[kind] = _Planner(wrapper, _event(self._device))
        return self._made[kind]

    def attend(
        self,
        call: PagedCall,
        spec: AttentionSpec,
        query: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        sinks: torch.Tensor | None = None,
        new: New | None = None,
    ) -> torch.Tensor:
        """See :meth:`PagedKernel.attend`."""
        assert new is None, "this kernel cannot append"
        assert sinks is None, "this kernel has no sinks"
        wrapper = call.plan[_Kind.of(spec, decodes=call.decodes)]
        out: torch.Tensor = wrapper.run(query.contiguous(), (k, v))
        return out


class _Done:
    """An event of a device that is never behind."""

    def record(self) -> None:
        pass

    def synchronize(self) -> None:
        pass


def _event(device: torch.device) -> Event:
    if device.type != "cuda":
        return _Done()
    event: Event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    return event


@dataclass
class _Planner:
    """A wrapper, and the end of the copy of its latest plan.

    It plans into pinned memory of its own, which is copied in the order of the stream. So it waits
    for its own plan of an earlier step, and never for what other wrappers have just launched.
    """

    wrapper: Any
    copied: Event
    has_planned: bool = False

    def plan(self, kind: _Kind, lists: BlockLists, block_tokens: int) -> None:
        """How the layers of a kind split these sequences over the GPU."""
        if self.has_planned:
            self.copied.synchronize()
        common = {
            "num_qo_heads": kind.heads,
            "num_kv_heads": kind.kv_heads,
            "page_size": block_tokens,
            "window_left": kind.window_left,
            "logits_soft_cap": kind.softcap,
            "q_data_type": kind.dtype,
            "kv_data_type": kind.dtype,
            "sm_scale": kind.scale,
        }
        if kind.decodes:
            self.wrapper.plan(
                indptr=lists.starts,
                indices=lists.blocks,
                last_page_len=lists.last,
                head_dim=kind.head_dim,
                **common,
            )
        else:
            self.wrapper.plan(
                qo_indptr=lists.query_starts,
                paged_kv_indptr=lists.starts,
                paged_kv_indices=lists.blocks,
                paged_kv_last_page_len=lists.last,
                head_dim_qk=kind.head_dim,
                causal=True,
                **common,
            )
        self.copied.record()
        self.has_planned = True
