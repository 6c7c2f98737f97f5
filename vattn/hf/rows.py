"""The rows of a batch as slots of one KVCache, all of the same length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from vattn.config import parse_bytes
from vattn.hf.configs import LayerPlan
from vattn.kv.arrays import Int32Array
from vattn.kv.cache import KVCache
from vattn.kv.layout import LayerSpec, Order
from vattn.kv.pool import PagePool, parse_device, shared_pool

# A copy of a cache grows in steps of this many tokens, so that sliding-window layers recycle pages
# on the way instead of mapping the whole sequence.
_COPY_STEP_TOKENS = 4096


@dataclass(frozen=True, kw_only=True)
class Options:
    """Settings of a VirtualCache, checked as far as they can be before the first token."""

    max_tokens: int
    max_batch: int | None = None
    budget_bytes: int | str | None = None
    page_bytes: int | None = None
    order: Order | None = None
    layers_per_region: int | None = None
    pool: PagePool | None = None
    kv_tile_tokens: int | Sequence[int] | None = None
    device: torch.device | None = None
    dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        for name in ("max_tokens", "max_batch", "page_bytes", "layers_per_region"):
            value = getattr(self, name)
            if value is None and name != "max_tokens":
                continue
            if not isinstance(value, int) or value <= 0:
                raise ValueError(f"{name}={value!r} must be a positive integer")
        if self.order not in (None, "token", "head"):
            raise ValueError(f'order={self.order!r} must be "token" or "head"')
        if self.budget_bytes is not None:
            parse_bytes(self.budget_bytes, "budget_bytes")
        if self.pool is not None and (self.page_bytes, self.budget_bytes) != (None, None):
            raise ValueError("page_bytes and budget_bytes belong to the pool given")


class Shape(NamedTuple):
    """What one update of a layer brings, its number of tokens apart."""

    batch: int
    kv_heads: int
    k_dim: int
    v_dim: int
    dtype: torch.dtype
    device: torch.device


class Rows:
    """Rows ``0..batch-1`` of a batch, each the slot of its number, ``tokens`` long.

    The KVCache is made at the first update, from the shapes that the model really uses, and made
    again when an empty cache gets a larger batch or another model.
    """

    def __init__(self, plans: Sequence[LayerPlan], options: Options) -> None:
        self.plans = plans
        self.options = options
        self.pool = options.pool
        self.kv: KVCache | None = None
        self.tokens = 0
        # Length before the latest step: sliding-window layers can be cropped back to here.
        self.anchor = 0
        # Moves whenever tensors over the KVCache, or the number of rows in them, become outdated.
        self.version = 0
        self._shapes: list[Shape | None] = [None] * len(plans)
        self._retired: list[KVCache] = []
        self._open = 0
        self._slots = self._lengths = np.empty(0, np.int32)

    # Steps ----------------------------------------------------------------------------------------

    def enter(self, layer: int, shape: Shape, held: int, tokens: int) -> None:
        """Prepares a layer's update from ``held`` to ``tokens`` tokens: the first of a step grows.

        Raises:
            ValueError: too long, or not what the cache holds; nothing has changed.
            OutOfPages: the budget is exhausted; no row has changed.
        """
        if tokens > self.options.max_tokens:
            raise ValueError(
                f"{tokens} tokens are more than max_tokens={self.options.max_tokens} of this "
                "VirtualCache; make it with a larger max_tokens, or generate fewer tokens"
            )
        self._check(layer, shape, held)
        is_same_step = (held, tokens) == (self.anchor, self.tokens)
        if tokens > held != self.tokens and not is_same_step:
            raise ValueError(
                f"layer {layer} holds {held} tokens where others hold {self.tokens}: an earlier "
                "forward was cut short; call reset(), or crop() by what that forward added"
            )
        known, self._shapes[layer] = self._shapes[layer], shape
        if (
            self.kv is None
            or self.kv.specs[layer] != self._spec(layer)
            or shape.batch > self.kv.max_seqs
        ):
            try:
                self._remake(shape)
            except BaseException:
                self._shapes[layer] = known
                raise
        if shape.batch != self.batch:
            self._resize(shape.batch)
        if tokens > self.tokens:
            self._grow(tokens)

    def _grow(self, tokens: int) -> None:
        assert self.kv is not None
        self._retired.clear()
        self._lengths.fill(tokens)
        self.kv.ensure_many(self._slots, self._lengths)
        self.anchor, self.tokens = self.tokens, tokens

    def _check(self, layer: int, shape: Shape, held: int) -> None:
        options, pool = self.options, self.pool
        if options.dtype not in (None, shape.dtype):
            raise ValueError(
                f"the model computes K and V in {shape.dtype}, but the cache was made for "
                f"dtype={options.dtype}; leave dtype out to take the model's"
            )
        for wanted in (options.device, None if pool is None else pool.device):
            if wanted is not None and parse_device(wanted) != shape.device:
                raise ValueError(
                    f"layer {layer} computes on {shape.device}, but the cache is on {wanted}: one "
                    "VirtualCache serves one device; put the whole model on it"
                )
        if options.max_batch is not None and shape.batch > options.max_batch:
            raise ValueError(
                f"a batch of {shape.batch} rows is more than max_batch={options.max_batch}; "
                "raise max_batch (beams and returned sequences count as rows)"
            )
        if self.tokens == 0:
            return
        if shape.batch != self.batch:
            raise ValueError(
                f"a batch of {shape.batch} rows, but the cache holds {self.batch} rows of "
                f"{self.tokens} tokens; call reset() before another batch"
            )
        if held > 0 and self._spec(layer) != self._spec(layer, shape):
            raise ValueError(
                f"layer {layer} holds {self._spec(layer)}, but the update is "
                f"{self._spec(layer, shape)}; call reset() before using another model"
            )

    # Rows -----------------------------------------------------------------------------------------

    def select(self, sources: Int32Array) -> None:
        """Makes row i what row ``sources[i]`` was: a reorder, a repetition or a choice of rows.

        Full pages are shared, partial tails copied.

        Raises:
            ValueError: a row that does not exist, or none at all; nothing has changed.
            OutOfPages: nothing has changed.
        """
        if self.kv is None or self.tokens == 0:
            return
        n = len(sources)
        if n == 0 or sources.min() < 0 or sources.max() >= self.batch:
            raise ValueError(f"rows {sources.tolist()} of a batch of {self.batch}")
        if n > self.kv.max_seqs:
            self._widen(sources)
            return
        before = self.batch
        if n > before:
            self._resize(n)
        try:
            self.kv.assign(np.arange(n, dtype=np.int32), sources)
        except BaseException:
            self._resize(before)
            raise
        self._resize(n)

    def truncate(self, tokens: int) -> None:
        """Shortens every row.

        Raises:
            ValueError: further back than a sliding-window layer still holds; nothing has changed.
        """
        if self.kv is None or tokens >= self.tokens:
            return
        for slot in range(self.batch):
            self.kv.truncate(slot, tokens)
        self.tokens = tokens
        self.anchor = min(self.anchor, tokens)

    def reset(self) -> None:
        """Ends all rows. Their pages stay mapped for the next ones."""
        self._retired.clear()
        if self.kv is None:
            return
        try:
            self._resize(0)
            known = self.kv.stats().open_slots == 0
        except ValueError:
            known = False
        if not known:  # Ctrl-C fell between opening or releasing a slot and its record
            self._drop()
        self.tokens = self.anchor = 0

    def close(self) -> None:
        """Ends all rows and gives their memory back, and the pool with it if nobody gave it."""
        self._drop()
        self.pool = self.options.pool
        self.tokens = self.anchor = 0

    @property
    def batch(self) -> int:
        """Number of rows."""
        return len(self._slots)

    def _resize(self, batch: int) -> None:
        """Opens or releases slots at the end."""
        assert self.kv is not None
        while self._open < batch:
            self.kv.open(slot=self._open)
            self._open += 1
        while self._open > batch:
            self.kv.release(self._open - 1)
            self._open -= 1
        self._set_rows(batch)

    def _set_rows(self, batch: int) -> None:
        self._open = batch
        self.version += 1
        # The length of _slots is the batch: last, so that Ctrl-C in between leaves the old batch.
        self._lengths = np.empty(batch, np.int32)
        self._slots = np.arange(batch, dtype=np.int32)

    # Making ---------------------------------------------------------------------------------------

    def _spec(self, layer: int, shape: Shape | None = None) -> LayerSpec:
        """What a layer stores: as given, as seen, or like the layer seen that is most like it."""
        plan = self.plans[layer]
        shape = shape or self._shapes[layer]
        if shape is None:
            seen = [(p, s) for p, s in zip(self.plans, self._shapes, strict=True) if s is not None]
            alike = [s for p, s in seen if p.expected == plan.expected]
            if not alike and plan.expected is not None:
                return LayerSpec(*plan.expected, seen[0][1].dtype, plan.window)
            shape = (alike or [s for _, s in seen])[0]
        # K and V of different sizes (latent attention) share one spacing; views cut the smaller.
        return LayerSpec(shape.kv_heads, max(shape.k_dim, shape.v_dim), shape.dtype, plan.window)

    def _make(self, batch: int) -> KVCache:
        options = self.options
        assert self.pool is not None
        return KVCache(
            [self._spec(layer) for layer in range(len(self.plans))],
            max_seqs=options.max_batch or batch,
            max_tokens=options.max_tokens,
            pool=self.pool,
            layers_per_region=options.layers_per_region,
            order=options.order,
            kv_tile_tokens=options.kv_tile_tokens,
        )

    def _remake(self, shape: Shape) -> None:
        """Makes the KVCache for the shapes now known, and brings along what it holds."""
        if self.pool is None:
            page_bytes, budget_bytes = self.options.page_bytes, self.options.budget_bytes
            self.pool = shared_pool(
                shape.device, page_bytes=page_bytes, budget_bytes=budget_bytes
            ) or PagePool(shape.device, page_bytes=page_bytes, budget_bytes=budget_bytes)
        if self.tokens == 0:
            kv = self._make(shape.batch)
            self._drop()
            self.kv = kv
            self.version += 1
            return
        # The first step of a model whose layers differ in a way that its config does not tell. What
        # earlier layers were given in this step must stay readable until the next one.
        kv = self._make(self.batch)
        self._fill(kv, range(self.batch))
        if self.kv is not None:
            self._retired.append(self.kv)
        self.kv = kv
        self.version += 1

    def _widen(self, sources: Int32Array) -> None:
        if self.options.max_batch is not None:
            raise ValueError(
                f"{len(sources)} rows are more than max_batch={self.options.max_batch}; raise it"
            )
        kv = self._make(len(sources))
        self._fill(kv, sources.tolist())
        if self.kv is not None:
            self.kv.close()
        self.kv = kv
        self._set_rows(len(sources))

    def _fill(self, kv: KVCache, sources: Sequence[int]) -> None:
        """Opens slots of a new KVCache and copies rows of ours there."""
        assert self.kv is not None
        slots = [kv.open(slot=i) for i in range(len(sources))]
        # The last step is the same as ours, and so is what window layers hold after it.
        for tokens in (*range(_COPY_STEP_TOKENS, self.anchor, _COPY_STEP_TOKENS), self.anchor):
            kv.ensure_many(slots, [tokens] * len(slots))
        kv.ensure_many(slots, [self.tokens] * len(slots))
        for layer in range(len(self.plans)):
            first = self.kv.first_token(0, layer)
            for old, new in zip(self.kv.layer(layer), kv.layer(layer), strict=True):
                if old.shape[2:] != new.shape[2:]:
                    continue  # the layer that the KVCache is made again for: it has not begun
                for slot, source in enumerate(sources):
                    new[slot, first : self.tokens] = old[source, first : self.tokens]

    def copy_to(self, other: Rows) -> None:
        """Copies all rows into new, empty ones, which may share the pool."""
        other.pool = self.pool
        other._shapes = list(self._shapes)
        if self.kv is None or self.tokens == 0:
            return
        other.kv = other._make(self.batch)
        self._fill(other.kv, range(self.batch))
        other._set_rows(self.batch)
        other.tokens, other.anchor = self.tokens, self.anchor

    def _drop(self) -> None:
        if self.kv is not None:
            self.kv.close()
        self.kv = None
        self._retired.clear()
        self._set_rows(0)
