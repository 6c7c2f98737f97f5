"""An owner whose engine process dies, hangs, talks nonsense, or never starts; with a stub."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.stub_engine import FACTS
from tests.stub_owner import Make, outputs, owners_of_stubs, run, until
from vattn.engine_process import spawn, supervisor
from vattn.engine_process.errors import EngineDeadError, RequestRefused
from vattn.engine_process.messages import Ready, Steps
from vattn.engine_process.owner import Owner
from vattn.sampling_params import RequestOutputKind, SamplingParams


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Make]:
    with owners_of_stubs(monkeypatch, tmp_path) as made:
        yield made


def test_tokens_come_in_order_and_a_slow_reader_gets_them_together(make: Make) -> None:
    owner = make()

    async def whole() -> None:
        await owner.engine.start()
        await owner.engine.start()  # again is nothing
        (final,) = await outputs(owner, [5], max_tokens=9, output_kind=RequestOutputKind.FINAL_ONLY)
        assert final.outputs[0].token_ids == list(range(6, 15))
        mirror = await owner.add([7], SamplingParams(max_tokens=50), "slow", 0, None)
        await until(lambda: mirror.is_finished)
        output = await mirror.next_output()
        owner.drop(mirror)
        assert output.finished
        assert output.outputs[0].token_ids == list(range(8, 58))

    run(owner, whole())


def test_what_is_refused_is_refused_with_the_reason(make: Make) -> None:
    owner = make()

    async def whole() -> None:
        with pytest.raises(EngineDeadError, match="start"):
            await outputs(owner, [1])
        await owner.engine.start()
        with pytest.raises(RequestRefused, match="999 is refused"):
            await outputs(owner, [999])
        for prompt in ([], [1.5], {"prompts": 1}, None):
            with pytest.raises(RequestRefused):
                await outputs(owner, prompt)
        with pytest.raises(RequestRefused, match="surrogates"):
            await outputs(owner, {"prompt_token_ids": [1], "cache_salt": "\ud800"})
        mirror = await owner.add([7], SamplingParams(ignore_eos=True), "twice", 0, None)
        with pytest.raises(RequestRefused, match="'twice' is in use"):
            await outputs(owner, [1], "twice")
        owner.abort(["twice", "unknown"])
        while not (output := await mirror.next_output()).finished:
            pass
        assert output.outputs[0].finish_reason == "abort"
        owner.drop(mirror)
        with pytest.raises(ValueError, match="no such question"):
            await owner.ask("what?", None, object)

    run(owner, whole())


@pytest.mark.parametrize(
    ("what", "limit_s", "how"), [("hangs", 0.5, "said nothing"), ("garbage", 60, "cannot be taken")]
)
def test_one_that_hangs_or_talks_nonsense_is_replaced(
    make: Make, what: str, limit_s: float, how: str
) -> None:
    owner = make(what, engine_timeout_s=limit_s)

    async def whole() -> None:
        await owner.engine.start()
        with pytest.raises(EngineDeadError, match=how) as caught:
            await outputs(owner, [1])
        assert caught.value.restarting
        assert not owner.engine.is_ready
        await until(lambda: owner.engine.is_ready)
        assert owner.engine.restarts == 1

    run(owner, whole())


def test_everybody_is_told_at_once_and_the_next_one_serves(make: Make) -> None:
    owner = make()

    async def whole() -> None:
        await owner.engine.start()
        child = owner.engine.child
        assert child is not None
        some = [asyncio.create_task(outputs(owner, [n], str(n), ignore_eos=True)) for n in range(9)]
        await until(lambda: len(owner.mirrors) == 9)
        os.kill(child.process.pid, signal.SIGKILL)
        for result in await asyncio.gather(*some, return_exceptions=True):
            assert isinstance(result, EngineDeadError)
            assert "SIGKILL" in str(result)
        with pytest.raises(EngineDeadError, match="SIGKILL"):
            await outputs(owner, [1])
        await until(lambda: owner.engine.is_ready)
        assert len(await outputs(owner, [1], max_tokens=3)) >= 1
        with pytest.raises(EngineDeadError, match="status 7"):
            await owner.ask("exit", None, object)

    run(owner, whole())


def test_after_five_failed_starts_it_is_dead_for_good(make: Make, tmp_path: Path) -> None:
    owner = make("worse")

    async def whole() -> None:
        await owner.engine.start()
        assert owner.engine.child is not None
        owner.engine.child.process.kill()
        error = await owner.engine.wait_for_failure()
        assert "5 starts failed" in str(error)
        assert not error.restarting
        with pytest.raises(EngineDeadError):
            owner.engine.check_ready()

    run(owner, whole())
    assert len((tmp_path / "starts").read_bytes()) == 6


def test_without_restarts_the_first_death_is_for_good(make: Make) -> None:
    owner = make(restart=False)

    async def whole() -> None:
        await owner.engine.start()
        assert owner.engine.child is not None
        owner.engine.child.process.kill()
        assert not (await owner.engine.wait_for_failure()).restarting

    run(owner, whole())


def test_a_start_that_fails_says_why(make: Make) -> None:
    bad, silent = make("bad"), make("silent", start_timeout_s=0.5)

    async def whole(owner: Owner, error: type[Exception], match: str) -> None:
        with pytest.raises(error, match=match):
            await owner.engine.start()

    run(bad, whole(bad, ValueError, "bad bad"))
    run(silent, whole(silent, EngineDeadError, r"start_timeout_s=0\.5"))


def test_it_can_be_closed_or_given_up_while_it_starts(make: Make) -> None:
    owner = make("silent")

    async def whole() -> None:
        start = asyncio.create_task(owner.engine.start())
        await until(lambda: owner.engine.child is not None)
        await owner.close()
        with pytest.raises(EngineDeadError, match="closed"):
            await start
        start = asyncio.create_task(owner.engine.start())
        await until(lambda: owner.engine.child is not None)
        start.cancel()
        with pytest.raises(asyncio.CancelledError):
            await start
        assert owner.engine.child is None

    run(owner, whole())


def test_closing_tells_everybody(make: Make) -> None:
    owner = make()

    async def whole() -> None:
        await owner.engine.start()
        waiting = asyncio.create_task(outputs(owner, [1], ignore_eos=True))
        await until(lambda: len(owner.mirrors) == 1)
        await owner.close()
        with pytest.raises(EngineDeadError, match="closed") as caught:
            await waiting
        assert not caught.value.restarting

    run(owner, whole())


def test_a_loop_that_ends_badly_leaves_nothing(make: Make) -> None:
    owner = make()

    async def whole() -> None:
        await owner.engine.start()
        mirror = await owner.add([1], SamplingParams(ignore_eos=True), "open", 0, None)
        task = owner.engine._task
        assert task is not None
        task.cancel()  # as the end of the loop does
        await until(lambda: owner.engine.child is None)
        owner.drop(mirror)

    asyncio.run(whole())
    with pytest.raises(EngineDeadError):
        owner.engine.check_ready()


def test_a_process_is_known_by_its_number_before_its_figures(make: Make) -> None:
    """And what a dead one had said is not of the next one."""

    async def whole() -> None:
        engine = make().engine
        heard: list[object] = []
        engine._on_news = heard.append
        engine._state, engine._hears = supervisor.State.RESTARTING, True
        engine._serving = asyncio.get_running_loop().create_future()
        engine._began = asyncio.get_running_loop().create_future()
        engine._take(Ready(FACTS))
        assert engine.restarts == 1
        engine._take(Steps([]))
        engine._up()
        engine._died("it died")
        engine._take(Steps([]))
        assert len(heard) == 1
        engine._deaths = 5000
        assert engine._delay_s() == supervisor._MAX_DELAY_S

    asyncio.run(whole())


@pytest.fixture
def short_path() -> Iterator[Path]:
    """Paths of sockets have 107 bytes, and pytest's directories are long."""
    with tempfile.TemporaryDirectory(prefix="vt-") as path:
        yield Path(path)


def test_directories_of_the_dead_are_removed(short_path: Path) -> None:
    stale = short_path / "vattn-engine-1-abcdefgh"
    stale.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(short_path))
        with spawn._directory() as first, spawn._directory() as second:
            assert {path.name for path in short_path.iterdir()} == {
                Path(first).name,
                Path(second).name,
            }
            assert Path(first).stat().st_mode & 0o777 == 0o700
        patch.setattr(tempfile, "tempdir", str(short_path / ("long" * 30)))
        with spawn._directory() as other:
            assert other.startswith("/tmp/")
    assert list(short_path.iterdir()) == []


def test_without_descriptors_of_processes_a_thread_waits(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spawn, "_pidfd", lambda pid: None)
    test_everybody_is_told_at_once_and_the_next_one_serves(make)


def test_what_an_engine_has_started_is_killed_with_it() -> None:
    process = subprocess.Popen(
        ["/bin/sh", "-c", "sleep 600 & echo $!; wait"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    assert process.stdout is not None
    with process.stdout:
        process.stdout.readline()
        spawn._end(process)
        assert process.stdout.read() == b""  # nobody has the other end


def test_the_engine_does_not_spin(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its threads leave the cores to us between products, unless the environment says otherwise."""
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    assert int(spawn.engine_environment()["GOMP_SPINCOUNT"]) < 10_000
    monkeypatch.setenv("GOMP_SPINCOUNT", "12345")
    assert spawn.engine_environment()["GOMP_SPINCOUNT"] == "12345"
    monkeypatch.delenv("GOMP_SPINCOUNT")
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    assert "GOMP_SPINCOUNT" not in spawn.engine_environment()
