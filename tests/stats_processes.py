"""Processes for the tests of the figures page: they do what they are told, and wait."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator

from tests.cli_helpers import ROOT

# 3 MiB under a tag and 100 bytes without one, from a pool of 40 MiB in pages of 64 KiB.
BUSY = """
from vattn import _core
pool = _core.PagePool(_core.host_driver(), page_bytes=65536, budget_bytes=40 << 20)
allocator = _core.CachingAllocator(pool)
allocator.allocate(100)
_core.set_current_tag(_core.tag_id({tag!r}))
held = allocator.allocate(3 << 20)
"""
# A page that says it is of another version.
OTHER_VERSION = """
import os, struct
fd = os.memfd_create("vattn-stats")
os.write(fd, struct.pack("<QIIQQ", 0x31746174736E7476, 99, 4096, os.getpid(), 0) + bytes(4064))
"""


@contextlib.contextmanager
def running(program: str) -> Iterator[subprocess.Popen[str]]:
    """A Python process that has run the program and waits; it is killed at the end."""
    code = program + "\nprint('ready', flush=True)\ninput()\n"
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "ready\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def busy(tag: str = "weights") -> contextlib.AbstractContextManager[subprocess.Popen[str]]:
    """A process with a pool and an allocator."""
    return running(BUSY.format(tag=tag))
