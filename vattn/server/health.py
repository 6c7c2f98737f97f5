"""``/health`` and ``/version``."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from vattn.server.errors import ApiError
from vattn.server.state import state_of
from vattn.version import __version__

router = APIRouter()


@router.head("/health", include_in_schema=False)
@router.get("/health", response_class=Response, responses={200: {"content": None}})
async def health(request: Request) -> Response:
    """200 while requests are served, else 503: the engine is not up, or the server drains."""
    state = state_of(request)
    if state.draining:
        raise ApiError(503, "the server is shutting down", type="server_error", retry_after_s=5)
    if not state.llm.is_ready:
        reason = state.llm.last_error or "the engine is not up yet"
        raise ApiError(503, str(reason), type="server_error", retry_after_s=5)
    return Response()


@router.get("/version")
async def version() -> dict[str, str]:
    """The version of vattn."""
    return {"version": __version__}
