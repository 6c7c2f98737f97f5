"""The engine's figures for Prometheus: from the latest it told, counters over all its processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from operator import attrgetter

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from vattn.async_llm import AsyncLLM
from vattn.engine_process.messages import Stats
from vattn.server.histograms import STEP_TOKENS, CountedHistogram

LABELS = ("model_name", "engine")
ENGINE = "0"  # there is one; vLLM numbers those that share the work
Values = dict[str, float]  # by the value of a family's own label; "" where it has none


@dataclass(frozen=True)
class Figure:
    """A family of metrics: its name, what it tells, and where its values are."""

    name: str
    help: str
    read: Callable[[Stats], Values]
    label: str = ""


_CONFIG = (
    "page_bytes",
    "slots",
    "slot_pages",
    "max_model_len",
    "max_num_seqs",
    "max_num_batched_tokens",
    "enable_prefix_caching",
    "scheduling_policy",
    "attention_backend",
    "dtype",
    "device",
)


def page_states(stats: Stats) -> dict[str, int]:
    """Bytes of all pages by state; each page counts once."""
    cache = stats.cache
    return {
        "live": cache.live_bytes - cache.shared_bytes,
        "shared": cache.shared_bytes,
        "cover": cache.cover_bytes,
        "kept": cache.kept_bytes,
        "stale": cache.stale_bytes - cache.kept_bytes,
        "scratch": cache.scratch_bytes,
        "pooled": cache.pooled_bytes,
    }


def _at(name: str, path: str, text: str) -> Figure:
    """A figure without a label of its own, at a path from :class:`Stats`."""
    read = attrgetter(path)
    return Figure(name, text, lambda stats: {"": read(stats)})


def _usage(stats: Stats) -> Values:
    cache = stats.cache
    used = cache.live_bytes + cache.cover_bytes + cache.scratch_bytes
    return {"": used / cache.budget_bytes if cache.budget_bytes else 0.0}


def _pages(stats: Stats) -> Values:
    size = stats.cache.page_bytes
    return {state: held // size for state, held in page_states(stats).items()}


def _memory(stats: Stats) -> Values:
    return dict(page_states(stats))


def _created(stats: Stats) -> Values:
    return {"": stats.pool.get("created_bytes", 0)}


def _pages_created(stats: Stats) -> Values:
    return {"": stats.pool.get("pages_created_total", 0)}


def _returned(stats: Stats) -> Values:
    return {"": stats.pool.get("pages_destroyed_total", 0) * stats.cache.page_bytes}


def _computed_tokens(stats: Stats) -> int:
    return stats.engine.prompt_tokens + stats.engine.generation_tokens


def _accepted(stats: Stats) -> Values:
    accepted = stats.engine.spec_decode_num_accepted_tokens_per_pos
    return {str(position): count for position, count in enumerate(accepted)}


def _driver_calls(stats: Stats) -> Values:
    return {kind: calls for kind, (calls, _) in stats.driver_calls.items()}


def _driver_seconds(stats: Stats) -> Values:
    return {kind: seconds for kind, (_, seconds) in stats.driver_calls.items()}


GAUGES = (
    _at("num_requests_running", "engine.num_running", "Samples in the engine's batches."),
    _at("num_requests_waiting", "engine.num_waiting", "Samples that wait for a place in them."),
    Figure("kv_cache_usage_perc", "Share of the budget in use by sequences, 0 to 1.", _usage),
    Figure("pages", "Physical pages by what they are for; each counts once.", _pages, "state"),
    Figure("page_memory_bytes", "Bytes of these pages.", _memory, "state"),
    _at("page_bytes", "cache.page_bytes", "Size of a physical page."),
    _at("budget_bytes", "cache.budget_bytes", "Most physical memory that the pool may take."),
    Figure("created_bytes", "Physical memory that exists, whoever uses it.", _created),
    _at("reserved_bytes", "cache.reserved_bytes", "Reserved addresses; no memory by themselves."),
    _at("token_bytes", "cache.token_bytes", "K and V of the tokens of running sequences."),
    _at("kept_slots", "cache.kept_slots", "Free slots that remember tokens."),
    _at("swap_used_bytes", "engine.swap_used_bytes", "Host memory of preempted sequences."),
)

_SPEC = "spec_decode_num"
COUNTERS = (
    _at("prompt_tokens", "engine.prefix_cache_queries", "Of prompts taken in, cached ones too."),
    _at("prompt_tokens_cached", "engine.prefix_cache_hits", "Of these, found in the cache."),
    _at("generation_tokens", "engine.generation_tokens", "Tokens generated."),
    _at("prefix_cache_queries", "engine.prefix_cache_queries", "Prompt tokens looked up."),
    _at("prefix_cache_hits", "engine.prefix_cache_hits", "Prompt tokens found in the cache."),
    _at("num_preemptions", "engine.num_preemptions", "Samples that lost their place."),
    _at(f"{_SPEC}_drafts", f"engine.{_SPEC}_drafts", "Drafts that were verified."),
    _at(f"{_SPEC}_draft_tokens", f"engine.{_SPEC}_draft_tokens", "Tokens of these drafts."),
    _at(f"{_SPEC}_accepted_tokens", f"engine.{_SPEC}_accepted_tokens", "Of these, in outputs."),
    Figure(f"{_SPEC}_accepted_tokens_per_pos", "By place in a draft.", _accepted, "position"),
    _at("engine_steps", "engine.num_steps", "Steps of the engine."),
    _at("engine_graph_steps", "engine.steps_by_graph", "Steps that were one CUDA graph."),
    _at("engine_prompt_tokens", "engine.prompt_tokens", "Prompt tokens computed, not cached."),
    _at("pages_mapped", "cache.pages_mapped", "Pages mapped by the driver for growing sequences."),
    _at("remaps_avoided", "cache.pages_adopted", "Pages adopted where they were mapped already."),
    _at("pages_aliased", "cache.pages_aliased", "Pages mapped at one more address, to be shared."),
    _at(
        "pages_recycled",
        "cache.pages_recycled",
        "Pages behind a sliding window, moved to its front.",
    ),
    _at("pages_reclaimed", "cache.pages_reclaimed", "Stale pages taken back for others."),
    Figure("pages_created", "Pages created.", _pages_created),
    Figure("bytes_returned", "Memory that went back to the device.", _returned),
    _at("copied_bytes", "cache.copied_bytes", "K and V copied by forks, reorders and swapping."),
    _at("evicted_tokens", "cache.evicted_tokens", "Kept tokens lost to others."),
    _at("requests_reopened", "engine.requests_reopened", "Samples that went on in a kept slot."),
    _at("requests_forked", "engine.requests_forked", "Samples that share another's pages."),
    _at("requests_swapped_out", "engine.requests_swapped_out", "Samples moved to host memory."),
    _at("requests_swapped_in", "engine.requests_swapped_in", "Samples that came back from there."),
    Figure("driver_calls", "Calls of the driver, by kind.", _driver_calls, "call"),
    Figure("driver_seconds", "Time in calls of the driver.", _driver_seconds, "call"),
)


class EngineFigures(Collector):
    """Collects the engine's figures.

    A new engine process counts from zero; its counters are added to those of the processes before
    it, as they were when they were last looked at.

    Args:
        llm: the engine.
        model_name: for the label.
    """

    def __init__(self, llm: AsyncLLM, model_name: str) -> None:
        self._llm = llm
        self._labels = (model_name, ENGINE)
        self._latest: Stats | None = None
        self._restarts = 0
        self._ended: dict[str, Values] = {}  # of processes that have ended, by counter
        self._step_tokens = CountedHistogram(
            "vattn:iteration_tokens_total",
            "Tokens of a step of the engine, as a mean over the steps of a quarter of a second.",
            STEP_TOKENS,
            {"model_name": model_name, "engine": ENGINE},
        )

    def look(self) -> None:
        """Takes the latest figures in; costs nothing where they are known."""
        stats = self._llm.stats()
        if stats is None or stats is self._latest:
            return
        before = self._latest
        if before is not None and self._restarts != self._llm.restarts:
            for counter in COUNTERS:
                self._ended[counter.name] = self._total(counter)
            before = None
        steps = stats.engine.num_steps - (before.engine.num_steps if before else 0)
        if steps:
            tokens = _computed_tokens(stats) - (_computed_tokens(before) if before else 0)
            self._step_tokens.observe(tokens / steps, steps)
        self._latest = stats
        self._restarts = self._llm.restarts

    def totals(self) -> dict[str, Values]:
        """All counters by name, over all processes; empty before the first figures."""
        self.look()
        return {counter.name: self._total(counter) for counter in COUNTERS} if self._latest else {}

    def collect(self) -> Iterator[Metric]:
        """Families of this moment. Gauges are 0 while there is no engine process."""
        self.look()
        up = self._llm.is_ready
        yield self._family(GaugeMetricFamily, "engine_up", "Whether it serves.", {"": float(up)})
        yield self._family(
            CounterMetricFamily,
            "engine_restarts",
            "Engine processes that were replaced by another.",
            {"": float(self._llm.restarts)},
        )
        if self._latest is None:
            return
        yield self._config()
        yield from self._step_tokens.collect()
        for gauge in GAUGES:
            values = gauge.read(self._latest)
            shown = values if up else dict.fromkeys(values, 0.0)
            yield self._family(GaugeMetricFamily, gauge.name, gauge.help, shown, gauge.label)
        for counter in COUNTERS:
            total = self._total(counter)
            yield self._family(
                CounterMetricFamily, counter.name, counter.help, total, counter.label
            )

    def _config(self) -> Metric:
        """The settings that say how much there is, as labels of a 1."""
        facts = self._llm.facts
        labels = dict(zip(LABELS, self._labels, strict=True))
        labels |= {name: str(getattr(facts, name)) for name in _CONFIG}
        text = "The cache's settings, as labels."
        family = GaugeMetricFamily("vattn:cache_config_info", text, labels=tuple(labels))
        family.add_metric(tuple(labels.values()), 1.0)
        return family

    def _total(self, counter: Figure) -> Values:
        assert self._latest is not None
        total = dict(self._ended.get(counter.name, {}))
        for value, count in counter.read(self._latest).items():
            total[value] = total.get(value, 0) + count
        return total

    def _family(
        self,
        kind: type[GaugeMetricFamily | CounterMetricFamily],
        name: str,
        text: str,
        values: Values,
        label: str = "",
    ) -> Metric:
        labels = (*LABELS, label) if label else LABELS
        family = kind(f"vattn:{name}", text, labels=labels)
        for value, count in values.items():
            family.add_metric((*self._labels, value) if label else self._labels, count)
        return family
