"""A transformers cache whose K and V are views of virtual memory, mapped as tokens come."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache

from vattn.hf.compat import DummyLayer
from vattn.hf.configs import longest_sequence, read_layers
from vattn.hf.layer import VirtualLayer
from vattn.hf.rows import Options, Rows
from vattn.kv.arrays import Int32Array
from vattn.kv.cache import KVCache
from vattn.kv.layout import Order
from vattn.kv.pool import PagePool
from vattn.kv.report import CacheStats, MemoryMap


class VirtualCache(Cache):
    """A cache for ``model.generate(..., past_key_values=VirtualCache(model.config))``.

    Row i of the batch is slot i of one :class:`~vattn.KVCache`, contiguous in virtual memory. It
    never concatenates: growing maps pages, beams share them, ``reset()`` keeps them for the next
    generation. Memory is taken at the first update, from the shapes that the model really uses.

    After a forward that failed half-way (Ctrl-C), some layers have the new tokens and some do not:
    ``reset()``, or ``crop(-new_tokens)``, evens them out.

    Args:
        config: of the model; multimodal configs stand for their text decoder.
        max_tokens: longest sequence, None for the config's max_position_embeddings. It costs
            addresses, not memory.
        max_batch: most rows (beams and returned sequences count); None for what the first batch of
            a generation has. A larger batch after ``reset()`` then reserves anew.
        budget_bytes: most physical memory, a number or text such as ``"2GiB"``; None for
            ``VATTN_BUDGET``, or a share of what is free.
        page_bytes: None for the driver's default.
        order, layers_per_region, kv_tile_tokens: as of KVCache; None for the device's default.
        pool: a pool to share with other caches, in place of the two sizes.
        device, dtype: refuse a model that computes elsewhere or otherwise; None takes the model's.

    Raises:
        TypeError: not a config.
        ValueError: an encoder-decoder model, a layer that is not attention over K and V, or a
            setting out of range.
    """

    layers: list[VirtualLayer | DummyLayer]  # type: ignore[assignment]

    def __init__(
        self,
        config: PreTrainedConfig,
        max_tokens: int | None = None,
        *,
        max_batch: int | None = None,
        budget_bytes: int | str | None = None,
        page_bytes: int | None = None,
        order: Order | None = None,
        layers_per_region: int | None = None,
        pool: PagePool | None = None,
        kv_tile_tokens: int | Sequence[int] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        plans = read_layers(config)
        options = Options(
            max_tokens=longest_sequence(config) if max_tokens is None else max_tokens,
            max_batch=max_batch,
            budget_bytes=budget_bytes,
            page_bytes=page_bytes,
            order=order,
            layers_per_region=layers_per_region,
            pool=pool,
            kv_tile_tokens=kv_tile_tokens,
            device=None if device is None else torch.device(device),
            dtype=dtype,
        )
        self._rows = Rows([plan for plan in plans if plan is not None], options)
        nothing: DummyLayer = DummyLayer()  # type: ignore[no-untyped-call]
        stored = iter(range(len(self._rows.plans)))
        super().__init__(
            layers=[
                nothing if plan is None else VirtualLayer(self._rows, next(stored))
                for plan in plans
            ]
        )

    # What generate() asks for ---------------------------------------------------------------------

    @property
    def batch_size(self) -> int:
        """Rows of the present batch, -1 before the first."""
        return self._rows.batch or -1

    @property
    def max_batch_size(self) -> int:
        """Rows that fit without reserving anew: max_batch, or what the first batch had, else -1."""
        kv = self._rows.kv
        return kv.max_seqs if kv is not None else self._rows.options.max_batch or -1

    @property
    def max_cache_len(self) -> int:
        """Longest sequence in tokens."""
        return self._rows.options.max_tokens

    def reset(self) -> None:
        """Empties the cache. Its pages stay mapped, so the next generation costs no map call.

        To give them back, call ``cache.kv.trim()`` or :meth:`close`.
        """
        self._rows.reset()
        self._shorten(0)

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the last ``-tokens_to_remove`` tokens of every row; 0 does nothing.

        Raises:
            ValueError: a positive number, or beyond the start of the latest step of a model with
                sliding-window layers whose earlier tokens are gone; nothing has changed.
        """
        if tokens_to_remove > 0:
            raise ValueError(
                f"crop({tokens_to_remove}): give a negative number, how many tokens to remove"
            )
        if tokens_to_remove < 0:
            tokens = max(0, self._rows.tokens + tokens_to_remove)
            self._rows.truncate(tokens)
            self._shorten(tokens)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Row i becomes what row ``beam_idx[i]`` was: full pages are shared, partial tails copied.

        Args:
            beam_idx: ``[rows]`` integers; as many rows as before, or another number.

        Raises:
            ValueError: a row that does not exist; nothing has changed.
            OutOfPages: nothing has changed.
        """
        self._rows.select(_int32(beam_idx))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row ``repeats`` times, neighbours alike; errors as of :meth:`reorder_cache`."""
        rows = torch.arange(self._rows.batch).repeat_interleave(repeats)
        self._rows.select(_int32(rows))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps the rows ``indices`` (integers or a mask); errors as of :meth:`reorder_cache`."""
        self._rows.select(_int32(torch.arange(self._rows.batch)[indices.cpu()]))

    def __deepcopy__(self, memo: dict[int, Any]) -> VirtualCache:
        """A copy with memory of its own from the same pool, to start several texts from one prefix.

        Raises:
            OutOfPages: the budget does not hold both; nothing has changed.
        """
        copy = object.__new__(type(self))
        memo[id(self)] = copy
        copy.__dict__.update(self.__dict__)
        copy._rows = Rows(self._rows.plans, self._rows.options)
        self._rows.copy_to(copy._rows)
        copy.layers = [
            layer.over(copy._rows) if isinstance(layer, VirtualLayer) else layer
            for layer in self.layers
        ]
        return copy

    # What the memory looks like -------------------------------------------------------------------

    @property
    def kv(self) -> KVCache | None:
        """The cache beneath, row i in slot i; None before the first update.

        Its layers are those that store K and V: where a model's later layers share them, fewer than
        the model has.
        """
        return self._rows.kv

    def stats(self) -> CacheStats:
        """Figures of this moment.

        Raises:
            ValueError: nothing was ever cached.
        """
        return self._made().stats()

    def memory_map(self) -> MemoryMap:
        """State of every page of every row.

        Raises:
            ValueError: nothing was ever cached.
        """
        return self._made().memory_map()

    def check(self) -> None:
        """Verifies the invariants of the memory beneath.

        Raises:
            InvariantError: one is broken, which is a bug of vattn.
        """
        if self._rows.kv is not None:
            self._rows.kv.check()

    def close(self) -> None:
        """Empties the cache and gives all its memory back. It may be used again."""
        self._rows.close()
        self._shorten(0)

    def _made(self) -> KVCache:
        if self._rows.kv is None:
            raise ValueError("this VirtualCache has no memory before the model's first tokens")
        return self._rows.kv

    def _shorten(self, tokens: int) -> None:
        for layer in self.layers:
            if isinstance(layer, VirtualLayer):
                layer.shorten(tokens)


def _int32(rows: torch.Tensor) -> Int32Array:
    if rows.is_floating_point() or rows.is_complex():
        raise TypeError(f"rows are numbered by integers, not {rows.dtype}")
    return rows.to(device="cpu", dtype=torch.int32).contiguous().numpy()
