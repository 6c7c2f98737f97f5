"""`/metrics`: names and buckets of vLLM's, counts that are exact, and new engine processes."""

from __future__ import annotations

import asyncio
import re
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import httpx
import pytest
from prometheus_client.openmetrics.parser import (
    text_string_to_metric_families as parse_openmetrics,
)
from prometheus_client.parser import text_string_to_metric_families as parse_text

from tests.server_figures import FACTS, FakeLLM, output, stats
from vattn.async_llm import AsyncLLM
from vattn.outputs import Timings
from vattn.sampling_params import RequestOutputKind, SamplingParams
from vattn.server.app import build_app
from vattn.server.errors import ApiError
from vattn.server.histograms import CountedHistogram, token_buckets
from vattn.server.metrics import ServerMetrics
from vattn.server.openai.run import Job, _outputs
from vattn.server.recent import WINDOW_S, Recent
from vattn.server.settings import ServerSettings

if TYPE_CHECKING:
    from tests.server_fixtures import RunningServer

pytest_plugins = ["tests.server_fixtures"]

DOCS = Path(__file__).parents[1] / "docs" / "serving.md"
Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def metrics_of(llm: FakeLLM) -> ServerMetrics:
    return ServerMetrics(cast(AsyncLLM, llm), ServerSettings())


def value(metrics: ServerMetrics, name: str, **labels: str) -> float:
    """A sample by its name without the prefix, of the one engine."""
    common = {"model_name": "embedded", "engine": "0"}
    found = metrics.ready_registry().get_sample_value(f"vattn:{name}", common | labels)
    assert found is not None, name
    return found


def parsed(text: str) -> Samples:
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in parse_text(text)
        for sample in family.samples
    }


def scrape(server: RunningServer) -> Samples:
    with server.http_client() as client:
        response = client.get("/metrics")
    assert response.status_code == 200
    return parsed(response.text)


def growth(before: Samples, after: Samples, name: str, **labels: str) -> float:
    known = {"model_name": "embedded", "engine": "0", **labels}
    key = (f"vattn:{name}", frozenset(known.items()))
    return after[key] - before[key]


# One request --------------------------------------------------------------------------------------


def test_streamed_request_is_counted_once() -> None:
    metrics = metrics_of(FakeLLM())
    record = metrics.begin(SamplingParams(max_tokens=5, output_kind=RequestOutputKind.DELTA))
    record.output(output({0: [1]}, cached=3))
    record.output(output({0: [2, 3]}, cached=3))
    timings = Timings(1.0, 1.5, 2.5, 5.5, 5.5)
    record.output(output({0: [4]}, cached=3, reason="length", timings=timings))
    record.end()
    record.end("error")

    assert value(metrics, "request_success_total", finished_reason="length") == 1
    assert value(metrics, "request_success_total", finished_reason="error") == 0
    assert value(metrics, "time_to_first_token_seconds_count") == 1
    assert value(metrics, "inter_token_latency_seconds_count") == 3
    assert value(metrics, "e2e_request_latency_seconds_count") == 1
    assert value(metrics, "request_prompt_tokens_sum") == 8
    assert value(metrics, "request_prefill_kv_computed_tokens_sum") == 5
    assert value(metrics, "request_generation_tokens_sum") == 4
    assert value(metrics, "request_params_max_tokens_sum") == 5
    assert value(metrics, "request_queue_time_seconds_sum") == 0.5
    assert value(metrics, "request_prefill_time_seconds_sum") == 1.0
    assert value(metrics, "request_decode_time_seconds_sum") == 3.0
    assert value(metrics, "request_inference_time_seconds_sum") == 4.0
    assert value(metrics, "request_time_per_output_token_seconds_sum") == 1.0


@pytest.mark.parametrize("kind", list(RequestOutputKind))
def test_every_kind_of_output_has_the_same_counts(kind: RequestOutputKind) -> None:
    metrics = metrics_of(FakeLLM())
    record = metrics.begin(SamplingParams(n=2, output_kind=kind))
    tokens: dict[int, list[int]] = {0: [], 1: []}
    for sample, token in ((0, 5), (1, 6), (0, 7), (0, 8)):
        tokens[sample].append(token)
        if kind is RequestOutputKind.DELTA:
            record.output(output({sample: [token]}))
        elif kind is RequestOutputKind.CUMULATIVE:
            record.output(output({sample: list(ids) for sample, ids in tokens.items()}))
    last = output(
        {0: [], 1: []} if kind is RequestOutputKind.DELTA else tokens,
        reason="stop",
        timings=Timings(1.0, 2.0, 3.0, 5.0, 5.0),
    )
    record.output(last)
    record.end()

    assert value(metrics, "request_generation_tokens_sum") == 4
    assert value(metrics, "request_prompt_tokens_sum") == 8
    assert value(metrics, "request_success_total", finished_reason="stop") == 1
    assert value(metrics, "time_to_first_token_seconds_count") == 1
    assert value(metrics, "inter_token_latency_seconds_count") == 2
    assert value(metrics, "request_max_num_generation_tokens_sum") == 3
    assert value(metrics, "request_params_n_sum") == 2


def test_ends_that_outputs_do_not_tell() -> None:
    metrics = metrics_of(FakeLLM())
    for reason in ("error", None):
        record = metrics.begin(SamplingParams())
        record.end(reason)
    refused = metrics.begin(SamplingParams())
    refused.drop()
    refused.end()
    assert value(metrics, "request_success_total", finished_reason="error") == 1
    assert value(metrics, "request_success_total", finished_reason="abort") == 1
    # Without a token there is no latency to tell.
    assert value(metrics, "e2e_request_latency_seconds_count") == 0


@pytest.mark.parametrize(
    "failed",
    [
        replace(output({1: []}, reason="error"), finished=False),
        RuntimeError("its tokens cannot be taken"),
    ],
)
def test_failures_are_no_aborts(failed: Any) -> None:
    """Of one of two samples, which the stream tells in an output of its own."""
    metrics = metrics_of(FakeLLM())

    async def generate(*_: object, **__: object) -> Any:
        if isinstance(failed, Exception):
            raise failed
        yield failed

    async def whole() -> None:
        state: Any = SimpleNamespace(
            metrics=metrics, llm=SimpleNamespace(generate=generate), settings=ServerSettings()
        )
        body: Any = SimpleNamespace(cache_salt=None, priority=0)
        params = SamplingParams(n=2, output_kind=RequestOutputKind.DELTA)
        job = Job(prompts=[[5]], params=params, request_id="r", arrival_s=0.0, body=body)
        with pytest.raises((ApiError, RuntimeError)):
            async for _ in _outputs(state, job, 0):
                pass

    asyncio.run(whole())
    assert value(metrics, "request_success_total", finished_reason="error") == 1
    assert value(metrics, "request_success_total", finished_reason="abort") == 0


OF_WHOLE_REQUESTS = (
    "request_prompt_tokens", "request_prefill_kv_computed_tokens", "request_generation_tokens",
    "request_max_num_generation_tokens", "request_params_n", "e2e_request_latency_seconds",
    "request_queue_time_seconds", "request_inference_time_seconds", "request_prefill_time_seconds",
    "request_decode_time_seconds",
)  # fmt: skip


def test_what_is_of_whole_requests_has_one_count() -> None:
    metrics = metrics_of(FakeLLM())
    params = SamplingParams(output_kind=RequestOutputKind.DELTA)
    left = metrics.begin(params)
    left.output(output({0: [1]}))
    left.end()
    late = metrics.begin(params)  # its time was over before it began
    late.output(output({0: []}, reason="deadline", timings=Timings(1.0, finished_s=4.0)))
    late.end()
    slow = metrics.begin(params)  # and this one's before it had a token
    slow.output(output({0: []}, reason="deadline", timings=Timings(1.0, 2.0, finished_s=4.0)))
    slow.end()
    assert {value(metrics, f"{name}_count") for name in OF_WHOLE_REQUESTS} == {2}
    assert value(metrics, "request_success_total", finished_reason="abort") == 1
    assert value(metrics, "request_queue_time_seconds_sum") == 3.0 + 1.0
    assert value(metrics, "request_prefill_time_seconds_sum") == 2.0
    assert value(metrics, "request_decode_time_seconds_sum") == 0.0


def test_token_that_nobody_wants_is_not_the_requests() -> None:
    metrics = metrics_of(FakeLLM())
    record = metrics.begin(SamplingParams(max_tokens=1), only_prompt=True)
    record.output(output({0: [5]}, reason="length", timings=Timings(1.0, 2.0, 3.0, 3.0, 3.0)))
    record.end()
    assert value(metrics, "request_generation_tokens_count") == 1
    for name in ("generation_tokens", "max_num_generation_tokens", "params_max_tokens"):
        assert value(metrics, f"request_{name}_sum") == 0


# The engine ---------------------------------------------------------------------------------------


def test_counters_survive_a_restart_of_the_engine() -> None:
    llm = FakeLLM(stats(10, tokens=40, maps=5, adopted=3))
    metrics = metrics_of(llm)
    assert value(metrics, "num_preemptions_total") == 10
    assert value(metrics, "driver_calls_total", call="map") == 5
    assert value(metrics, "iteration_tokens_total_count") == 10
    assert value(metrics, "iteration_tokens_total_sum") == 40
    assert value(metrics, "generation_tokens_total") == 40

    llm.latest, llm.is_ready = None, False
    assert value(metrics, "engine_up") == 0
    assert value(metrics, "num_requests_running") == 0
    assert value(metrics, "num_preemptions_total") == 10

    # More steps than before it: only the number of restarts tells that it is another process.
    llm.latest, llm.is_ready, llm.restarts = stats(12, tokens=13, maps=2), True, 1
    assert value(metrics, "num_preemptions_total") == 22
    assert value(metrics, "generation_tokens_total") == 53
    assert value(metrics, "prompt_tokens_total") == 220
    assert value(metrics, "prompt_tokens_cached_total") == 22
    assert value(metrics, "driver_calls_total", call="map") == 7
    assert value(metrics, "driver_calls_total", call="unmap") == 2
    assert value(metrics, "driver_seconds_total", call="map") == pytest.approx(7e-3)
    assert value(metrics, "spec_decode_num_accepted_tokens_per_pos_total", position="0") == 22
    assert value(metrics, "remaps_avoided_total") == 3
    assert value(metrics, "iteration_tokens_total_sum") == 53
    assert value(metrics, "engine_restarts_total") == 1
    llm.latest = stats(13, maps=2)
    assert value(metrics, "num_preemptions_total") == 23


def test_pages_are_in_one_state_each() -> None:
    metrics = metrics_of(FakeLLM(stats(1)))
    pages = {
        "live": 3, "shared": 1, "cover": 1, "kept": 2, "stale": 1, "scratch": 0, "pooled": 5,
    }  # fmt: skip
    for state, count in pages.items():
        assert value(metrics, "pages", state=state) == count
        assert value(metrics, "page_memory_bytes", state=state) == count * FACTS.page_bytes
    assert value(metrics, "created_bytes") == sum(pages.values()) * FACTS.page_bytes
    assert value(metrics, "bytes_returned_total") == FACTS.page_bytes
    assert value(metrics, "kv_cache_usage_perc") == 5 * FACTS.page_bytes / (1 << 20)


# Histograms and the last minute -------------------------------------------------------------------


def test_buckets() -> None:
    assert token_buckets(64) == (1, 2, 5, 10, 20, 50)
    histogram = CountedHistogram("h", "", (1.0, 2.0), {"a": "b"})
    histogram.observe(1.0, 3)
    histogram.observe(2.5)
    (family,) = histogram.collect()
    found = {(s.name, s.labels.get("le")): s.value for s in family.samples}
    assert found == {
        ("h_bucket", "1.0"): 3, ("h_bucket", "2.0"): 3, ("h_bucket", "+Inf"): 4,
        ("h_count", None): 4, ("h_sum", None): 5.5,
    }  # fmt: skip


def test_recent_percentiles_and_their_end() -> None:
    recent = Recent()
    for ms in range(1, 101):
        recent.add(1000.5, ms / 1000)
    recent.add(1010.0, 10.0, 900)
    found = recent.summary(1011.0)
    assert found["count"] == 1000
    assert found["p50"] == pytest.approx(10.0, rel=0.04)
    found = recent.summary(1011.0 + WINDOW_S - 5)
    assert found["count"] == 900
    assert recent.summary(1011.0 + WINDOW_S) == {"count": 0, "p50": None, "p90": None, "p99": None}
    for ms in range(1, 101):
        recent.add(2000.0, ms / 1000)
    found = recent.summary(2000.0)
    assert found["p50"] == pytest.approx(0.050, rel=0.04)
    assert found["p90"] == pytest.approx(0.090, rel=0.04)


# HTTP ---------------------------------------------------------------------------------------------


def test_labels_cannot_be_made_up() -> None:
    metrics = metrics_of(FakeLLM())
    assert metrics.registry.get_sample_value(
        "vattn:requests_rejected_total", {"reason": "tokens"}
    ) == 0  # fmt: skip
    metrics.http("BREW", None, 404, 0.1)
    metrics.http("GET", "/v1/models/{model}", 200, 0.1)
    metrics.rejected("queue")
    read = metrics.registry.get_sample_value
    labels = {"method": "other", "handler": "none", "status": "404"}
    assert read("vattn:http_requests_total", labels) == 1
    assert read("vattn:requests_rejected_total", {"reason": "queue"}) == 1


def test_known_requests_on_a_server(server: RunningServer) -> None:
    before = scrape(server)
    with server.client() as client:
        for stream in (False, True):
            made = client.completions.create(
                model="embedded", prompt=[5, 6, 7, 8], max_tokens=6, stream=stream, n=2,
                extra_body={"ignore_eos": True},
            )  # fmt: skip
            for _ in made if stream else ():
                pass
    server.wait_idle()
    after = scrape(server)

    grown = partial(growth, before, after)
    assert grown("prompt_tokens_total") == 16, "of two samples each"
    assert grown("request_prompt_tokens_sum") == 8
    assert grown("generation_tokens_total") == 24
    assert grown("request_success_total", finished_reason="length") == 2
    assert grown("inter_token_latency_seconds_count") == 20
    for name in ("time_to_first_token", "e2e_request_latency", "request_queue_time"):
        assert grown(f"{name}_seconds_count") == 2
    assert grown("request_params_n_sum") == 4
    assert grown("engine_steps_total") >= 6
    assert grown("iteration_tokens_total_count") == grown("engine_steps_total")
    labels = {"method": "POST", "handler": "/v1/completions", "status": "200"}
    key = ("vattn:http_requests_total", frozenset(labels.items()))
    assert after[key] - before.get(key, 0) == 2


def test_requests_without_an_end_or_without_a_token(server: RunningServer) -> None:
    before = scrape(server)
    with server.client() as client:
        asked: Any = {"model": "embedded", "prompt": [5, 6, 7, 8]}
        client.completions.create(**asked, max_tokens=0, echo=True)
        with client.completions.create(
            **asked, max_tokens=400, stream=True, extra_body={"ignore_eos": True}
        ) as left:
            next(iter(left))
    server.wait_idle()
    grown = partial(growth, before, scrape(server))
    assert grown("request_success_total", finished_reason="length") == 1
    assert grown("request_success_total", finished_reason="abort") == 1
    assert {grown(f"{name}_count") for name in OF_WHOLE_REQUESTS} == {1}
    assert grown("request_generation_tokens_sum") == 0
    assert grown("request_prompt_tokens_sum") == 4
    limit_s = time.monotonic() + 60
    while growth(before, scrape(server), "generation_tokens_total") < 2:
        assert time.monotonic() < limit_s  # the engine tells its figures a little later


def test_refused_requests_are_told_by_their_route() -> None:
    async def run() -> None:
        settings = ServerSettings(api_keys=("secret",), max_body_bytes=100)
        app = build_app(cast(AsyncLLM, FakeLLM(stats(1))), settings)
        transport = httpx.ASGITransport(app)
        key = {"Authorization": "Bearer secret"}
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            await client.post("/v1/completions", json={})
            await client.post("/v1/completions", content=b" " * 200, headers=key)
            await client.get("/v1/completions", headers=key)
            await client.get("/wp-admin.php")
            read = app.state.vattn.metrics.registry.get_sample_value
        told = [
            read("vattn:http_requests_total", {"method": m, "handler": h, "status": status})
            for m, h, status in (
                ("POST", "/v1/completions", "401"), ("POST", "/v1/completions", "413"),
                ("GET", "/v1/completions", "405"), ("GET", "none", "401"),
            )
        ]  # fmt: skip
        assert told == [1, 1, 1, 1]

    asyncio.run(run())


def test_every_documented_name_is_there(server: RunningServer) -> None:
    with server.http_client() as client:
        text = client.get("/metrics").text
    names = {family.name for family in parse_text(text)}
    documented = set(re.findall(r"`vattn:(\w+)", DOCS.read_text()))
    assert len(documented) > 40
    # The parser takes the _total off counters, and what nobody was refused yet has no sample.
    shown = {re.sub("_total$", "", name.removeprefix("vattn:")) for name in names}
    assert {re.sub("_total$", "", name) for name in documented} <= shown
    told = {name for name in shown if not name.endswith("_created")} - {"process"}
    assert {n for n in told if not n.startswith("process_")} <= {
        re.sub("_total$", "", name) for name in documented
    }


def test_openmetrics_for_who_accepts_it(server: RunningServer) -> None:
    accept = "application/openmetrics-text; version=1.0.0"
    with server.http_client() as client:
        response: Any = client.get("/metrics", headers={"Accept": accept})
    assert response.headers["content-type"].startswith("application/openmetrics-text")
    families = parse_openmetrics(response.text)  # type: ignore[no-untyped-call]
    assert {family.name for family in families} >= {"vattn:prompt_tokens"}


def test_many_scrapes_cost_one(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("vattn.server.metrics.time.monotonic", lambda: now)
    metrics = metrics_of(FakeLLM())
    first = metrics.rendered(openmetrics=False)
    metrics.http("GET", "/health", 200, 0.1)
    assert metrics.rendered(openmetrics=False) is first
    assert metrics.rendered(openmetrics=True).endswith(b"# EOF\n")
    now += metrics.keep_s
    assert b'handler="/health"' in metrics.rendered(openmetrics=False)
    assert b'handler="/health"' not in first
