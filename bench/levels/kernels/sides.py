"""Kernel libraries that work on both sides: contiguous K and V, and blocks.

A library's contiguous form is compared with its own paged one, never with another library's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from bench.layout_points import Model
from bench.levels.kernels.blocks import PrepareLayers
from bench.levels.kernels.contiguous import of_flash, of_sdpa, pages_of_slots, ragged_prompt
from bench.levels.kernels.grid import Phase
from bench.paged.flash_kernels import FlashKernel
from bench.paged.flashinfer import FlashInfer
from bench.paged.gather import SdpaGather
from bench.paged.kernels import Missing, PagedKernel, kinds, load_kernel
from vattn.attention.base import AttentionSpec

# SDPA has fused kernels without copies of K and V on a CPU alone; a GPU has libraries that do.
_CPU_ONLY = ("sdpa-gather", "sdpa-gather-whole")
# Slower ways of a kernel that is there anyway: measured where they are named.
_ON_REQUEST = ("sdpa-gather-whole",)


@dataclass(frozen=True)
class Library:
    """A kernel library that works here for one shape.

    Attributes:
        name: of its paged kernel.
        spec: of the layers.
        contiguous: how each phase is called on contiguous memory.
        forms: the same in words.
        fresh: gives a paged kernel of its own to each side: some keep one plan at a time.
    """

    name: str
    spec: AttentionSpec
    contiguous: dict[Phase, PrepareLayers]
    forms: dict[Phase, str]
    fresh: Callable[[], PagedKernel]

    def block_sizes(self, wanted: Sequence[int] | None = None) -> list[int]:
        """Those that it takes, of the wanted ones if any are named."""
        kernel = self.fresh()
        return [
            size
            for size in (kernel.block_sizes(self.spec) if wanted is None else wanted)
            if _takes(kernel, size)
        ]


def _takes(kernel: PagedKernel, block_tokens: int) -> bool:
    try:
        kernel.check_block(block_tokens)
    except ValueError:
        return False
    return True


def attention_spec(model: Model) -> AttentionSpec:
    """Of each layer of a model: full attention with the usual scale."""
    scale = float(model.head_dim**-0.5)
    return AttentionSpec(model.heads, model.kv_heads, model.head_dim, model.dtype, scale)


def load_libraries(
    device: str, model: Model, names: Sequence[str] | None = None
) -> tuple[list[Library], dict[str, str]]:
    """The libraries that work here on both sides, and why others do not, by name.

    Raises:
        ValueError: a name is unknown.
    """
    unknown = sorted(set(names or ()) - set(kinds()))
    if unknown:
        raise ValueError(f"no kernel {', '.join(unknown)}; there are {', '.join(kinds())}")
    found: list[Library] = []
    absent: dict[str, str] = {}
    for name in names or [name for name in kinds() if name not in _ON_REQUEST]:
        if name in _CPU_ONLY and device != "cpu":
            absent[name] = "of a CPU; on a GPU the libraries that read blocks are compared"
            continue
        try:
            found.append(_load(name, attention_spec(model), torch.device(device)))
        except Missing as reason:
            absent[name] = str(reason)
    return found, absent


def _load(name: str, spec: AttentionSpec, device: torch.device) -> Library:
    def fresh() -> PagedKernel:
        return load_kernel(name, [spec], device)

    kernel = fresh()
    contiguous: dict[Phase, PrepareLayers]
    if isinstance(kernel, FlashKernel):
        backend = of_flash(kernel, spec, device)
        contiguous = {"decode": backend, "prefill": backend}
        forms = "the engine's backend on slots"
        return Library(name, spec, contiguous, {"decode": forms, "prefill": forms}, fresh)
    if isinstance(kernel, SdpaGather):
        dense = of_sdpa(spec)
        forms = "one SDPA call over neighbouring slots"
        words: dict[Phase, str] = {"decode": forms, "prefill": forms}
        return Library(name, spec, {"decode": dense, "prefill": dense}, words, fresh)
    if not isinstance(kernel, FlashInfer):
        raise Missing(f"no contiguous form of {name} is known to compare it with")
    contiguous = {"decode": pages_of_slots(fresh), "prefill": ragged_prompt(spec)}
    words = {"decode": "its paged kernel on pages that follow each other", "prefill": "ragged"}
    return Library(name, spec, contiguous, words, fresh)
