"""Owners of the engine process that computes nothing, for tests of owners."""

from __future__ import annotations

import asyncio
import gc
import os
import tempfile
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from vattn.engine_process import spawn, supervisor
from vattn.engine_process.messages import VERSION, Start
from vattn.engine_process.owner import Owner
from vattn.outputs import RequestOutput
from vattn.sampling_params import SamplingParams


def _left() -> tuple[set[str], set[str], int]:
    """Children, directories of ours and threads, which must be as before."""
    gc.collect()
    tasks = Path(f"/proc/{os.getpid()}/task")
    children: set[str] = set()
    for task in tasks.iterdir():
        with suppress(FileNotFoundError):  # the thread has ended
            children.update((task / "children").read_text().split())
    ours = Path(tempfile.gettempdir()).glob(f"*vattn-*{os.getpid()}-*")
    return children, {str(path) for path in ours}, threading.active_count()


def _fds() -> int:
    return len(os.listdir("/proc/self/fd"))


def _nothing_more(before: tuple[set[str], set[str], int], fds: int) -> bool:
    """Less may be left: a server of another test's may close connections meanwhile."""
    children, paths, threads = _left()
    left = children <= before[0] and paths <= before[1] and threads <= before[2]
    return left and _fds() <= fds


Make = Callable[..., Owner]


@contextmanager
def owners_of_stubs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Make]:
    """Makes owners, and verifies in the end that nothing is left of them."""
    monkeypatch.setattr(spawn, "ENGINE_MODULE", "tests.stub_engine")
    monkeypatch.setattr(supervisor, "_MAX_DELAY_S", 0.01)

    def make_owner(what: str = "works", **settings: Any) -> Owner:
        start = Start(VERSION, str(tmp_path / "starts"), {"what": what})
        given = {"restart": True, "engine_timeout_s": 60.0, "start_timeout_s": 60.0, **settings}
        return Owner(partial(supervisor.Supervisor, start, **given))

    asyncio.run(asyncio.sleep(0))
    before, fds = _left(), _fds()
    yield make_owner
    deadline = time.monotonic() + 10
    while not _nothing_more(before, fds):
        assert time.monotonic() < deadline, (_left(), before, _fds(), fds)
        time.sleep(0.01)


def run(owner: Owner, what: Coroutine[Any, Any, None]) -> None:
    async def whole() -> None:
        try:
            async with asyncio.timeout(60):
                await what
        finally:
            await owner.close()
        owner.check_idle()

    asyncio.run(whole())


async def outputs(owner: Owner, prompt: Any, name: str = "a", **params: Any) -> list[RequestOutput]:
    mirror = await owner.add(prompt, SamplingParams(**params), name, 0, None)
    found: list[RequestOutput] = []
    try:
        while not found or not found[-1].finished:
            found.append(await mirror.next_output())
    finally:
        owner.drop(mirror)
    return found


async def until(is_so: Callable[[], bool]) -> None:
    while not is_so():
        await asyncio.sleep(0.005)
