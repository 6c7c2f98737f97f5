"""Where each token's K and V lie: layers to regions, regions to runs, runs to bytes.

A *region* is one reserved virtual range with the K and V of some layers for all slots. A *run* is a
page-aligned stretch of one slot in which tokens are evenly spaced. Two knobs decide both:

``order="token"``
    ``[token, layer, K/V, head, dim]``: one run per region. FlashAttention's native order, and the
    only one with a flat view over all slots.
``order="head"``
    ``[layer, K/V, head, token, dim]``: one run per layer, per K and V, per head. Long contiguous
    rows, which is what SDPA on a CPU wants.
``layers_per_region``
    How many layers share a region. In token order it sets the token's stride and the tail's waste;
    in head order only the number of reserved ranges.
"""

from __future__ import annotations

import math
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from vattn import _core
from vattn.config import positive_int

Order = Literal["token", "head"]

# The dtypes a cache can hold, with their DLPack code where it has one: (code, bits). The 8-bit
# floats travel as bytes and are reinterpreted, since older consumers do not know their codes.
_DLPACK: dict[torch.dtype, tuple[int, int]] = {
    torch.float32: (2, 32),
    torch.float16: (2, 16),
    torch.bfloat16: (4, 16),
    torch.float64: (2, 64),
    torch.float8_e4m3fn: (1, 8),
    torch.float8_e5m2: (1, 8),
}
DTYPES: tuple[torch.dtype, ...] = tuple(_DLPACK)

_MAX_TOKEN_INDEX = 2**31  # kernels index tokens by int32
_MAX_SLOT_STRIDE = 2**40  # of a TMA descriptor
_MAX_RESERVE = 2**46  # half of the user's address space on x86-64
_STRIDE_ALIGNMENT = 16  # bytes, of a TMA descriptor and of vector loads


@dataclass(frozen=True)
class LayerSpec:
    """What one attention layer caches.

    Args:
        kv_heads: number of K (and V) heads.
        head_dim: elements per head, a multiple of 8.
        dtype: element type, one of :data:`DTYPES`.
        window: tokens a query can look back, itself included; None for full attention.
    """

    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    window: int | None = None

    def __post_init__(self) -> None:
        positive_int(self.kv_heads, "kv_heads")
        positive_int(self.head_dim, "head_dim")
        if self.head_dim % 8:
            raise ValueError(
                f"head_dim={self.head_dim} is not a multiple of 8: attention kernels would pad it "
                "by copying the cache; pad the model's heads instead"
            )
        if self.dtype not in _DLPACK:
            names = ", ".join(str(d) for d in DTYPES)
            raise ValueError(f"dtype={self.dtype} is not supported; use one of {names}")
        if self.window is not None:
            positive_int(self.window, "window", ", or None for full attention")

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's K and V in this layer."""
        return 2 * self.kv_heads * self.head_dim * self.dtype.itemsize


@dataclass(frozen=True)
class Region:
    """One reserved range: the layers in it and how they are laid out.

    ``token_bytes`` is the distance between tokens of a run, ``slot_tokens`` what a slot holds
    (``max_tokens`` rounded up so that a slot is whole pages and whole tokens and every tile of it).
    """

    layers: tuple[int, ...]
    spec: LayerSpec
    order: Order
    runs: int
    token_bytes: int
    slot_tokens: int

    @property
    def run_bytes(self) -> int:
        """Virtual bytes of one run."""
        return self.slot_tokens * self.token_bytes

    @property
    def slot_bytes(self) -> int:
        """Virtual bytes of one slot."""
        return self.run_bytes * self.runs

    def core_spec(self) -> _core.RegionSpec:
        """The same for the native core."""
        return _core.RegionSpec(
            runs=self.runs,
            token_bytes=self.token_bytes,
            capacity_tokens=self.slot_tokens,
            window_tokens=self.spec.window or 0,
            type_tag=DTYPES.index(self.spec.dtype),
        )


@dataclass(frozen=True)
class Layout:
    """The regions of a cache and, per layer, which region it is in and at which place."""

    regions: tuple[Region, ...]
    places: tuple[tuple[int, int], ...]
    slots: int
    max_tokens: int
    tiles: tuple[int, ...]
    page_bytes: int

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's K and V over all layers."""
        return sum(len(r.layers) * r.spec.token_bytes for r in self.regions)

    @property
    def slot_bytes(self) -> int:
        """Virtual bytes of one slot over all regions."""
        return sum(r.slot_bytes for r in self.regions)

    @property
    def reserved_bytes(self) -> int:
        """Virtual bytes of all slots."""
        return self.slots * self.slot_bytes

    @property
    def most_bytes(self) -> int:
        """The most physical memory that the cache can use.

        Every slot full, and a page per run and slot beside it: a reorder stages partial tails.
        """
        runs = sum(region.runs for region in self.regions)
        return self.reserved_bytes + self.slots * runs * self.page_bytes

    def tensor(
        self, space: _core.SlotSpace, layer: int, which: Literal["k", "v"], *, flat: bool = False
    ) -> torch.Tensor:
        """K or V of one layer over all slots, without a copy.

        Returns:
            ``[slots, slot_tokens, kv_heads, head_dim]``, or with ``flat`` (token order only)
            ``[slots * slot_tokens, kv_heads, head_dim]``. For kernels only: most of it is reserved
            and not mapped.
        """
        index, place = self.places[layer]
        region = self.regions[index]
        spec = region.spec
        item = spec.dtype.itemsize
        part = place * 2 + (which == "v")
        if region.order == "token":
            offset = part * spec.kv_heads * spec.head_dim * item
            token, head = region.token_bytes // item, spec.head_dim
        else:
            offset = part * spec.kv_heads * region.run_bytes
            token, head = spec.head_dim, region.run_bytes // item
        shape = [self.slots, region.slot_tokens, spec.kv_heads, spec.head_dim]
        strides = [region.slot_bytes // item, token, head, 1]
        if flat:
            if region.order != "token":
                raise ValueError('only order="token" has a flat view; this cache has order="head"')
            shape = [self.slots * region.slot_tokens, *shape[2:]]
            strides = strides[1:]
        code, bits = _DLPACK[spec.dtype]
        capsule = space.dlpack(index, offset, shape, strides, code, bits)
        # A tensor made in inference mode could not be written outside of it, whoever asks first.
        with torch.inference_mode(False):
            tensor: torch.Tensor = torch.utils.dlpack.from_dlpack(capsule)
            return tensor if tensor.dtype == spec.dtype else tensor.view(spec.dtype)


def round_up(n: int, multiple: int) -> int:
    """The smallest multiple that is at least ``n``."""
    return -(-n // multiple) * multiple


def _make_region(
    layers: Sequence[int],
    spec: LayerSpec,
    order: Order,
    max_tokens: int,
    tiles: Sequence[int],
    page_bytes: int,
) -> Region:
    if order == "token":
        runs, token_bytes = 1, len(layers) * spec.token_bytes
    else:
        runs = len(layers) * 2 * spec.kv_heads
        token_bytes = spec.head_dim * spec.dtype.itemsize
    # Whole pages and whole tokens at once; the rounding costs addresses, not memory.
    unit = page_bytes // math.gcd(page_bytes, token_bytes)
    slot_tokens = round_up(max(round_up(max_tokens, tile) for tile in tiles), unit)
    return Region(tuple(layers), spec, order, runs, token_bytes, slot_tokens)


def _check_region(region: Region, slots: int) -> None:
    if slots * region.slot_tokens >= _MAX_TOKEN_INDEX:
        raise ValueError(
            f"max_seqs={slots} slots of {region.slot_tokens} tokens are "
            f"{slots * region.slot_tokens} tokens, and kernels index fewer than 2**31; "
            "lower max_seqs or max_tokens"
        )
    if region.slot_bytes >= _MAX_SLOT_STRIDE:
        raise ValueError(
            f"a slot of {region.slot_bytes} bytes is beyond the stride of 2**40 that kernels can "
            "take; lower max_tokens or layers_per_region"
        )
    for name, stride in (
        ("token", region.token_bytes),
        ("head", region.spec.head_dim * region.spec.dtype.itemsize),
    ):
        if stride % _STRIDE_ALIGNMENT:
            raise ValueError(
                f"the {name} stride of {stride} bytes is not a multiple of {_STRIDE_ALIGNMENT}; "
                "use a head size that is a multiple of 16 bytes"
            )


def make_layout(
    specs: Sequence[LayerSpec],
    *,
    slots: int,
    max_tokens: int,
    page_bytes: int,
    order: Order,
    layers_per_region: int | None,
    tiles: Sequence[int],
) -> Layout:
    """Lays out the layers: equal ones share regions, in groups of ``layers_per_region``.

    Args:
        specs: one per layer.
        slots: sequences held at once.
        max_tokens: longest sequence.
        page_bytes: of the page pool.
        order: "token" or "head".
        layers_per_region: at least 1; None puts all equal layers into one region.
        tiles: kernel tile sizes in tokens that reads are rounded up to.

    Raises:
        ValueError: a size that is not positive, or a layout that kernels could not address.
    """
    if not specs:
        raise ValueError("a cache needs at least one layer")
    positive_int(slots, "max_seqs")
    positive_int(max_tokens, "max_tokens")
    if order not in typing.get_args(Order):
        raise ValueError(f'order={order!r} must be "token" or "head"')
    if layers_per_region is not None:
        positive_int(layers_per_region, "layers_per_region", ", or None for all")
    if not tiles:
        raise ValueError("kv_tile_tokens is empty; give at least one tile, 1 for no cover")
    for tile in tiles:
        positive_int(tile, "kv_tile_tokens")
    groups: dict[LayerSpec, list[int]] = {}
    for layer, spec in enumerate(specs):
        groups.setdefault(spec, []).append(layer)
    regions: list[Region] = []
    places: dict[int, tuple[int, int]] = {}
    for spec, layers in groups.items():
        step = layers_per_region or len(layers)
        for start in range(0, len(layers), step):
            chunk = layers[start : start + step]
            region = _make_region(chunk, spec, order, max_tokens, tiles, page_bytes)
            _check_region(region, slots)
            places |= {layer: (len(regions), i) for i, layer in enumerate(chunk)}
            regions.append(region)
    layout = Layout(
        tuple(regions),
        tuple(places[i] for i in range(len(specs))),
        slots,
        max_tokens,
        tuple(tiles),
        page_bytes,
    )
    if layout.reserved_bytes > _MAX_RESERVE:
        raise ValueError(
            f"max_seqs={slots} x max_tokens={max_tokens} reserves {layout.reserved_bytes} bytes of "
            f"addresses, beyond 2**46; lower one of them"
        )
    return layout
