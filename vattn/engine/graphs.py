"""Decode steps as CUDA graphs: one launch by the host in place of one per kernel.

A graph is captured for each :class:`Bucket` of shapes, over memory that stays where it is. A step
fills that memory by one transfer and replays the graph of its bucket. Slots never move, so pages
may be mapped, shared and taken away between two replays; everything captured that touches a slot is
a kernel, which goes by addresses. Rows that no sequence fills compute a token of a scratch slot.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from tqdm import tqdm

from vattn.attention.base import Step
from vattn.attention.flash_calls import DecodeTensors, kv_starts, slot_sizes
from vattn.attention.upload import Packing, Uploader
from vattn.engine.batch import StepBatch
from vattn.engine.buckets import Bucket, Buckets
from vattn.engine.cuda_graph import Graph, graph_maker, no_garbage_collection, run_without_waiting
from vattn.kv.cache import KVCache

_log = logging.getLogger(__name__)


class PreparesDecodes(Protocol):
    """A backend whose decodes can be captured; its ``graphs`` is true."""

    def prepare_decode(self, step: Step, tensors: DecodeTensors) -> None:
        """Prepares a step of decodes over memory that is filled in later, without a transfer."""
        ...


# Computes a prepared step: takes it, token ids and positions, int64 ``[T]``, and which of the T
# tokens' logits are wanted, int64 ``[R]``; gives them, ``[R, vocab_size]``.
Compute = Callable[[Step, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def can_capture(device: torch.device) -> bool:
    """Whether a device has graphs."""
    return device.type == "cuda"


class _Inputs(NamedTuple):
    """A step of some number of rows, in the memory that :meth:`DecodeGraphs._fill` writes.

    Args:
        ids: int64 ``[rows]``, negative for the token sampled last.
        tensors: what the backend needs.
    """

    ids: torch.Tensor
    tensors: DecodeTensors


class DecodeGraphs:
    """Graphs of decode steps, and the memory that they work on.

    Args:
        compute: one forward pass.
        cache: whose slots the steps read and write.
        backend: prepares them.
        upload: to the cache's device.
        buckets: what to capture.
        scratch_slot: an open slot with a token that nobody needs.
        last_tokens: int64 ``[slots]`` on the device, the token sampled last for each slot; read in
            place of negative token ids.
        vocab_size: width of the logits.

    Attributes:
        replayed: steps that were run.
        padded_rows: rows of theirs that no sequence filled.
    """

    def __init__(
        self,
        compute: Compute,
        cache: KVCache,
        backend: PreparesDecodes,
        upload: Uploader,
        buckets: Buckets,
        scratch_slot: int,
        last_tokens: torch.Tensor,
        vocab_size: int,
    ) -> None:
        self.buckets = buckets
        self.replayed = self.padded_rows = 0
        self._compute = compute
        self._cache = cache
        self._backend = backend
        self._upload = upload
        self._scratch = scratch_slot
        self._last_tokens = last_tokens
        self._sizes = slot_sizes(cache.layout)
        self._graphs: dict[Bucket, tuple[Graph, torch.Tensor]] = {}  # with the slots of its rows
        rows, device = buckets.sizes[-1], cache.device
        self._memory = torch.zeros(
            self._packing(rows).total_bytes, dtype=torch.uint8, device=device
        )
        self._rows = torch.arange(rows, device=device)
        self._query_starts = torch.arange(rows + 1, dtype=torch.int32, device=device)
        # One for all graphs: results of their own would be gigabytes together.
        self._logits = torch.empty(rows, vocab_size, dtype=torch.float32, device=device)

    @property
    def captured(self) -> int:
        """How many graphs there are."""
        return len(self._graphs)

    # A step ---------------------------------------------------------------------------------------

    def bucket(self, batch: StepBatch) -> Bucket | None:
        """Which graph can compute a step; None if none of them can."""
        n = len(batch.slots)
        if not self._graphs or n == 0 or not batch.decodes_only or len(batch.logit_rows) != n:
            return None
        return self.buckets.find(n, int(batch.kv_lens.max()))

    def run(self, batch: StepBatch, bucket: Bucket) -> tuple[torch.Tensor, torch.Tensor]:
        """One step by one transfer and one launch.

        Args:
            batch: of decodes.
            bucket: as :meth:`bucket` says.

        Returns:
            Logits, float32 ``[R, vocab_size]``, and the slots of their sequences, int64 ``[R]``; on
            the device, until the next step is launched.
        """
        n = len(batch.slots)
        graph, slots = self._graphs[bucket]
        self._fill(batch, bucket.rows)
        graph.replay()
        self.replayed += 1
        self.padded_rows += bucket.rows - n
        return self._logits[:n], slots[:n]

    def _fill(self, batch: StepBatch, rows: int) -> None:
        self._upload.into(self._memory, *self._arrays(batch, rows))

    def _arrays(self, batch: StepBatch, rows: int) -> list[Any]:
        """What a graph of so many rows is told about a step, as :meth:`_inputs` reads it."""
        more = rows - len(batch.slots)
        slots = _pad(batch.slots, more, self._scratch)
        kv_lens = _pad(batch.kv_lens, more, 1)
        past_lens = kv_lens - np.int32(1)
        return [
            _pad(batch.input_ids, more, 0),
            past_lens.astype(np.int64),
            slots.astype(np.int64),
            slots,
            kv_lens,
            past_lens,
            *(kv_starts(slots, kv_lens, size) for size in self._sizes),
        ]

    def _packing(self, rows: int) -> Packing:
        return Packing.of(self._arrays(self._padding(rows), rows))

    def _padding(self, rows: int) -> StepBatch:
        """A step of nothing but padding: the scratch slot's first token, again and again."""
        ones = np.ones(rows, np.int32)
        slots = np.full(rows, self._scratch, np.int32)
        return StepBatch(
            slots=slots,
            query_lens=ones,
            kv_lens=ones,
            num_decodes=rows,
            input_ids=np.zeros(rows, np.int64),
            logit_rows=np.arange(rows),
            sample_slots=slots.astype(np.int64),
        )

    # Capture --------------------------------------------------------------------------------------

    def capture(self, *, show_progress: bool = False) -> None:
        """Captures all buckets, each after a run as warm-up.

        A model whose forward pass cannot be captured, for instance because it asks the device for a
        number, is served without graphs: a warning tells, and there are none afterwards.

        Raises:
            torch.OutOfMemoryError: graphs and the memory that they share do not fit.
            RuntimeError: the device has failed.
        """
        make_graph = graph_maker(self._cache.device)
        bar = tqdm(
            self.buckets,
            total=len(self.buckets),
            desc="Capturing CUDA graphs",
            unit="graph",
            disable=not show_progress,
        )
        with bar, no_garbage_collection():
            for bucket in bar:
                try:
                    self._capture(bucket, make_graph())
                except _CannotCaptureError as error:
                    self._graphs.clear()
                    _log.warning("%s", error)
                    return

    @torch.inference_mode()
    def _capture(self, bucket: Bucket, graph: Graph) -> None:
        inputs = self._inputs(bucket)

        def work() -> None:
            self._launch(bucket, inputs)

        self._fill(self._padding(bucket.rows), bucket.rows)
        try:
            work()  # what is made on first use, from workspaces to compiled code, is made now
            if not self._graphs:
                run_without_waiting(work, self._cache.device)
            graph.capture(work)
        except torch.OutOfMemoryError as error:
            error.add_note(_TOO_LARGE)
            raise
        except RuntimeError as error:
            if "out of memory" in str(error):  # of CUDA itself, for the graph
                error.add_note(_TOO_LARGE)
                raise
            work()  # fails as well if the reason is not the capture
            self._logits[0, 0].item()
            raise _CannotCaptureError(
                "decode steps run without CUDA graphs, kernel by kernel: the model's forward pass "
                f"cannot be captured ({error}). With enforce_eager=True it is not tried."
            ) from error
        self._graphs[bucket] = graph, inputs.tensors.write_slots

    def _inputs(self, bucket: Bucket) -> _Inputs:
        """Where :meth:`_fill` puts a step of this many rows."""
        views = self._packing(bucket.rows).views(self._memory)
        ids, positions, write_slots, slots, kv_lens, past_lens, *begins = views
        tensors = DecodeTensors(
            slots=slots,
            kv_lens=kv_lens,
            past_lens=past_lens,
            kv_starts=dict(zip(self._sizes, begins, strict=True)),
            query_starts=self._query_starts[: bucket.rows + 1],
            write_slots=write_slots,
            positions=positions,
            longest_kv=bucket.longest,
        )
        return _Inputs(ids, tensors)

    def _launch(self, bucket: Bucket, inputs: _Inputs) -> None:
        """A step over whatever the inputs hold; what is captured."""
        ids, tensors = inputs
        batch = self._padding(bucket.rows)
        step = Step(
            self._cache, batch.slots, batch.query_lens, batch.kv_lens, bucket.rows, self._upload
        )
        self._backend.prepare_decode(step, tensors)
        ids = replace_sampled(ids, tensors.write_slots, self._last_tokens)
        logits = self._compute(step, ids, tensors.positions, self._rows[: bucket.rows])
        self._logits[: bucket.rows].copy_(logits)


class _CannotCaptureError(RuntimeError):
    """A forward pass that works and cannot be captured."""


_TOO_LARGE = (
    "CUDA graphs and the memory that they share do not fit: give smaller cudagraph_capture_sizes, "
    "a smaller max_num_seqs or KV cache, or enforce_eager=True."
)


def replace_sampled(
    ids: torch.Tensor, slots: torch.Tensor, last_tokens: torch.Tensor
) -> torch.Tensor:
    """Token ids with the one sampled last for its slot in place of each negative one.

    Args:
        ids: int64 ``[T]``.
        slots: int64 ``[T]``, the slot of each.
        last_tokens: int64 ``[slots]``.
    """
    return torch.where(ids < 0, last_tokens.index_select(0, slots), ids)


def _pad(array: Any, more: int, value: int) -> Any:
    """A copy with ``more`` times a value at the end."""
    out = np.full(len(array) + more, value, array.dtype)
    out[: len(array)] = array
    return out
