"""What the memory level lays out: the K and V of known models, in regions of virtual memory."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from bench.common import Json, short_bytes
from bench.trace import Trace
from vattn.kv.cache import DEFAULT_TILES
from vattn.kv.layout import LayerSpec, Layout, Order, make_layout

ALL = 0  # for layers_per_region: all layers share one region
PUBLISHED_LAYOUT = "K and V apart, 1 layer, no cover"  # vAttention's


@dataclass(frozen=True)
class KVShape:
    """The K and V of a model in half precision, as one GPU of ``gpus`` has them."""

    name: str
    layers: int
    model_kv_heads: int
    head_dim: int
    parameters: float
    gpus: int = 1
    dtype: torch.dtype = torch.float16

    @property
    def kv_heads(self) -> int:
        """On one GPU."""
        return self.model_kv_heads // self.gpus

    @property
    def token_bytes(self) -> int:
        """Of K and V of a token over all layers, on one GPU."""
        return 2 * self.layers * self.kv_heads * self.head_dim * self.dtype.itemsize

    @property
    def weight_bytes(self) -> int:
        """On one GPU."""
        return int(self.parameters * self.dtype.itemsize / self.gpus)

    def specs(self, *, apart: bool = False) -> list[LayerSpec]:
        """One per layer.

        Args:
            apart: K and V lie in regions of their own, as vAttention has them. A region of half the
                heads' K and V has the bytes of all heads' K, so twice the layers say the same.
        """
        if not apart:
            return [LayerSpec(self.kv_heads, self.head_dim, self.dtype)] * self.layers
        return [LayerSpec(self.kv_heads // 2, self.head_dim, self.dtype)] * (2 * self.layers)

    def as_json(self) -> Json:
        return {
            "layers": self.layers,
            "kv_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "gpus": self.gpus,
            "token_bytes": self.token_bytes,
            "weight_bytes": self.weight_bytes,
        }


SHAPES = {
    shape.name: shape
    for shape in (
        KVShape("yi-6b", 32, 4, 128, 6.06e9),
        KVShape("llama3-8b", 32, 8, 128, 8.03e9),
        KVShape("llama3-8b-tp2", 32, 8, 128, 8.03e9, gpus=2),
        KVShape("yi-34b", 60, 8, 128, 34.39e9),
        KVShape("yi-34b-tp2", 60, 8, 128, 34.39e9, gpus=2),
        KVShape("qwen3-8b", 36, 8, 128, 8.19e9),
    )
}


@dataclass(frozen=True)
class Regions:
    """A layout of contiguous virtual memory."""

    order: Order
    layers_per_region: int  # ALL for all
    page_bytes: int
    apart: bool = False  # K and V

    @property
    def layout_name(self) -> str:
        """Without the page."""
        if self.apart:
            return PUBLISHED_LAYOUT
        if self.order == "head":
            return "head order"
        layers = self.layers_per_region
        return f"token order, {layers or 'all'} layer{'' if layers == 1 else 's'}"

    def tiles(self, device: str) -> tuple[int, ...]:
        """Of the kernels that reads are covered for; vAttention maps nothing beyond the tokens."""
        return (1,) if self.apart else DEFAULT_TILES[device]

    def layout(
        self, shape: KVShape, max_tokens: int, device: str, layers: int | None = None
    ) -> Layout:
        """Of one slot; ``layers`` of the model's, None for all."""
        specs = shape.specs(apart=self.apart)
        return make_layout(
            specs if layers is None else specs[:layers],
            slots=1,
            max_tokens=max_tokens,
            page_bytes=self.page_bytes,
            order=self.order,
            layers_per_region=self.layers_per_region or None,
            tiles=self.tiles(device),
        )

    def as_json(self) -> Json:
        return {"layout": self.layout_name, "page_bytes": self.page_bytes}

    def __str__(self) -> str:
        return f"{self.layout_name}, {short_bytes(self.page_bytes)}"


# The published pair of figures: requests at once with pages of 2 MiB and of 64 KiB.
PUBLISHED_MOST = {
    "yi-6b": (187, 240),
    "llama3-8b-tp2": (203, 258),
    "yi-34b-tp2": (56, 68),
}
PUBLISHED_PAGES = (2 << 20, 64 << 10)


def implied(shape: KVShape) -> tuple[int, int]:
    """Budget in bytes and mean length in tokens that the published pair of figures implies.

    Where K and V of each layer have pages of their own and the last of each is half full, two
    numbers of requests at two page sizes have exactly one budget and one mean length.

    Raises:
        ValueError: nothing was published for this shape.
    """
    if shape.name not in PUBLISHED_MOST:
        raise ValueError(
            f"--kv-budget implied: no figures were published for {shape.name}; use it with "
            f"{', '.join(PUBLISHED_MOST)}"
        )
    few, many = PUBLISHED_MOST[shape.name]
    large, small = (2 * shape.layers * page / 2 for page in PUBLISHED_PAGES)
    budget = (large - small) / (1 / few - 1 / many)
    return int(budget), round((budget / many - small) / shape.token_bytes)


def stretched(trace: Trace, mean_tokens: float) -> Trace:
    """All lengths times what makes their mean ``mean_tokens``."""
    factor = mean_tokens / float(trace.total.mean())
    context, generated = (
        np.maximum(1, np.rint(lengths * factor)).astype(np.int64)
        for lengths in (trace.context, trace.generated)
    )
    return Trace(context, generated, f"{trace.source}, lengths x {factor:.2f}")


def shorter(trace: Trace, most_tokens: int) -> Trace:
    """Without those that a server with this limit refuses.

    Raises:
        ValueError: all of them are longer.
    """
    kept = trace.total <= most_tokens
    if not kept.any():
        raise ValueError(
            f"--max-model-len {most_tokens}: every request of {trace.source} is longer; raise it"
        )
    return Trace(trace.context[kept], trace.generated[kept], trace.source)
