"""The server as an ASGI application: routes, middleware, and errors as OpenAI tells them."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from vattn.async_llm import AsyncLLM
from vattn.engine_process.errors import EngineDeadError, RequestRefused
from vattn.server import admin, health, live, metrics, openapi
from vattn.server.admission import Admission
from vattn.server.auth import Auth
from vattn.server.errors import ApiError, engine_dead
from vattn.server.limits import Limits
from vattn.server.metrics import ServerMetrics
from vattn.server.observe import Observe
from vattn.server.openai import chat, completions, models, tokenize
from vattn.server.openai.invalid import api_error_of
from vattn.server.page import page
from vattn.server.responses import error_response
from vattn.server.settings import ServerSettings
from vattn.server.state import ServerState
from vattn.version import __version__

_ROUTERS = (health, models, completions, chat, tokenize, admin, metrics, live, page)


def build_app(llm: AsyncLLM, settings: ServerSettings) -> FastAPI:
    """The application; its :class:`ServerState` is in ``app.state.vattn``.

    Args:
        llm: the engine. Starting and closing it is for the caller; until it has started, requests
            get 503.
        settings: of the server.
    """
    # The interactive documentation would load scripts from elsewhere.
    # Redirects would be to whatever a client says in Host.
    app = FastAPI(
        title=openapi.TITLE,
        version=__version__,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    figures = ServerMetrics(llm, settings)
    state = ServerState(llm, settings, Admission(settings, llm, figures.rejected), figures)
    app.state.vattn = state
    for module in _ROUTERS:
        app.include_router(module.router)
    _tell_errors(app)
    _put_middleware(app, state)

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = openapi.document(app, settings)
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]
    return app


def _put_middleware(app: FastAPI, state: ServerState) -> None:
    """The last one is the outermost."""
    settings = state.settings
    app.add_middleware(Limits, max_body_bytes=settings.max_body_bytes)
    app.add_middleware(Auth, settings=settings)
    if settings.allowed_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.allowed_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],  # OpenAI's client for browsers sends many of its own
            expose_headers=["X-Request-Id", "Retry-After"],
        )
    routes = [route for module in _ROUTERS for route in module.router.routes]
    app.add_middleware(Observe, state=state, routes=routes)


def _tell_errors(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def told(request: Request, error: ApiError) -> Response:
        return error_response(error)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        return error_response(api_error_of(error))

    @app.exception_handler(RequestRefused)
    async def refused(request: Request, error: RequestRefused) -> Response:
        return error_response(ApiError(400, str(error)))

    @app.exception_handler(EngineDeadError)
    async def dead(request: Request, error: EngineDeadError) -> Response:
        return error_response(engine_dead(error))

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        response = error_response(_of_http(request, error))
        response.headers.update(error.headers or {})  # such as Allow
        return response


def _of_http(request: Request, error: HTTPException) -> ApiError:
    if error.status_code == 404:
        return ApiError(404, f"{request.url.path} does not exist here", type="not_found_error")
    if error.status_code == 405:
        message = f"{request.url.path} does not take {request.method}"
        return ApiError(405, message)
    return ApiError(error.status_code, str(error.detail))
