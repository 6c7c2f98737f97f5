"""The owner's side of an engine process, as bare sockets, for tests of the process itself."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import zmq

from tests.engine_cases import EMBEDDED_PATH
from vattn.engine_process.messages import (
    VERSION,
    Add,
    Answer,
    Ask,
    End,
    Progress,
    Refused,
    Start,
    Stats,
    Steps,
    Trouble,
    decode_news,
    encode,
)
from vattn.engine_process.params import to_wire
from vattn.sampling_params import SamplingParams

# The page size of the embedded model is the default that is tested.
SETTINGS: dict[str, Any] = {"dtype": "float32", "device": "cpu", "max_num_seqs": 8}
_PATIENCE_MS = 120_000


@dataclass
class Sample:
    """What was told of a sample."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[dict[int, tuple[float, int]]] = field(default_factory=list)
    prompt_logprobs: list[Any] = field(default_factory=list)
    cached: int = 0
    end: End | None = None


class Owner:
    """Sockets of an owner, and all that it was told."""

    def __init__(self) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="vattn-test-"))
        self._context = zmq.Context()
        self._commands, self._news = self._bind("commands"), self._bind("news")
        self.addresses = [f"ipc://{self.directory}/{name}" for name in ("commands", "news")]
        self.samples: dict[tuple[int, int], Sample] = defaultdict(Sample)
        self.refused: dict[int, str] = {}
        self.stats: list[Stats] = []
        self._answers: dict[int, Answer | Trouble] = {}
        self._numbers = iter(range(1, 1 << 30))

    def _bind(self, name: str) -> zmq.Socket[bytes]:
        socket = self._context.socket(zmq.PAIR)
        socket.set_hwm(0)
        socket.linger = 0
        socket.bind(f"ipc://{self.directory}/{name}")
        return socket

    def close(self) -> None:
        for socket in (self._commands, self._news):
            socket.close(linger=0)
        self._context.term()
        shutil.rmtree(self.directory, ignore_errors=True)

    def send(self, command: Any) -> None:
        self._commands.send(encode(command))

    def start(self, model: str = str(EMBEDDED_PATH), **fields: Any) -> Any:
        """Says Start; what comes back."""
        given = {"settings": SETTINGS, "log_level": "warning"} | fields
        self.send(Start(**{"version": VERSION, "model": model, **given}))
        return self.receive()

    def receive(self) -> Any:
        assert self._news.poll(_PATIENCE_MS), "the engine process says nothing"
        news = decode_news(self._news.recv())
        match news:
            case Steps():
                for each in news.progress:
                    self._progress(each)
                if news.stats is not None:
                    self.stats.append(news.stats)
            case Refused():
                self.refused[news.handle] = news.error
            case Answer() | Trouble():
                self._answers[news.number] = news
        return news

    def _progress(self, news: Progress) -> None:
        sample = self.samples[news.handle, news.index]
        assert sample.end is None, news
        sample.tokens += news.tokens
        sample.logprobs += news.logprobs or []
        sample.prompt_logprobs += news.prompt_logprobs or []
        sample.cached, sample.end = news.cached, news.end

    def until(self, holds: Callable[[], Any]) -> None:
        """Receives until this holds."""
        while not holds():
            self.receive()

    def add(self, prompt_ids: list[int], params: SamplingParams, **more: Any) -> int:
        """A prompt; its handle."""
        handle = next(self._numbers)
        self.send(Add(handle, f"prompt-{handle}", prompt_ids, to_wire(params), **more))
        return handle

    def outcome(self, handle: int, n: int = 1) -> list[Sample]:
        """The samples of a prompt once all have ended."""
        keys = [(handle, index) for index in range(n)]
        self.until(lambda: all(self.samples[key].end for key in keys))
        return [self.samples[key] for key in keys]

    def ask(self, what: str, argument: Any = None) -> Any:
        """An answer's value, or the Trouble."""
        number = next(self._numbers)
        self.send(Ask(number, what, argument))
        self.until(lambda: number in self._answers)
        got = self._answers[number]
        return got.value if isinstance(got, Answer) else got


@contextmanager
def owner() -> Iterator[Owner]:
    made = Owner()
    try:
        yield made
    finally:
        made.close()


@contextmanager
def child(of: Owner) -> Iterator[subprocess.Popen[bytes]]:
    """A real engine process. Killed in the end, if it still runs."""
    commands, news = of.addresses
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "vattn.engine_process"),
            *("--commands", commands, "--news", news, "--directory", str(of.directory)),
        ],
        stdin=subprocess.PIPE,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert process.stdin is not None
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdin.close()
