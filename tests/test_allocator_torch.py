"""Real PyTorch programs on the entry points that torch.cuda's pluggable allocator calls.

Each scenario runs in a process of its own: the allocator of a process is for good.
"""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from tests.drivers import fake_library_path
from tests.fake_cuda.fake import ROOT
from tests.torch_bridge import compiled

if TYPE_CHECKING:
    from tests.own_process import Template

pytest_plugins = ("tests.own_process",)

PROGRAMS = ("program", "out_of_memory", "pause", "one_pool", "served")
ENTRIES = ("graph_pool", "threads", "bad_frees")
ON_FAKE = ("fraction", "record_stream", "fork", "fork_before", "driver_failure")


def run(own_process: Template, name: str, kind: str) -> subprocess.CompletedProcess[str]:
    fake_library_path()
    compiled()
    module = "programs" if name in PROGRAMS else "entries"
    return own_process.run_module(f"tests.torch_bridge.{module}", name, kind)


@pytest.mark.parametrize(
    ("name", "kind"),
    [(name, kind) for name in PROGRAMS + ENTRIES for kind in ("host", "cuda_fake")]
    + [(name, "cuda_fake") for name in ON_FAKE],
)
def test_scenario(own_process: Template, name: str, kind: str) -> None:
    done = run(own_process, name, kind)
    assert done.returncode == 0, done.stderr


def test_nothing_is_said_at_exit() -> None:
    """In a fresh interpreter: a fork of a frozen heap ends otherwise."""
    fake_library_path()
    compiled()
    done = subprocess.run(
        [sys.executable, "-m", "tests.torch_bridge.entries", "at_exit", "cuda_fake"],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_bad_frees_are_told_once_for_each_kind(own_process: Template) -> None:
    stderr = run(own_process, "bad_frees", "host").stderr
    told = [line for line in stderr.splitlines() if "vattn:" in line]
    assert len(told) == 3
    for kind, line in zip(("unknown", "wrong_size", "wrong_device"), told, strict=True):
        assert f"({kind};" in line
