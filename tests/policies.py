"""A policy that notes what it is asked, and engines that are served under one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from tests.stub_model import expected_tokens
from tests.test_engine_memory import (
    drive,
    prompt,
    start,
)
from vattn.engine.engine import Engine
from vattn.engine.eviction import EvictionPolicy, KeptSequence
from vattn.request import Request

HOT = prompt(150)


def is_hot(kept: KeptSequence) -> bool:
    return list(kept.token_ids[:10]) == HOT[:10]


class Spy(EvictionPolicy):
    """Notes what it is asked; its answers are as told."""

    def __init__(
        self,
        victims: Callable[[Sequence[KeptSequence]], Any] = lambda kept: (),
        keep: Callable[[Request], Any] = lambda request: True,
    ) -> None:
        self.answer, self.keeps = victims, keep
        self.asked: list[tuple[list[KeptSequence], int]] = []
        self.offered: list[Request] = []

    def keep(self, request: Request) -> bool:
        self.offered.append(request)
        return self.keeps(request)  # type: ignore[no-any-return]

    def victims(self, kept: Sequence[KeptSequence], pages: int) -> Iterable[KeptSequence]:
        self.asked.append((list(kept), pages))
        return self.answer(kept)  # type: ignore[no-any-return]


def serve(engine: Engine, ids: list[int], new: int, name: str, **options: Any) -> Request:
    request = start(engine, ids, new, name, **options)
    drive(engine, request)
    assert request.output_ids == expected_tokens(ids, new)
    return request


def flood(engine: Engine, seeds: Iterable[int]) -> None:
    for seed in seeds:
        serve(engine, prompt(150, seed), 20, f"flood{seed}")


def fails(*_: object) -> Any:
    raise ZeroDivisionError("of the policy")
