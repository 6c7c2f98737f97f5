"""Event traces: what is left when there is none, how they end, what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import vattn
from tests.cli_helpers import PROMPT, Cli
from tests.engine_cases import greedy, make_llm
from tests.trace_files import PREFIX, TraceFile, serve

pytest_plugins = ("tests.cli_fixtures", "tests.trace_fixtures")


def attributes(llm: vattn.LLM) -> list[set[str]]:
    """What a trace could leave behind."""
    engine = llm.engine
    owners: list[Any] = [engine, engine.scheduler, engine.memory, engine.runner]
    return [set(vars(owner)) for owner in (*owners, engine.runner._backend)]


# Off, and when it ends ----------------------------------------------------------------------------


def test_nothing_is_left(tmp_path: Path, llm: vattn.LLM) -> None:
    before = attributes(llm)
    with llm.trace(tmp_path / "t.json", kernels=True):
        assert attributes(llm) != before
        serve(llm)
    assert attributes(llm) == before
    written = (tmp_path / "t.json").read_bytes()
    serve(llm)
    assert (tmp_path / "t.json").read_bytes() == written
    assert list(tmp_path.iterdir()) == [tmp_path / "t.json"]
    with pytest.raises(ValueError, match="no trace of the driver's calls is running"):
        llm.engine.cache.pool.driver.stop_trace()


def test_an_exception_in_the_block(tmp_path: Path, llm: vattn.LLM) -> None:
    with pytest.raises(KeyError), llm.trace(tmp_path / "t.json"):  # noqa: PT012
        serve(llm)
        raise KeyError("the caller's")
    assert TraceFile(tmp_path / "t.json").of("step")


def test_a_step_that_fails(tmp_path: Path, llm: vattn.LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(llm.engine.runner, "run", interrupt)
    with pytest.raises(KeyboardInterrupt), llm.trace(tmp_path / "t.json"):
        serve(llm)
    trace = TraceFile(tmp_path / "t.json")
    assert [s["args"]["error"] for s in trace.of("step")] == ["KeyboardInterrupt"]
    assert [s["args"]["error"] for s in trace.of("forward")] == ["KeyboardInterrupt"]
    assert {e["args"]["reason"] for e in trace.of("finish", "i")} == {"error"}


def fails(*args: object) -> None:
    raise MemoryError("too many")


@pytest.mark.parametrize("what", ["calls", "kernels"])
def test_an_end_that_fails_ends_everything(
    tmp_path: Path, llm: vattn.LLM, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """The file has what there is, and another trace can begin."""
    llm.start_trace(tmp_path / "t.json", kernels=True)
    serve(llm)
    with monkeypatch.context() as patch:
        name = "trace._stop_calls" if what == "calls" else "kernel_trace._mark"
        patch.setattr(f"vattn.engine.{name}", fails)
        with pytest.raises(MemoryError):
            llm.stop_trace()
    assert TraceFile(tmp_path / "t.json").of("step")
    if what == "calls":
        llm.engine.cache.pool.driver.stop_trace()  # the call that failed was to do that
    with llm.trace(tmp_path / "again.json", kernels=True):
        serve(llm)
    assert TraceFile(tmp_path / "again.json").of("step")


def test_no_room_for_the_events(tmp_path: Path, llm: vattn.LLM) -> None:
    with pytest.raises(MemoryError):
        llm.start_trace(tmp_path / "t.json", max_events=10**13)
    with llm.trace(tmp_path / "t.json"):
        serve(llm)


def test_closed_while_it_runs(tmp_path: Path) -> None:
    llm = make_llm()
    with llm.trace(tmp_path / "t.json"):
        stream = llm.stream([{"prompt_token_ids": PREFIX}], greedy(6))
        next(stream)
        llm.close()
    trace = TraceFile(tmp_path / "t.json")
    assert trace.of("release")  # of the addresses, which was last
    assert [e["args"]["reason"] for e in trace.of("finish", "i")] == ["abort"]
    with pytest.raises(ValueError, match="was closed"):
        llm.start_trace(tmp_path / "u.json")


def test_requests_that_go_on(tmp_path: Path, llm: vattn.LLM) -> None:
    stream = llm.stream([{"prompt_token_ids": PREFIX}], greedy(6))
    next(stream)
    with llm.trace(tmp_path / "t.json"):
        next(stream)
    assert len(list(stream)) == 4
    lives = [
        e for e in TraceFile(tmp_path / "t.json").entries if "finish_reason" in e.get("args", {})
    ]
    assert [e["args"]["finish_reason"] for e in lives] == ["unfinished"]


# Refused ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernels", [False, True])
def test_files_that_cannot_be_written(tmp_path: Path, llm: vattn.LLM, kernels: bool) -> None:
    before = attributes(llm)
    for path in (tmp_path / "nowhere" / "t.json", tmp_path, tmp_path / "nowhere" / "t.json.gz"):
        with pytest.raises(ValueError, match="cannot be written to") as raised:
            llm.start_trace(path, kernels=kernels)
        assert str(path) in str(raised.value)
        with pytest.raises(ValueError, match="cannot be written to"), llm.trace(path):
            pytest.fail("the block ran")
    assert attributes(llm) == before
    with llm.trace(tmp_path / "t.json"):  # nothing is running
        serve(llm)


def test_refused(tmp_path: Path, llm: vattn.LLM) -> None:
    with pytest.raises(ValueError, match="no trace of this LLM is running"):
        llm.stop_trace()
    with pytest.raises(ValueError, match="max_events=0"):
        llm.start_trace(tmp_path / "t.json", max_events=0)
    llm.start_trace(tmp_path / "t.json")
    with pytest.raises(ValueError, match=r"is running; end it by stop_trace\(\)"):
        llm.start_trace(tmp_path / "u.json")
    options: dict[str, Any] = dict.fromkeys(("page_bytes", "kv_cache_memory_bytes"))
    other = make_llm(pool=llm.engine.cache.pool, strict=False, **options)
    with pytest.raises(ValueError, match="are being traced already"):
        other.start_trace(tmp_path / "u.json")
    other.close()
    llm.stop_trace()
    with torch.profiler.profile(), pytest.raises(ValueError, match="profiler is running already"):
        llm.start_trace(tmp_path / "t.json", kernels=True)
    assert not (tmp_path / "u.json").exists()


def test_from_the_command_line(generate: Cli, tmp_path: Path) -> None:
    result = generate("-p", PROMPT, "--max-tokens", 8, "--trace", tmp_path / "t.json")
    assert result.exit_code == 0, result.stderr
    trace = TraceFile(tmp_path / "t.json")
    assert len(trace.of("step")) == 8
    args = ("--max-tokens", 4, "--trace", tmp_path / "k.json", "--trace-kernels")
    assert generate("-p", PROMPT, *args).exit_code == 0
    assert TraceFile(tmp_path / "k.json").of("vattn::attention")
