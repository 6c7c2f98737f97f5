"""Engine processes that cannot start, and one whose step fails; run as threads of this process."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest

import vattn
from tests.engine_owner import Owner, owner
from vattn import logs
from vattn.engine_process import host
from vattn.engine_process.messages import VERSION, Ready, StartFailed, Stop
from vattn.sampling_params import SamplingParams


def failing(model: str, **settings: Any) -> vattn.LLM:
    """An LLM whose third step fails as if the device were lost."""
    llm = vattn.LLM(model, **settings)
    step, steps = llm.engine.step, iter(range(100))

    def fails() -> Any:
        if next(steps) == 2:
            raise RuntimeError("the device is lost")
        return step()

    llm.engine.step = fails  # type: ignore[method-assign]
    return llm


def no_llm(model: str) -> object:
    return model


def broken(model: str) -> object:
    raise RuntimeError("no driver")


@pytest.fixture
def hosted(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Owner, Future[int]]]:
    """An owner, and the exit code to come."""
    monkeypatch.setattr(logs, "setup", lambda *_: None)
    monkeypatch.setattr(host, "quiet_libraries", lambda: None)
    with owner() as made, ThreadPoolExecutor(1) as pool:
        yield made, pool.submit(host.run, *made.addresses)


def assert_not_started(
    hosted: tuple[Owner, Future[int]], is_input: bool, words: str, **start: Any
) -> None:
    got = hosted[0].start(**start)
    assert isinstance(got, StartFailed)
    assert got.is_input is is_input
    assert words in got.error
    assert hosted[1].result(60) == host.NOT_STARTED


def test_another_version_is_refused(hosted: Any) -> None:
    assert_not_started(hosted, True, f"version {VERSION + 1}", version=VERSION + 1)


def test_a_model_that_is_not_there(hosted: Any) -> None:
    assert_not_started(hosted, True, "no such directory", model="/no/such/model")


def test_a_setting_that_does_not_exist(hosted: Any) -> None:
    assert_not_started(hosted, True, "no_such", settings={"no_such": 1})


def test_a_factory_that_is_not_there(hosted: Any) -> None:
    assert_not_started(hosted, True, "no.such:one", factory="no.such:one")


def test_a_factory_that_makes_something_else(hosted: Any) -> None:
    factory = f"{__name__}:no_llm"
    assert_not_started(hosted, True, "no vattn.LLM", factory=factory, settings={})


def test_a_device_that_fails_is_no_fault_of_the_input(
    hosted: Any, caplog: pytest.LogCaptureFixture
) -> None:
    factory = f"{__name__}:broken"
    assert_not_started(hosted, False, "no driver", factory=factory, settings={})
    assert "could not be made" in caplog.text


def test_something_else_before_start(hosted: tuple[Owner, Future[int]]) -> None:
    hosted[0].send(Stop())
    assert isinstance(hosted[0].receive(), StartFailed)
    assert hosted[1].result(60) == host.NOT_STARTED


def test_a_step_that_fails_ends_it(
    hosted: tuple[Owner, Future[int]], caplog: pytest.LogCaptureFixture
) -> None:
    made, code = hosted
    with caplog.at_level(logging.ERROR):
        assert isinstance(made.start(factory=f"{__name__}:failing"), Ready)
        handle = made.add([5, 6, 7], SamplingParams(max_tokens=50, ignore_eos=True))
        assert code.result(60) == host.FAILED
    assert "the device is lost" in caplog.text
    made.until(lambda: len(made.samples[handle, 0].tokens) == 2)
    assert made.samples[handle, 0].end is None
