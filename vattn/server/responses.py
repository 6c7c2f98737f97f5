"""Error responses, for routes and for what stands before them."""

from __future__ import annotations

import math

from fastapi.responses import JSONResponse

from vattn.server.errors import ApiError


def error_response(error: ApiError) -> JSONResponse:
    """The response that tells a client of an error."""
    headers = {}
    if error.retry_after_s is not None:
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after_s)))
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(error.body(), status_code=error.status, headers=headers)
