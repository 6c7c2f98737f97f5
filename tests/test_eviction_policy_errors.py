"""Policies of the user's that go wrong: named in an error, and the engine sound afterwards."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import pytest

from tests.policies import HOT, Spy, fails, flood, serve
from tests.stub_model import expected_tokens
from tests.test_engine_memory import (
    drive,
    finish,
    make_engine,
    prompt,
    start,
)
from vattn.engine.eviction import EvictionPolicy, KeptSequence, PolicyError
from vattn.request import Request

# Policies that go wrong ---------------------------------------------------------------------------


def endless(kept: Sequence[KeptSequence]) -> Iterable[KeptSequence]:
    return itertools.cycle(kept)


def from_before(kept: Sequence[KeptSequence]) -> list[KeptSequence]:
    known = vars(from_before).setdefault("kept", list(kept))
    return known if known[0] is not kept[0] else []


@pytest.mark.parametrize(
    ("victims", "message"),
    [
        (fails, r"Spy: victims\(\) failed: ZeroDivisionError: of the policy"),
        (lambda kept: None, r"victims\(\) failed: TypeError"),
        (lambda kept: [kept[0].slot], r"victims\(\) named \d+, which is none of the"),
        (lambda kept: [kept[0], kept[0]], r"victims\(\) named slot \d+, .* named before"),
        (endless, r"victims\(\) named slot \d+, .* named before"),
        (from_before, r"victims\(\) named slot \d+, which is none of the"),
    ],
)
@pytest.mark.parametrize("growing", [False, True])
def test_an_order_that_makes_no_sense(victims: Any, message: str, growing: bool) -> None:
    vars(from_before).clear()
    spy = Spy(victims)
    engine = make_engine(pages=30, eviction_policy=spy)
    serve(engine, HOT, 20, "kept")
    running = start(engine, prompt(40, 1), 400 if growing else 200, "running")
    engine.step()
    waiting = None if growing else start(engine, prompt(260, 2), 20, "waiting")
    with pytest.raises(PolicyError, match=message):
        drive(engine, *filter(None, [running, waiting]))
    assert running.finish_reason == "error"
    assert "eviction_policy=Spy" in str(running.error)
    engine.check()
    spy.answer = lambda kept: ()
    flood(engine, range(5))  # it begins anew
    finish(engine)


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        (fails, r"Spy: keep\(\) failed: ZeroDivisionError: of the policy"),
        (lambda request: None, r"keep\(\) returned None; return True or False"),
    ],
)
@pytest.mark.parametrize("is_async", [False, True])
def test_no_answer_about_keeping(keep: Any, message: str, is_async: bool) -> None:
    spy = Spy(keep=keep)
    engine = make_engine(eviction_policy=spy, async_scheduling=is_async)
    short, long = start(engine, HOT, 5, "short"), start(engine, prompt(150, 1), 50, "long")
    with pytest.raises(PolicyError, match=message):
        drive(engine, short, long)
    assert short.output_ids == expected_tokens(HOT, 5)
    assert (long.finish_reason, long.slot) == ("error", -1)
    engine.check()
    assert engine.stats().cache.kept_slots == 0
    assert {r.id for r in engine.step()} == {"short", "long"}  # both are told, once
    spy.keeps = lambda request: True
    flood(engine, (1, 2))
    finish(engine)


@pytest.mark.parametrize("aborted", [False, True])
def test_an_engine_closes_without_a_question(aborted: bool) -> None:
    spy = Spy(keep=fails)
    engine = make_engine(eviction_policy=spy)
    requests = [start(engine, HOT, 50, f"{i}") for i in range(3)]
    engine.step()
    if aborted:
        engine.abort("0")
    engine.close()
    assert spy.offered == []
    assert {r.finish_reason for r in requests} == {"abort"}
    assert engine.cache.pool.stats().used_bytes == 0


@pytest.mark.parametrize("aborted", [False, True])
def test_an_engine_that_cannot_close_well_gives_its_memory_back(
    aborted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine()
    requests = [start(engine, HOT, 50, f"{i}") for i in range(3)]
    engine.step()
    if aborted:
        engine.abort("0")
    monkeypatch.setattr(engine.memory, "release", fails)
    with pytest.raises(ZeroDivisionError):
        engine.close()
    assert all(r.finished for r in requests)
    assert engine.cache.pool.stats().used_bytes == 0


def test_what_came_behind_a_failing_abort_is_served() -> None:
    spy = Spy(keep=fails)
    engine = make_engine(eviction_policy=spy)
    running = start(engine, HOT, 50, "running")
    engine.step()
    engine.abort("running")
    later = start(engine, prompt(20), 5, "later")
    engine.abort("gone")
    with pytest.raises(PolicyError):
        engine.step()
    assert running.finish_reason == "abort"
    spy.keeps = lambda request: True
    drive(engine, later)
    finish(engine)


def test_a_request_whose_ranking_is_interrupted_is_taken_in_again() -> None:
    asked: list[str] = []

    def rank(request: Request) -> float:
        asked.append(request.id)
        if asked == ["a"]:
            raise KeyboardInterrupt
        return 0

    engine = make_engine(scheduling_policy=rank)
    a, b = start(engine, prompt(20), 5, "a"), start(engine, prompt(30), 5, "b")
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    drive(engine, a, b)
    assert asked == ["a", "a", "b"]
    finish(engine)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eviction_policy": "lru"}, "eviction_policy='lru' must be an object of a class made"),
        ({"eviction_policy": EvictionPolicy}, "must be an object of a class made"),
        ({"scheduling_policy": EvictionPolicy}, "or a function that ranks a request"),
        (
            {"eviction_policy": EvictionPolicy(), "enable_prefix_caching": False},
            "enable_prefix_caching=False keeps nothing",
        ),
    ],
)
def test_what_is_no_policy_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_engine(**options)
