"""The OpenAPI document, made true: it names the errors that are sent, and no others."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from vattn.server.auth import ADMIN_PREFIX, is_open
from vattn.server.openai.chat_documents import ChatCompletionChunk
from vattn.server.settings import ServerSettings
from vattn.version import __version__

TITLE = "vattn"
_DESCRIPTION = (
    "An OpenAI-compatible server whose KV cache lies contiguous in virtual memory, with physical "
    "pages only where tokens are."
)
_ERROR: dict[str, Any] = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
_ANY = {"500": "the server failed; its log tells more, by the request's id"}
_KEY = {"401": "no API key, or a wrong one", "403": "the key is not an admin's"}
_BODY = {
    "400": "the request is at fault; param names the field",
    "404": "no such model",
    "408": "the request came too slowly",
    "413": "too large ever to be served",
}
_ENGINE = {
    "429": "too much waits already; see Retry-After",
    "503": "the engine is not up, or the server is shutting down; see Retry-After",
}


def document(app: FastAPI, settings: ServerSettings) -> dict[str, Any]:
    """The document of an app's routes."""
    found = get_openapi(
        title=TITLE, version=__version__, description=_DESCRIPTION, routes=app.routes
    )
    parts = found.setdefault("components", {})
    schemas = parts.setdefault("schemas", {})
    for unused in ("HTTPValidationError", "ValidationError"):
        schemas.pop(unused, None)
    schemas["Error"] = _ERROR
    chunk = ChatCompletionChunk.model_json_schema(ref_template="#/components/schemas/{model}")
    schemas |= {**chunk.pop("$defs"), "ChatCompletionChunk": chunk}
    parts["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    for path, operations in found["paths"].items():
        for operation in operations.values():
            _complete(path, operation, settings)
    return found


def _complete(path: str, operation: dict[str, Any], settings: ServerSettings) -> None:
    responses = operation["responses"]
    responses.pop("422", None)
    told = dict(_ANY)
    needs_key = not is_open(path) and (settings.api_keys or path.startswith(ADMIN_PREFIX))
    if needs_key:
        operation["security"] = [{"key": []}]
        told |= _KEY
    if "requestBody" in operation:
        told |= _BODY
    if operation.get("parameters"):
        told |= {"400": _BODY["400"], "404": _BODY["404"]}
    if path != "/version":
        told |= _ENGINE
    for status, text in told.items():
        responses.setdefault(
            status,
            {
                "description": text,
                "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
            },
        )
