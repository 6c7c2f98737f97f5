"""``/admin/*``: orders to the engine while it serves; auth.py lets in only who has a key."""

from __future__ import annotations

from typing import Any

import msgspec
from fastapi import APIRouter, Request
from pydantic import Field

from vattn.config import parse_bytes
from vattn.server.errors import ApiError
from vattn.server.openai.common import Body
from vattn.server.state import state_of

router = APIRouter(prefix="/admin", tags=["admin"])


class Budget(Body):
    """The most physical memory that the KV cache may have."""

    budget: int | str = Field(description="bytes, or a text such as 2GiB", examples=["2GiB"])


@router.get("/memory")
async def memory(request: Request) -> dict[str, Any]:
    """The pool's and the cache's figures, sizes in bytes."""
    stats = state_of(request).llm.stats()
    if stats is None:
        raise ApiError(503, "the engine has told nothing yet", type="server_error", retry_after_s=1)
    return {"pool": stats.pool, "cache": msgspec.to_builtins(stats.cache)}


@router.post("/memory")
async def set_memory(request: Request, body: Budget) -> dict[str, int]:
    """Moves the budget. What is beyond a smaller one goes back to the device before the answer."""
    try:
        wanted = parse_bytes(body.budget, "budget")
        report = await state_of(request).llm.set_budget(wanted)
    except ValueError as error:
        raise ApiError(400, str(error), param="budget") from error
    figures: dict[str, int] = msgspec.structs.asdict(report)
    return figures


@router.post("/reset_prefix_cache")
async def reset_prefix_cache(request: Request) -> dict[str, bool]:
    """Forgets the K and V of finished requests."""
    await state_of(request).llm.reset_prefix_cache()
    return {"reset": True}
