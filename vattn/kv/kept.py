"""Sequences that have ended, or given way, and go on later: kept slots, copies in host memory."""

from __future__ import annotations

import torch

from vattn.kv.arrays import Int32Array, as_int32
from vattn.kv.slots import LengthList, Slot, SlotLike, SlotList, SlotTable, token_count


class KeptSlots(SlotTable):
    """The part of :class:`vattn.KVCache` with which a prefix cache and an engine are made.

    A slot that is released with ``keep=True`` is free, yet remembers its tokens until somebody
    needs its pages or the slot itself. Pages are taken from the slot used longest ago first, from
    its end, so what is left is a shorter prefix. All of it counts as available to others.
    """

    def kept(self, slot: SlotLike) -> tuple[int, int]:
        """The lengths ``(lowest, tokens)`` that a slot can be reopened at or forked from.

        ``lowest`` is 0 unless a layer has a sliding window. ``(0, 0)``: the slot is open, or keeps
        nothing.
        """
        return self._slots.kept(self._index(slot))

    def lowest(self, slot: SlotLike) -> int:
        """The shortest length at which a slot, open or kept, can be forked.

        0 unless a sliding-window layer has left pages behind.
        """
        return self._slots.lowest(self._index(slot))

    def kept_lengths(self) -> Int32Array:
        """:meth:`kept` of all slots at once, int32 ``[max_seqs, 2]``."""
        return self._slots.kept_lengths()

    def evictions(self) -> int:
        """Tokens lost from kept slots so far: to pressure, to a new user of the slot, to a trim.

        While it stands still, nothing that :meth:`kept` said has changed. Takes no lock.
        """
        return self._slots.evictions()

    def reopen(self, slot: SlotLike, tokens: int) -> Slot:
        """Opens a kept slot in place with its first ``tokens`` tokens. No driver call.

        Call :meth:`ensure` before the first kernel, whatever the length: it orders the stream after
        the slot's last user and maps the cover of the last tile, which was not kept.

        Raises:
            PagesGone: it is no longer kept to that length; nothing has changed.
            ValueError: the slot is open, or was not kept.
        """
        index = self._index(slot)
        self._slots.reopen(index, token_count(tokens))
        return self._handle(index)

    def forget(self, slot: SlotLike) -> None:
        """Ends what a free slot keeps; its pages are the first to be taken now."""
        self._slots.forget(self._index(slot))

    def touch(self, slot: SlotLike) -> None:
        """Makes a free slot the one used last. A fork does that to its source by itself."""
        self._slots.touch(self._index(slot))

    def evict_first(self, slots: SlotList) -> None:
        """Has free slots lose content first, in this order, until another order is given.

        So a policy of one's own decides what is evicted, and the cache how: from the end, and what
        several slots keep last. Those that are not named follow, used longest ago first; so does a
        named one that is used or touched meanwhile. An empty list takes the order back.

        Raises:
            ValueError: a slot is open, or none of this cache; nothing has changed.
        """
        self._slots.evict_first(self._slot_array(slots))

    def sole_pages(self, slot: SlotLike) -> int:
        """Pages that come free if only this slot gives up what it keeps; 0 if it keeps nothing."""
        return self._slots.sole_pages(self._index(slot))

    # Page counts ----------------------------------------------------------------------------------

    def pages_needed_many(self, slots: SlotList, tokens: LengthList) -> int:
        """Pages out of ``pool.available_pages()`` that :meth:`ensure_many` would use up.

        Unlike :meth:`pages_needed` it counts stale pages that come back into use where they are,
        since they are available to others until then.
        """
        return self._slots.pages_needed_many(self._slot_array(slots), as_int32(tokens))

    def admission_pages(
        self,
        tokens: int,
        *,
        source: SlotLike | None = None,
        shared_tokens: int = 0,
        in_place: bool = False,
        anchor: int = 0,
        new_only: bool = False,
    ) -> int:
        """Pages out of ``pool.available_pages()`` that a sequence not yet open would use up.

        If so many are available, opening it and growing it to ``tokens`` succeeds. Pages that an
        open sequence uses already cost nothing; those that are only kept do.

        Args:
            tokens: its length once it is there.
            source: the slot that has its first tokens; None for nobody.
            shared_tokens: how many of them.
            in_place: ``source`` will be reopened, instead of forked.
            anchor: if the rest comes by :meth:`restore`, the saved sequence's.
            new_only: leave out what the source only keeps. Where that is more than
                ``pool.unkept_pages()``, somebody else's content has to go.

        Raises:
            PagesGone: the source no longer keeps those tokens.
            ValueError: lengths that do not go together.
        """
        return self._slots.admission_pages(
            token_count(tokens),
            None if source is None else self._index(source),
            token_count(shared_tokens, "shared_tokens"),
            in_place,
            token_count(anchor, "anchor"),
            new_only,
        )

    # Host memory ----------------------------------------------------------------------------------

    def anchor(self, slot: SlotLike) -> int:
        """First query of a sequence's latest step: no sliding window reaches further back.

        A sequence can be forked or cut at any length from there on.
        """
        return self._slots.anchor(self._index(slot))

    def saved_bytes(self, slot: SlotLike) -> int:
        """Host memory that :meth:`save` of a sequence takes at its present length and anchor."""
        return self._slots.saved_bytes(self._index(slot))

    def save(self, slot: SlotLike, buffer: torch.Tensor, *, stream: int | None = None) -> None:
        """Copies a sequence to host memory: the pages with tokens that later queries can reach.

        Args:
            slot: stays open; release it on the same stream.
            buffer: uint8 ``[saved_bytes(slot)]`` on the CPU, contiguous. In use until the stream
                has come so far; page-locked, or else the call may wait for the stream.
            stream: raw CUDA stream; None for torch's current one.

        Raises:
            ValueError: a buffer of another size.
        """
        address, size = _host_range(buffer)
        self._slots.copy_out(self._index(slot), address, size, self._stream(stream))

    def restore(
        self,
        slot: SlotLike,
        tokens: int,
        anchor: int,
        buffer: torch.Tensor,
        first_token: int = 0,
        *,
        stream: int | None = None,
    ) -> None:
        """Makes an open slot what the saved sequence was, mapping what is missing.

        A sequence that was marked dirty is to be marked again.

        Args:
            slot: its first ``first_token`` tokens are right already (it was forked or reopened) and
                are not written; what it holds beyond is replaced.
            tokens: the saved sequence's length.
            anchor: its :meth:`anchor`.
            buffer: what :meth:`save` filled. In use until the stream has come so far.
            first_token: at most the slot's length.
            stream: raw CUDA stream; None for torch's current one.

        Raises:
            OutOfPages: the slot is as it was, but for what it held from ``first_token`` on.
            ValueError: lengths that do not go together, or a buffer of another size.
        """
        address, size = _host_range(buffer)
        self._slots.copy_in(
            self._index(slot),
            token_count(tokens),
            token_count(anchor, "anchor"),
            address,
            size,
            token_count(first_token, "first_token"),
            self._stream(stream),
        )


def _host_range(buffer: torch.Tensor) -> tuple[int, int]:
    """Address and size of host memory."""
    if buffer.device.type != "cpu" or buffer.dtype != torch.uint8 or not buffer.is_contiguous():
        raise ValueError(
            f"a buffer of {buffer.dtype} on {buffer.device} with strides {buffer.stride()}; "
            "give a contiguous uint8 tensor on the CPU"
        )
    return buffer.data_ptr(), buffer.numel()
