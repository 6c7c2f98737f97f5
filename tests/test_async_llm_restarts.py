"""Engine processes that are replaced, and owners whom one prompt or one caller gives trouble."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.stub_owner import Make, outputs, owners_of_stubs, run, until
from vattn.engine_process import owner as owners
from vattn.engine_process.messages import Abort, Progress, decode_command
from vattn.engine_process.mirror import Mirror
from vattn.sampling_params import SamplingParams


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Make]:
    with owners_of_stubs(monkeypatch, tmp_path) as made:
        yield made


def test_a_moved_budget_outlives_the_process(make: Make) -> None:
    owner = make()

    async def whole() -> None:
        await owner.engine.start()
        assert owner.engine.facts is not None
        assert owner.engine.facts.budget_bytes == 1 << 20
        await owner.set_budget(3 << 16)
        assert owner.engine.child is not None
        owner.engine.child.process.kill()
        await until(lambda: owner.engine.restarts == 1)
        assert owner.engine.facts.budget_bytes == 3 << 16

    run(owner, whole())


def test_settings_that_were_good_are_tried_again(make: Make, tmp_path: Path) -> None:
    """Whatever a restart says of them: files and memory may be away for a moment."""
    owner = make("gone for once")

    async def whole() -> None:
        await owner.engine.start()
        assert owner.engine.child is not None
        owner.engine.child.process.kill()
        await until(lambda: owner.engine.restarts == 1)
        assert len(await outputs(owner, [1], max_tokens=3)) >= 1

    run(owner, whole())
    assert len((tmp_path / "starts").read_bytes()) == 3


def test_a_start_that_meets_a_close_starts_anew(make: Make) -> None:
    owner = make()

    async def whole() -> None:
        await owner.engine.start()
        closing = asyncio.create_task(owner.close())
        await asyncio.sleep(0)
        assert not owner.engine.is_ready
        await owner.engine.start()
        assert closing.done()
        assert owner.engine.is_ready
        assert len(await outputs(owner, [1], max_tokens=3)) >= 1

    run(owner, whole())


def test_one_who_gives_up_leaves_the_start_to_others(make: Make) -> None:
    owner = make()

    async def whole() -> None:
        first = asyncio.create_task(owner.engine.start())
        await until(lambda: owner.engine.child is not None)
        second = asyncio.create_task(owner.engine.start())
        await asyncio.sleep(0)
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        await second
        assert owner.engine.is_ready

    run(owner, whole())


def test_who_starts_it_while_it_restarts_waits(make: Make) -> None:
    owner = make()

    async def whole() -> None:
        await owner.engine.start()
        assert owner.engine.child is not None
        owner.engine.child.process.kill()
        await until(lambda: not owner.engine.is_ready)
        await owner.engine.start()
        assert owner.engine.is_ready
        assert owner.engine.restarts == 1

    run(owner, whole())


def test_time_runs_from_the_call(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not from the end of its tokenizing; and any real number is a time."""
    owner, now, sent = make(), [100.0], []

    class Slow:
        def encode(self, text: str) -> list[int]:
            now[0] += 20
            return [5]

    async def whole() -> None:
        await owner.engine.start()
        owner.tokenizer = Slow()
        monkeypatch.setattr(owners, "time", SimpleNamespace(monotonic=lambda: now[0]))
        monkeypatch.setattr(owner.engine, "send", lambda data: sent.append(decode_command(data)))
        params = SamplingParams(detokenize=False)
        owner.drop(await owner.add("a", params, "a", 0, Fraction(61, 2)))  # type: ignore[arg-type]
        assert sent[0].deadline_s == 130.5

    run(owner, whole())


def test_what_breaks_for_one_prompt_is_not_for_the_others(
    make: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    owner, apply = make(), Mirror.apply

    def breaks(mirror: Mirror, progress: Progress) -> None:
        if mirror.prompt_ids == [7]:
            raise IndexError("no such sample")
        apply(mirror, progress)

    async def whole() -> None:
        await owner.engine.start()
        child, sends = owner.engine.child, owner.engine.send
        monkeypatch.setattr(Mirror, "apply", breaks)
        sent: list[Any] = []

        def noted(data: bytes) -> None:
            sent.append(decode_command(data))
            sends(data)

        monkeypatch.setattr(owner.engine, "send", noted)
        bad = asyncio.create_task(outputs(owner, [7], "bad"))
        good = asyncio.create_task(outputs(owner, [8], "good"))
        with pytest.raises(RuntimeError, match="no such sample"):
            await bad
        assert (await good)[-1].finished
        assert [type(each) for each in sent].count(Abort) == 1
        assert owner.engine.child is child

    run(owner, whole())
    assert "cannot be taken" in caplog.text
