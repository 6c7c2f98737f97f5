"""A paged memory manager and requests that compute, end and fail under it, without an engine."""

from __future__ import annotations

from typing import Any

from bench.paged.memory import PagedMemory
from tests.paged_model import make_paged, write
from tests.scheduler_model import make_request
from vattn.request import FinishReason, Request, Status

BLOCK = 4


def make_memory(blocks: int = 40, block_tokens: int = BLOCK, **options: Any) -> PagedMemory:
    cache = make_paged(blocks, block_tokens=block_tokens, slots=6, max_tokens=256, order="token")
    return PagedMemory(cache, **options)


def compute(memory: PagedMemory, request: Request, tokens: int | None = None) -> None:
    """A step of one request: so many of the tokens that it lacks, or all."""
    request.status = Status.RUNNING
    end = request.computed + (request.uncomputed if tokens is None else tokens)
    assert memory.grow([request.slot], [end])
    write(memory.cache, request.slot, request.computed, request.tokens[request.computed : end])
    request.computed = end
    memory.index_prompts()
    memory.check()


def start(memory: PagedMemory, name: str, ids: list[int], **options: Any) -> Request:
    request = make_request(name, ids, 20, **options)
    assert memory.admit(request)
    memory.check()
    return request


def end(memory: PagedMemory, *requests: Request, error: bool = False) -> None:
    for request in requests:
        if not error and request.computed:
            request.tokens.append(1)  # who ends well has been given a token
        request.finish_reason = FinishReason.ERROR if error else FinishReason.LENGTH
        request.status = Status.FINISHED
        memory.release(request)
        assert (request.slot, request.computed) == (-1, 0)
        memory.check()


def ids(tokens: int, seed: int = 0) -> list[int]:
    return [(seed * 37 + i * i + 3 * i) % 50 for i in range(tokens)]
