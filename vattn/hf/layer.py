"""One layer of a VirtualCache."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from transformers.cache_utils import CacheLayerMixin

from vattn.hf.rows import Rows, Shape


class VirtualLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """One layer of a :class:`VirtualCache`: writes new tokens in place and hands out views.

    ``keys`` and ``values`` are what is cached, ``[batch, kv_heads, tokens, head_dim]``; of a
    sliding-window layer the last ``window - 1`` tokens. Its rows are common to all layers, so
    whatever moves or ends them is a method of the cache.
    """

    is_compileable = False
    is_croppable = True

    def __init__(self, rows: Rows, index: int) -> None:
        # Not the parent's: `keys` and `values` are derived here, so there is nothing to set.
        self._rows = rows
        self._index = index
        self._tokens = 0
        self._version = -1
        self._shape: Shape | None = None
        self._k = self._v = torch.empty(0)
        self.is_initialized = False
        self.sliding_window = rows.plans[index].window
        self.is_sliding = self.sliding_window is not None
        # Tokens before a step that its queries can reach.
        self._reach = rows.options.max_tokens
        if self.sliding_window is not None:
            self._reach = self.sliding_window - 1

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Stores new tokens and returns all that their queries can reach.

        Args:
            key_states: ``[batch, kv_heads, n, head_dim]``.
            value_states: the same; its head_dim may differ.
            *args: what other kinds of cache take; not used.
            **kwargs: as args.

        Returns:
            Views ``[batch, kv_heads, m, head_dim]`` of the cache itself, m being the new tokens and
            those before (at most ``window - 1``). Read them before the next step.

        Raises:
            ValueError: longer than max_tokens, another batch or shape than the cache holds, tensors
                that carry gradients; nothing has changed.
            OutOfPages: the budget is exhausted; nothing has changed.
        """
        batch, kv_heads, n, k_dim = key_states.shape
        shape = Shape(
            batch, kv_heads, k_dim, value_states.shape[3], key_states.dtype, key_states.device
        )
        if (key_states.requires_grad or value_states.requires_grad) and torch.is_grad_enabled():
            raise ValueError(
                "VirtualCache writes in place, which autograd cannot follow; run the model under "
                "torch.inference_mode() or torch.no_grad()"
            )
        rows = self._rows
        start = self._tokens
        stop = start + n
        if stop != rows.tokens or shape != self._shape or rows.version != self._version:
            self._enter(shape, stop, key_states, value_states)
        first = max(0, start - self._reach)
        self._k.narrow(2, start, n).copy_(key_states)
        self._v.narrow(2, start, n).copy_(value_states)
        self._tokens = stop
        return self._k.narrow(2, first, stop - first), self._v.narrow(2, first, stop - first)

    def _enter(self, shape: Shape, stop: int, k: torch.Tensor, v: torch.Tensor) -> None:
        if (v.shape[:3], v.dtype, v.device) != (k.shape[:3], k.dtype, k.device):
            raise ValueError(
                f"keys {tuple(k.shape)} of {k.dtype} on {k.device} and values {tuple(v.shape)} of "
                f"{v.dtype} on {v.device} do not belong together"
            )
        self._rows.enter(self._index, shape, self._tokens, stop)
        if self._rows.version != self._version or shape != self._shape:
            self._bind(shape)

    def _bind(self, shape: Shape) -> None:
        assert self._rows.kv is not None
        k, v = self._rows.kv.layer(self._index)
        self._k = k[: shape.batch, ..., : shape.k_dim].transpose(1, 2)
        self._v = v[: shape.batch, ..., : shape.v_dim].transpose(1, 2)
        self._shape = shape
        self._version = self._rows.version
        self.is_initialized = True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Reserves addresses for layers of this shape, of which the number of tokens may be 0."""
        batch, kv_heads, _, k_dim = key_states.shape
        v_dim = value_states.shape[3]
        shape = Shape(batch, kv_heads, k_dim, v_dim, key_states.dtype, key_states.device)
        self._enter(shape, self._tokens, key_states, value_states)

    @property
    def keys(self) -> torch.Tensor | None:  # type: ignore[override]
        """Cached keys, None while there are none."""
        return self._cached(self._k) if self._is_bound() else None

    @property
    def values(self) -> torch.Tensor | None:  # type: ignore[override]
        """Cached values, None while there are none."""
        return self._cached(self._v) if self._is_bound() else None

    def _is_bound(self) -> bool:
        if self._shape is None or self._tokens == 0:
            return False
        if self._rows.version != self._version:
            self._bind(self._shape._replace(batch=self._rows.batch))
        return True

    def _cached(self, states: torch.Tensor) -> torch.Tensor:
        first = max(0, self._tokens - self._reach)
        return states.narrow(2, first, self._tokens - first)

    def get_seq_length(self) -> int:
        """Tokens seen so far."""
        return self._tokens

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of what :meth:`update` will return for that many new tokens."""
        offset = max(0, self._tokens - self._reach)
        return self._tokens + query_length - offset, offset

    def get_max_length(self) -> int:
        """``max_tokens``, or the window if that is shorter."""
        return min(
            self.sliding_window or self._rows.options.max_tokens, self._rows.options.max_tokens
        )

    def shorten(self, tokens: int) -> None:
        """Forgets all but the first ``tokens`` tokens; for the cache, which shortens the rows."""
        self._tokens = min(self._tokens, tokens)

    def over(self, rows: Rows) -> VirtualLayer:
        """The same layer over a copy of its rows."""
        layer = VirtualLayer(rows, self._index)
        layer._tokens, layer._shape = self._tokens, self._shape
        layer.is_initialized = self.is_initialized
        return layer

    def _of_the_cache(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise TypeError("the layers of a VirtualCache share rows; call this on the cache")

    reset = reorder_cache = crop = batch_repeat_interleave = batch_select_indices = _of_the_cache
    offload = prefetch = _of_the_cache
