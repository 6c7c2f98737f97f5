"""Serves the live page: a document, a style sheet and a few modules, all of this directory.

The page holds no figures of its own: it reads ``/live`` and posts to ``/v1``, with the visitor's
key where one is needed. So its files need none.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache
from importlib import resources

from fastapi import APIRouter, Request, Response

from vattn.server.errors import ApiError
from vattn.server.state import state_of

_TYPES = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}
# No inline script or style, nothing from elsewhere, in nobody's frame.
_POLICY = (
    "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "object-src 'none'"
)
_HEADERS = {
    "Cache-Control": "no-cache",  # may be kept, but is asked for again: see the ETag
    "Content-Security-Policy": _POLICY,
    "Cross-Origin-Opener-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}

router = APIRouter(include_in_schema=False)


@dataclass(frozen=True)
class PageFile:
    """A file of the page as it goes out."""

    body: bytes
    media_type: str
    etag: str


@router.api_route("/", methods=["GET", "HEAD"])
async def index(request: Request) -> Response:
    """The document."""
    return _answer(request, "index.html")


@router.api_route("/page/{name}", methods=["GET", "HEAD"])
async def part(request: Request, name: str) -> Response:
    """What the document refers to."""
    return _answer(request, name)


@cache
def page_files() -> dict[str, PageFile]:
    """All files of the page by name; read once."""
    found = {}
    for entry in resources.files("vattn.server.page").iterdir():
        media_type = _TYPES.get(entry.name.rpartition(".")[2])
        if media_type is not None:
            body = entry.read_bytes()
            etag = f'"{hashlib.sha256(body).hexdigest()[:16]}"'
            found[entry.name] = PageFile(body, media_type, etag)
    return found


def _answer(request: Request, name: str) -> Response:
    file = page_files().get(name)
    if file is None or not state_of(request).settings.page:
        raise ApiError(404, f"{request.url.path} does not exist here", type="not_found_error")
    headers = {**_HEADERS, "ETag": file.etag}
    known = {tag.strip().removeprefix("W/") for tag in _if_none_match(request).split(",")}
    if file.etag in known or "*" in known:
        return Response(status_code=304, headers=headers)
    return Response(file.body, media_type=file.media_type, headers=headers)


def _if_none_match(request: Request) -> str:
    return request.headers.get("if-none-match", "")
