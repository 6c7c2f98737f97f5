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

from functools import cached_property

from fastapi import APIRouter, Request, Response
from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, exposition
from prometheus_client.openmetrics import exposition as openmetrics

from vattn.async_llm import AsyncLLM
from vattn.sampling_params import SamplingParams
from vattn.server import histograms
from vattn.server.engine_figures import ENGINE, EngineFigures
from vattn.server.request_record import RequestFigures, RequestRecord
from vattn.server.settings import ServerSettings
from vattn.server.state import state_of

router = APIRouter()

_OPENMETRICS = "application/openmetrics-text"
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


@router.get("/metrics", response_class=Response)
async def metrics(request: Request) -> Response:
    """Figures for Prometheus: text, or OpenMetrics for who accepts it."""
    figures = state_of(request).metrics.ready_registry()
    # With the default escaping, OpenMetrics has "vattn_" for "vattn:". No name needs escaping.
    if _OPENMETRICS in request.headers.get("accept", ""):
        body = openmetrics.generate_latest(  # type: ignore[no-untyped-call]
            figures, escaping=openmetrics.ALLOWUTF8
        )
        return Response(body, headers={"content-type": openmetrics.CONTENT_TYPE_LATEST})
    body = exposition.generate_latest(figures, escaping=openmetrics.ALLOWUTF8)
    return Response(body, headers={"content-type": exposition.CONTENT_TYPE_PLAIN_0_0_4})


class ServerMetrics:
    """The figures of one server, in a registry of its own. For one event loop.

    Args:
        llm: the engine; it need not be started before the first request.
        settings: of the server.
    """

    def __init__(self, llm: AsyncLLM, settings: ServerSettings) -> None:
        self._llm = llm
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

    def begin(self, params: SamplingParams) -> RequestRecord:
        """A prompt is on its way to the engine."""
        return RequestRecord(self.requests, self.engine, params)

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
