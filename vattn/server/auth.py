"""API keys: who may use the server, and who may change it."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from vattn.server.errors import ApiError
from vattn.server.responses import error_response
from vattn.server.settings import ServerSettings

# Load balancers and Prometheus have no key, and the page asks its visitor for one.
OPEN_PATHS = frozenset({"/", "/health", "/version", "/metrics"})
_OPEN_PREFIX = "/page/"
ADMIN_PREFIX = "/admin/"


def is_open(path: str) -> bool:
    """Whether a path needs no key, even if there are keys."""
    return path in OPEN_PATHS or path.startswith(_OPEN_PREFIX)


class Keys:
    """A set of keys that tells nothing by the time it takes.

    Digests have one length, so comparing them does not tell how long a key is, and every key is
    compared always.
    """

    def __init__(self, keys: Sequence[str]) -> None:
        self._digests = [_digest(key.encode()) for key in keys]

    def __bool__(self) -> bool:
        return bool(self._digests)

    def have(self, key: bytes) -> bool:
        """Whether ``key`` is one of them."""
        digest = _digest(key)
        found = False
        for known in self._digests:
            found |= hmac.compare_digest(known, digest)
        return found


class Auth:
    """ASGI middleware that lets in who has a key.

    ``/admin/*`` needs one of ``admin_keys``, or of ``api_keys`` if there are none; without either
    nobody is let in there. An admin's key is good for everything.
    """

    def __init__(self, app: ASGIApp, settings: ServerSettings) -> None:
        self._app = app
        self._everyone = not settings.api_keys
        self._keys = Keys((*settings.api_keys, *settings.admin_keys))
        self._admins = Keys(settings.admin_keys or settings.api_keys)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        error = self._refusal(scope) if scope["type"] == "http" else None
        if error is None:
            await self._app(scope, receive, send)
        else:
            await error_response(error)(scope, receive, send)

    def _refusal(self, scope: Scope) -> ApiError | None:
        path = scope["path"]
        is_admin = path.startswith(ADMIN_PREFIX)
        if is_admin and not self._admins:
            return ApiError(
                403,
                "this server takes no orders, as it has no key to tell who gives them; start it "
                "with --admin-api-key (or --api-key)",
                type="permission_error",
            )
        if is_open(path) or (self._everyone and not is_admin):
            return None
        key = _bearer(scope)
        if key is None:
            return _unauthorized("no API key was given; send it as Authorization: Bearer KEY", None)
        if not self._keys.have(key):
            return _unauthorized("the API key is wrong", "invalid_api_key")
        if is_admin and not self._admins.have(key):
            return ApiError(403, "this API key may not give orders", type="permission_error")
        return None


def _unauthorized(message: str, code: str | None) -> ApiError:
    return ApiError(401, message, type="authentication_error", code=code)


def _bearer(scope: Scope) -> bytes | None:
    scheme, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
    # Headers are decoded as latin-1; keys are given as UTF-8.
    return key.strip().encode("latin-1") if scheme.lower() == "bearer" and key.strip() else None


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
