"""What the engine process does beside its steps: intake, figures, its end; without a process."""

from __future__ import annotations

import queue
import subprocess
import sys
import threading
import time
from typing import Any

import zmq

import vattn
from tests.engine_cases import EMBEDDED_PATH
from tests.engine_owner import SETTINGS
from vattn.engine_process import loop as loops
from vattn.engine_process.intake import CommandReader
from vattn.engine_process.messages import Add, Progress, Steps, decode_news, encode
from vattn.sampling_params import SamplingParams

_PATIENCE_S = 60
_SLOW = {"structured_outputs": {"regex": "a"}}


class SlowEngine:
    """Compiles until it is told to end."""

    def __init__(self) -> None:
        self.goes_on = threading.Event()
        self.made: list[tuple[str, float | None]] = []

    def make_requests(self, name: str, *_: Any, timeout_s: float | None, **__: Any) -> list[Any]:
        self.made.append((name, timeout_s))
        assert self.goes_on.wait(_PATIENCE_S)
        return []


class Told:
    """A loop that only remembers."""

    def __init__(self) -> None:
        self.news: queue.Queue[Any] = queue.Queue()

    def tell(self, news: Any) -> None:
        self.news.put(news)

    def add(self, handle: int, name: str, requests: list[Any]) -> None:
        self.news.put((handle, name))


def test_time_runs_while_others_compile() -> None:
    engine, told = SlowEngine(), Told()
    with zmq.Context() as context:
        ours, theirs = context.socket(zmq.PAIR), context.socket(zmq.PAIR)
        with ours, theirs:
            ours.bind("inproc://commands")
            theirs.connect("inproc://commands")
            with CommandReader(theirs, engine, told):  # type: ignore[arg-type]
                begun_s = time.monotonic()
                ours.send(encode(Add(1, "first", [5], _SLOW, deadline_s=begun_s + 1000)))
                ours.send(encode(Add(2, "late", [5], {**_SLOW, "n": 2}, deadline_s=begun_s)))
                ours.send(encode(Add(3, "last", [5], _SLOW)))
                for index in range(2):  # while the first one is being compiled
                    news = told.news.get(timeout=_PATIENCE_S)
                    assert isinstance(news, Progress)
                    assert news.end is not None
                    told_of = news.handle, news.index, news.end.finish_reason
                    assert told_of == (2, index, "deadline")
                    assert begun_s <= news.end.timings.arrival_s <= news.end.timings.finished_s
                engine.goes_on.set()
                added = [told.news.get(timeout=_PATIENCE_S)[0] for _ in range(2)]
    assert added == [1, 3]
    (first, left_s), (last, never) = engine.made
    assert (first, last, never) == ("first#1", "last#3", None)
    assert left_s is not None
    assert left_s < 1000


def test_figures_come_as_soon_as_it_works(monkeypatch: Any) -> None:
    monkeypatch.setattr(loops, "IDLE_STATS_S", 3600.0)
    monkeypatch.setattr(loops, "BUSY_STATS_S", 0.0)
    sent: queue.Queue[bytes] = queue.Queue()
    with vattn.LLM(EMBEDDED_PATH, page_bytes=4096, max_model_len=64, **SETTINGS) as llm:
        loop = loops.Loop(llm.engine, sent.put)
        thread = threading.Thread(target=loop.run)
        thread.start()
        try:
            idle = decode_news(sent.get(timeout=_PATIENCE_S))
            params = SamplingParams(max_tokens=20, ignore_eos=True)
            loop.add(1, "one", llm.engine.make_requests("one", [5, 6], params))
            busy = decode_news(sent.get(timeout=_PATIENCE_S))
        finally:
            loop.abort(1)
            loop.stop()
            thread.join(_PATIENCE_S)
        assert isinstance(idle, Steps)
        assert isinstance(busy, Steps)
        assert idle.stats is not None
        assert busy.stats is not None
        assert (idle.stats.engine.num_running, busy.stats.engine.num_running) == (0, 1)
        while llm.engine.has_unfinished:
            llm.engine.step()


_ENDS = """
import atexit, os, runpy, sys
from types import SimpleNamespace
sys.modules["vattn.engine_process.host"] = SimpleNamespace(run=lambda *addresses: 5)
atexit.register(os._exit, 9)  # whatever libraries do at the end of an interpreter
sys.argv = ["engine", "--commands", "a", "--news", "b"]
runpy.run_module("vattn.engine_process", run_name="__main__")
"""


def test_its_end_waits_for_no_library() -> None:
    with subprocess.Popen([sys.executable, "-c", _ENDS], stdin=subprocess.PIPE) as process:
        assert process.wait(_PATIENCE_S) == 5
