"""Requests as the server's process sees them: one on its way, and what all of them came to."""

from __future__ import annotations

import time
from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram

from vattn.outputs import CompletionOutput, RequestOutput
from vattn.request import FinishReason
from vattn.sampling_params import RequestOutputKind, SamplingParams
from vattn.server import histograms
from vattn.server.engine_figures import EngineFigures
from vattn.server.histograms import CountedHistogram, token_buckets
from vattn.server.recent import Recent

LATENCIES = ("time_to_first_token", "inter_token", "end_to_end")


class RequestFigures:
    """Counters and histograms of requests; tokens are counted by the engine.

    What is of a whole request has one value for each that came to its end, and none for those that
    were given up: the engine tells no times of these.

    Args:
        max_model_len: where buckets of token counts end.
        labels: name to value, of all metrics here.
        registry: to be part of.
    """

    def __init__(
        self, max_model_len: int, labels: dict[str, str], registry: CollectorRegistry
    ) -> None:
        self._labels = labels
        self._registry = registry
        tokens = token_buckets(max_model_len)
        seconds = histograms.REQUEST_S

        ended = Counter(
            "vattn:request_success",
            "Requests that ended, by how.",
            (*labels, "finished_reason"),
            registry=registry,
        )
        self.ended = {
            reason.value: ended.labels(**labels, finished_reason=reason.value)
            for reason in FinishReason
        }

        self.prompt = self._histogram("request_prompt_tokens", "Prompt tokens.", tokens)
        self.computed = self._histogram(
            "request_prefill_kv_computed_tokens", "Prompt tokens not found in the cache.", tokens
        )
        self.generated = self._histogram(
            "request_generation_tokens", "Tokens generated, of all samples.", tokens
        )
        self.longest = self._histogram(
            "request_max_num_generation_tokens", "Tokens of the longest sample.", tokens
        )
        self.n = self._histogram("request_params_n", "Samples asked for.", histograms.SAMPLES)
        self.max_tokens = self._histogram(
            "request_params_max_tokens", "Most tokens asked for, of a sample.", tokens
        )

        self.first_token_s = self._histogram(
            "time_to_first_token_seconds",
            "From a request's arrival to its first token.",
            histograms.FIRST_TOKEN_S,
        )
        self.token_s = CountedHistogram(
            "vattn:inter_token_latency_seconds",
            "Between a sample's tokens; several that come at once share the time before them.",
            histograms.TOKEN_S,
            labels,
        )
        registry.register(self.token_s)
        self.per_token_s = self._histogram(
            "request_time_per_output_token_seconds",
            "Decoding time for each token after the first, of a request with two or more.",
            histograms.TOKEN_S,
        )
        self.whole_s = self._histogram(
            "e2e_request_latency_seconds", "From a request's arrival to its end.", seconds
        )
        self.queue_s = self._histogram(
            "request_queue_time_seconds", "From arrival to the first step.", seconds
        )
        self.inference_s = self._histogram(
            "request_inference_time_seconds", "From the first step to the last token.", seconds
        )
        self.prefill_s = self._histogram(
            "request_prefill_time_seconds", "From the first step to the first token.", seconds
        )
        self.decode_s = self._histogram(
            "request_decode_time_seconds", "From the first token to the last.", seconds
        )

        # For the live page.
        self.ended_count = 0
        self.recent = {name: Recent() for name in LATENCIES}

    def _histogram(self, name: str, text: str, buckets: Sequence[float]) -> Histogram:
        histogram = Histogram(
            f"vattn:{name}", text, tuple(self._labels), registry=self._registry, buckets=buckets
        )
        return histogram.labels(**self._labels)


class RequestRecord:
    """One prompt on its way; made by ``ServerMetrics.begin``. For one event loop."""

    def __init__(
        self,
        figures: RequestFigures,
        engine: EngineFigures,
        params: SamplingParams,
        only_prompt: bool = False,
    ) -> None:
        self._figures = figures
        self._engine = engine
        self._params = params
        self._only_prompt = only_prompt
        self._is_delta = params.output_kind is RequestOutputKind.DELTA
        self._is_stream = params.output_kind is not RequestOutputKind.FINAL_ONLY
        self._begun_s = time.monotonic()
        self._tokens: dict[int, int] = {}  # of each sample
        self._latest_s: dict[int, float] = {}  # when a sample's latest tokens came
        self._last: RequestOutput | None = None
        self._reason: str | None = None  # how the first sample ended
        self._is_over = False
        engine.look()

    def output(self, output: RequestOutput) -> None:
        """Counts what came; call it for each output, as it comes. Takes a few microseconds."""
        now_s = time.monotonic()
        self._last = output
        for sample in output.outputs:
            held = self._tokens.get(sample.index, 0)
            new = len(sample.token_ids) - (0 if self._is_delta else held)
            if new > 0:
                self._new_tokens(sample, new, now_s)
            if sample.finish_reason is not None and sample.index == 0:
                self._reason = sample.finish_reason

    def end(self, reason: str | None = None) -> None:
        """The request is over; the first call counts, more of them are nothing.

        Args:
            reason: a :class:`vattn.request.FinishReason`, ``"abort"`` and ``"error"`` for ends
                that outputs do not tell. None for what they tell: the first sample's
                ``finish_reason``, or ``"abort"`` if it has none.
        """
        if self._is_over:
            return
        self._is_over = True
        self._engine.look()
        figures = self._figures
        figures.ended[reason or self._reason or FinishReason.ABORT.value].inc()
        figures.ended_count += 1
        if self._last is not None and self._last.finished:
            self._tell_whole(self._last)

    def drop(self) -> None:
        """It was refused before it began (RequestRefused): nothing of it is counted."""
        self._is_over = True

    def _new_tokens(self, sample: CompletionOutput, new: int, now_s: float) -> None:
        figures, index = self._figures, sample.index
        is_first = not self._tokens
        held = self._tokens.get(index, 0)
        self._tokens[index] = held + new
        if not self._is_stream:
            self._spread(new, now_s, is_first)
            return
        if is_first:
            self._first_token(now_s - self._begun_s, now_s)
        gaps = new if held else new - 1
        if gaps:
            seconds = (now_s - self._latest_s[index]) / gaps if held else 0.0
            figures.token_s.observe(seconds, gaps)
            figures.recent["inter_token"].add(now_s, seconds, gaps)
        self._latest_s[index] = now_s

    def _spread(self, new: int, now_s: float, is_first: bool) -> None:
        """All tokens of a sample in one output; when they were made is known of sample 0 only."""
        assert self._last is not None
        timings = self._last.metrics
        if not timings.first_token_s:
            return
        if is_first:
            self._first_token(max(0.0, timings.first_token_s - self._begun_s), now_s)
        if new > 1:
            seconds = max(0.0, timings.last_token_s - timings.first_token_s) / (new - 1)
            self._figures.token_s.observe(seconds, new - 1)
            self._figures.recent["inter_token"].add(now_s, seconds, new - 1)

    def _first_token(self, seconds: float, now_s: float) -> None:
        self._figures.first_token_s.observe(seconds)
        self._figures.recent["time_to_first_token"].add(now_s, seconds)

    def _tell_whole(self, output: RequestOutput) -> None:
        figures, params = self._figures, self._params
        now_s = time.monotonic()
        figures.whole_s.observe(now_s - self._begun_s)
        figures.recent["end_to_end"].add(now_s, now_s - self._begun_s)
        figures.prompt.observe(len(output.prompt_token_ids))
        figures.computed.observe(len(output.prompt_token_ids) - output.num_cached_tokens)
        figures.generated.observe(0 if self._only_prompt else sum(self._tokens.values()))
        figures.longest.observe(0 if self._only_prompt else max(self._tokens.values(), default=0))
        figures.n.observe(params.n)
        if params.max_tokens is not None:
            figures.max_tokens.observe(0 if self._only_prompt else params.max_tokens)
        at = output.metrics
        # What it did not come to, as a deadline may pass in the queue, took no time.
        begun_s = at.scheduled_s or at.finished_s
        first_s = at.first_token_s or at.finished_s
        last_s = at.last_token_s or at.finished_s
        figures.queue_s.observe(max(0.0, begun_s - at.arrival_s))
        figures.prefill_s.observe(max(0.0, first_s - begun_s))
        figures.decode_s.observe(max(0.0, last_s - first_s))
        figures.inference_s.observe(max(0.0, last_s - begun_s))
        if self._tokens.get(0, 0) > 1:
            per_token_s = (at.last_token_s - at.first_token_s) / (self._tokens[0] - 1)
            figures.per_token_s.observe(max(0.0, per_token_s))
