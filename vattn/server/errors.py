"""Errors as OpenAI's API tells them: a status, and a body with message, type, param and code."""

from __future__ import annotations

from typing import Any

from vattn.engine_process.errors import EngineDeadError

_RETRY_DEAD_S = 5.0


class ApiError(Exception):
    """What went wrong with a request, for its client.

    Args:
        status: of HTTP.
        message: what is wrong and what to do.
        type: OpenAI's: ``invalid_request_error``, ``authentication_error``, ``not_found_error``,
            ``rate_limit_error``, ``server_error``.
        param: the field of the request that is at fault, as ``messages[0].content``.
        code: OpenAI's, such as ``model_not_found``, or None.
        retry_after_s: for 429 and 503; becomes ``Retry-After``, in whole seconds.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = "invalid_request_error",  # noqa: A002  (the API's name)
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.type = type
        self.param = param
        self.code = code
        self.retry_after_s = retry_after_s

    def body(self) -> dict[str, Any]:
        """What the client reads."""
        return {
            "error": {
                "message": self.message,
                "type": self.type,
                "param": self.param,
                "code": self.code,
            }
        }


def engine_dead(error: EngineDeadError) -> ApiError:
    """503; its client may come again if another engine is being started."""
    retry_after_s = _RETRY_DEAD_S if error.restarting else None
    return ApiError(503, str(error), type="server_error", retry_after_s=retry_after_s)
