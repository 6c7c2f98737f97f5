"""The protocol between the engine and an attention kernel that reads slots where they are.

A step is a packed batch ``[T]``: first ``num_decodes`` sequences with one new token each, ordered
by slot, then the prefill chunks. Every backend appends the new K and V to the slots, then attends
over the slots, without copying what is cached.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
import torch

from vattn.attention.upload import Uploader
from vattn.kv.cache import KVCache
from vattn.kv.layout import Order

Int32 = npt.NDArray[np.int32]
# What writes the new K and V of decodes: the attention kernel itself, or a launch before it.
AppendMode = Literal["kernel", "triton", "index_put"]


@dataclass(frozen=True)
class AttentionSpec:
    """What one layer's attention computes.

    ``window``: tokens a query can look back, itself included; None for all. ``softcap``: scores are
    ``cap * tanh(scores / cap)``; None for none. ``sinks``: a learned logit per head joins the
    softmax. ``scale`` multiplies the scores.
    """

    heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    scale: float
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False


@dataclass
class Step:
    """What the layers of one forward pass share.

    Args:
        cache: whose slots are attended over; layer ``i`` of the model is layer ``i`` of it.
        slots: int32 ``[S]``, the decodes' slots ascending, then the chunks'.
        query_lens: int32 ``[S]``, new tokens; 1 for each decode.
        kv_lens: int32 ``[S]``, tokens in the slot, the new ones included.
        num_decodes: how many of the S are decodes.

        upload: moves small arrays to the device.

    A backend's ``prepare`` leaves what it needs in ``write_slots``, ``write_positions`` (int32 or
    int64 ``[T]`` on the device) and ``plan``.
    """

    cache: KVCache
    slots: Int32
    query_lens: Int32
    kv_lens: Int32
    num_decodes: int
    upload: Uploader = field(default=None)  # type: ignore[assignment]  # made for the cache's device
    write_slots: torch.Tensor | None = None
    write_positions: torch.Tensor | None = None
    plan: dict[Any, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.upload is None:
            self.upload = Uploader(self.cache.device)

    @property
    def tokens(self) -> int:
        """T, the new tokens of all sequences."""
        return int(self.query_lens.sum())

    @property
    def num_chunks(self) -> int:
        """Sequences with a prefill chunk."""
        return len(self.slots) - self.num_decodes

    def positions(self) -> npt.NDArray[np.int64]:
        """int64 ``[T]``: the position of each new token in its sequence."""
        starts = (self.kv_lens - self.query_lens).astype(np.int64)
        before = np.cumsum(self.query_lens) - self.query_lens
        out: npt.NDArray[np.int64] = np.arange(self.tokens) + np.repeat(
            starts - before, self.query_lens
        )
        return out


class Backend(Protocol):
    """A kernel on slots. One object serves one engine."""

    name: str
    # Reads are rounded up to whole tiles of these sizes; the cache keeps them mapped.
    kv_tile_tokens: tuple[int, ...]
    # The layout it needs; None for any.
    order: Order | None
    # Whether decodes may be captured in a CUDA graph: see vattn.engine.graphs.
    graphs: bool

    @property
    def append_mode(self) -> AppendMode:
        """How decodes' K and V get into their slots."""
        ...

    def refusal(self, spec: AttentionSpec, device: torch.device) -> str | None:
        """Why it cannot serve a layer on a device; None if it can."""
        ...

    def prepare(self, step: Step, specs: Sequence[AttentionSpec]) -> None:
        """Computes once what all layers of the step share."""
        ...

    def forward(
        self,
        layer: int,
        spec: AttentionSpec,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        step: Step,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Appends K and V, then attends causally.

        Args:
            layer: index in the cache.
            spec: of this layer.
            query: ``[T, heads, head_dim]``.
            key: ``[T, kv_heads, head_dim]``, the new tokens' own.
            value: the same of V.
            step: prepared by :meth:`prepare`.
            sinks: ``[heads]``, if the spec has them.

        Returns:
            ``[T, heads, head_dim]``.
        """
        ...


class UnsupportedAttention(ValueError):
    """No backend can serve a layer; the message names what is missing."""


def prepare_append(step: Step) -> None:
    """Fills in where the new K and V go."""
    slots = np.repeat(step.slots, step.query_lens).astype(np.int64)
    step.write_slots, step.write_positions = step.upload(slots, step.positions())
