"""Runs a model over one packed step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch

from vattn.attention.base import AttentionSpec, Backend, Step
from vattn.attention.upload import Uploader
from vattn.engine.batch import StepBatch
from vattn.engine.buckets import Buckets, full_rows
from vattn.engine.graphs import DecodeGraphs, PreparesDecodes, replace_sampled
from vattn.hf.attention import answered_by
from vattn.hf.model import LoadedModel
from vattn.kv.cache import KVCache


@dataclass(frozen=True)
class GraphStats:
    """What a runner has done by CUDA graphs and what not.

    ``captured`` graphs there are; ``replayed`` steps were launched as one, with ``padded_rows``
    rows in all that no sequence filled; ``eager`` steps were launched kernel by kernel.
    """

    captured: int
    replayed: int
    eager: int
    padded_rows: int


class ModelRunner:
    """Makes one ``[1, T]`` batch of a step's tokens and takes the logits that are asked for.

    Args:
        loaded: the model.
        cache: made from its ``layer_specs()``, on its device.
        backend: that can serve its ``specs``.
        max_num_seqs: most sequences of a step; with graphs only.
        max_model_len: longest sequence in tokens; with graphs only.
        scratch_slot: an open slot of the cache with one token; with graphs only.
        capture_sizes: numbers of decodes to capture graphs for; None for a table.
        graphs: decode steps run as CUDA graphs, once :meth:`capture` was called.
        forward: what computes a forward pass; None for the model as it is.

    Raises:
        ValueError: a cache for another model, or settings of graphs that are missing or cannot be.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        cache: KVCache,
        backend: Backend,
        *,
        max_num_seqs: int | None = None,
        max_model_len: int | None = None,
        scratch_slot: int | None = None,
        capture_sizes: Sequence[int] | None = None,
        graphs: bool = False,
        forward: Callable[..., Any] | None = None,
    ) -> None:
        if list(cache.specs) != loaded.layer_specs():
            raise ValueError(
                f"the cache is of {len(cache.specs)} layers that are not this model's "
                f"{len(loaded.specs)}; make it from loaded.layer_specs()"
            )
        self._loaded = loaded
        self._cache = cache
        self._backend = backend
        self._model = loaded.model if forward is None else forward
        self._upload = Uploader(cache.device)
        self._last_tokens = torch.zeros(cache.max_seqs, dtype=torch.int64, device=cache.device)
        self._eager_steps = 0
        # The batch that ran last, and the slots to remember its tokens under, on the device.
        self._sampling: tuple[StepBatch, torch.Tensor] | None = None
        self._graphs: DecodeGraphs | None = None
        if not graphs:
            return
        if not backend.graphs:
            raise ValueError(f"decodes of the backend {backend.name} cannot be captured")
        if max_num_seqs is None or max_model_len is None or scratch_slot is None:
            raise ValueError("graphs need max_num_seqs, max_model_len and a scratch_slot")
        self._graphs = DecodeGraphs(
            self._compute,
            cache,
            cast(PreparesDecodes, backend),
            self._upload,
            Buckets(
                max_num_seqs, max_model_len, capture_sizes, full_rows=_full_rows(loaded, cache)
            ),
            scratch_slot,
            self._last_tokens,
            loaded.vocab_size,
        )

    def capture(self, *, show_progress: bool = False) -> None:
        """Captures the graphs of decode steps, if it was made with graphs.

        Takes seconds to minutes, and must have been called for graphs to be used. A model that
        cannot be captured runs without them; a warning tells.

        Args:
            show_progress: with a progress bar.

        Raises:
            torch.OutOfMemoryError: they do not fit beside the model.
        """
        if self._graphs is not None:
            self._graphs.capture(show_progress=show_progress)

    @property
    def graph_stats(self) -> GraphStats:
        """Figures since it was made."""
        graphs = self._graphs
        if graphs is None:
            return GraphStats(0, 0, self._eager_steps, 0)
        return GraphStats(graphs.captured, graphs.replayed, self._eager_steps, graphs.padded_rows)

    @torch.inference_mode()
    def run(self, batch: StepBatch) -> torch.Tensor:
        """One forward pass; writes the K and V of its tokens. Does not wait for the device.

        Args:
            batch: the step. Nobody changes its arrays afterwards.

        Returns:
            Logits, float32 ``[R, vocab_size]`` on the device. They may be written to, and are
            overwritten by the next step.
        """
        self._sampling = None
        graphs = self._graphs
        bucket = None if graphs is None else graphs.bucket(batch)
        if graphs is None or bucket is None:
            return self._run_eagerly(batch)
        logits, slots = graphs.run(batch, bucket)
        self._sampling = batch, slots
        return logits

    @torch.inference_mode()
    def remember(self, batch: StepBatch, token_ids: torch.Tensor) -> None:
        """Keeps the tokens sampled after a step, for steps that have not seen them yet.

        Args:
            batch: of the latest :meth:`run`.
            token_ids: int64 ``[R]`` on the device.

        Raises:
            ValueError: another step ran since.
        """
        if self._sampling is None or self._sampling[0] is not batch:
            raise ValueError("the tokens are of another step than the one that ran last")
        self._last_tokens.index_copy_(0, self._sampling[1], token_ids)

    def _run_eagerly(self, batch: StepBatch) -> torch.Tensor:
        self._eager_steps += 1
        step = Step(
            self._cache,
            batch.slots,
            batch.query_lens,
            batch.kv_lens,
            batch.num_decodes,
            self._upload,
        )
        self._backend.prepare(step, self._loaded.specs)
        arrays = [batch.input_ids, step.positions(), batch.logit_rows, batch.sample_slots]
        some_sampled = bool((batch.input_ids < 0).any())
        if some_sampled:
            arrays.append(np.repeat(batch.slots, batch.query_lens).astype(np.int64))
        ids, positions, rows, sample_slots, *token_slots = self._upload(*arrays)
        if some_sampled:
            ids = replace_sampled(ids, token_slots[0], self._last_tokens)
        logits = self._compute(step, ids, positions, rows).float()
        self._sampling = batch, sample_slots
        return logits

    def _compute(
        self, step: Step, ids: torch.Tensor, positions: torch.Tensor, rows: torch.Tensor
    ) -> torch.Tensor:
        """Logits ``[R, vocab_size]`` of a prepared step, in the model's dtype."""
        keeps = self._loaded.keeps_logits
        options: dict[str, Any] = {"logits_to_keep": rows} if keeps else {}
        layers = _Layers(self._loaded, self._backend, step)
        with answered_by(layers):
            out = self._model(
                input_ids=ids[None], position_ids=positions[None], use_cache=False, **options
            )
        if layers.calls != len(self._loaded.specs):
            raise RuntimeError(
                f"{layers.calls} of the model's {len(self._loaded.specs)} layers used this "
                "engine's attention: somebody has changed the model since; make a new LLM"
            )
        logits: torch.Tensor = out.logits[0]
        return logits if keeps else logits[rows]


def _full_rows(loaded: LoadedModel, cache: KVCache) -> int | None:
    """From how many decodes on no layer's attention is split over the device."""
    if cache.device.type != "cuda":
        return None
    properties = torch.cuda.get_device_properties(cache.device)
    return full_rows(min(s.kv_heads for s in loaded.specs), properties.multi_processor_count)


class _Layers:
    """Answers the attention of the model's layers during one step."""

    def __init__(self, loaded: LoadedModel, backend: Backend, step: Step) -> None:
        self._layer_of = loaded.layer_of
        self._specs: list[AttentionSpec] = loaded.specs
        self._forward = backend.forward
        self._step = step
        self.calls = 0

    def attend(
        self,
        layer_idx: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """See :class:`vattn.hf.attention.LayerCalls`."""
        self.calls += 1
        layer = self._layer_of[layer_idx]
        out = self._forward(
            layer,
            self._specs[layer],
            query.transpose(1, 2)[0],
            key.transpose(1, 2)[0],
            value.transpose(1, 2)[0],
            self._step,
            sinks,
        )
        return out[None]
