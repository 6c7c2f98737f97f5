"""What Prometheus reads: requests as this process sees them, and the engine's latest figures.

Names, labels and buckets are those of vLLM under the prefix ``vattn:``; what only this system has
follows them. ``docs/serving.md`` has the table. Nothing here asks the engine process anything: a
scrape tells the figures that came last.

For whoever serves requests::

    record = state.metrics.begin(params)
    try:
        async for output in state.llm.generate(...):
            record.output(output)
    finally:
        record.end()  # end("abort") for a client that left, end("error") for a failure

For the HTTP layer, once for each response: ``metrics.http(method, template, status, seconds)``.
"""

from __future__ import annotations

import math
import time
from functools import cached_property

from fastapi import APIRouter, Request, Response
from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, exposition
from prometheus_client.openmetrics.exposition import ALLOWUTF8, CONTENT_TYPE_LATEST
from prometheus_client.openmetrics.exposition import generate_latest as openmetrics_text

from vattn.async_llm import AsyncLLM
from vattn.sampling_params import SamplingParams
from vattn.server import histograms
from vattn.server.engine_figures import ENGINE, EngineFigures
from vattn.server.request_record import RequestFigures, RequestRecord
from vattn.server.settings import ServerSettings
from vattn.server.state import state_of

_REASONS = ("queue", "tokens", "draining", "engine")
router = APIRouter()

_OPENMETRICS = "application/openmetrics-text"
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


@router.get("/metrics", response_class=Response)
async def metrics(request: Request) -> Response:
    """Figures for Prometheus: text, or OpenMetrics for who accepts it."""
    is_open = _OPENMETRICS in request.headers.get("accept", "")
    kind = CONTENT_TYPE_LATEST if is_open else exposition.CONTENT_TYPE_PLAIN_0_0_4
    body = state_of(request).metrics.rendered(openmetrics=is_open)
    return Response(body, headers={"content-type": kind})


class ServerMetrics:
    """The figures of one server, in a registry of its own. For one event loop.

    :attr:`keep_s` is for how many seconds a scrape may be answered with what the one before got.

    Args:
        llm: the engine; it need not be started before the first request.
        settings: of the server.
    """

    keep_s = 1.0

    def __init__(self, llm: AsyncLLM, settings: ServerSettings) -> None:
        self._llm = llm
        self._rendered: dict[bool, tuple[float, bytes]] = {}  # when, and what
        self._labels = {"model_name": settings.served_model_names[0], "engine": ENGINE}
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self.engine = EngineFigures(llm, settings.served_model_names[0])
        self.registry.register(self.engine)
        self._http = Counter(
            "vattn:http_requests",
            "Responses sent, by method, route and status.",
            ("method", "handler", "status"),
            registry=self.registry,
        )
        self._http_seconds = Histogram(
            "vattn:http_request_duration_seconds",
            "From a request's arrival to the end of its response.",
            ("method", "handler"),
            buckets=histograms.HTTP_S,
            registry=self.registry,
        )
        self._rejected = Counter(
            "vattn:requests_rejected",
            "Requests that were not let in, by reason.",
            ("reason",),
            registry=self.registry,
        )
        for reason in _REASONS:
            self._rejected.labels(reason)  # an alert on its growth needs a zero to begin with

    @cached_property
    def requests(self) -> RequestFigures:
        """What all requests came to. Needs the engine started: buckets end at its longest text."""
        return RequestFigures(self._llm.facts.max_model_len, self._labels, self.registry)

    def requests_so_far(self) -> RequestFigures | None:
        """The same; None before the engine has started for the first time."""
        return self.requests if self._llm.is_ready or "requests" in vars(self) else None

    def ready_registry(self) -> CollectorRegistry:
        """The registry, with everything that can be in it now: zeros before the first request."""
        self.requests_so_far()
        return self.registry

    def rendered(self, *, openmetrics: bool) -> bytes:
        """All figures, at most :attr:`keep_s` old: to write them takes what many tokens take."""
        now = time.monotonic()
        made_s, body = self._rendered.get(openmetrics, (-math.inf, b""))
        if now - made_s >= self.keep_s:
            body = _render(self.ready_registry(), openmetrics=openmetrics)
            self._rendered[openmetrics] = now, body
        return body

    def begin(self, params: SamplingParams, *, only_prompt: bool = False) -> RequestRecord:
        """A prompt is on its way to the engine.

        Args:
            params: of it.
            only_prompt: whether its client gets none of the tokens, as none was asked for.
        """
        return RequestRecord(self.requests, self.engine, params, only_prompt)

    def http(self, method: str, template: str | None, status: int, seconds: float) -> None:
        """A response was sent, whole.

        Args:
            method: of the request; unknown ones are counted together.
            template: the route's path, as ``/v1/models/{name}``; None if there is none.
            status: of the response, 499 if the client left before it.
            seconds: since the request came.
        """
        # Labels that clients could make up would fill the memory.
        method = method if method in _METHODS else "other"
        handler = template or "none"
        self._http.labels(method, handler, str(status)).inc()
        self._http_seconds.labels(method, handler).observe(seconds)

    def rejected(self, reason: str) -> None:
        """A request was not let in. ``reason``: ``"queue"``, ``"tokens"``, ``"draining"``..."""
        self._rejected.labels(reason).inc()


def _render(figures: CollectorRegistry, *, openmetrics: bool) -> bytes:
    # With the default escaping, OpenMetrics has "vattn_" for "vattn:". No name needs escaping.
    make = openmetrics_text if openmetrics else exposition.generate_latest
    body: bytes = make(figures, escaping=ALLOWUTF8)
    return body
