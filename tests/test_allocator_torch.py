"""Real PyTorch programs on the entry points that torch.cuda's pluggable allocator calls.

Each scenario runs in a process of its own: the allocator of a process is for good.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.drivers import fake_library_path
from tests.fake_cuda.fake import ROOT
from tests.torch_bridge import compiled

PROGRAMS = ("program", "out_of_memory", "pause", "one_pool", "served")
ENTRIES = ("graph_pool", "threads", "bad_frees")
ON_FAKE = ("fraction", "record_stream", "fork", "fork_before", "driver_failure", "at_exit")


def run(name: str, kind: str) -> subprocess.CompletedProcess[str]:
    fake_library_path()
    compiled()
    module = "programs" if name in PROGRAMS else "entries"
    return subprocess.run(
        [sys.executable, "-m", f"tests.torch_bridge.{module}", name, kind],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )


@pytest.mark.parametrize(
    ("name", "kind"),
    [(name, kind) for name in PROGRAMS + ENTRIES for kind in ("host", "cuda_fake")]
    + [(name, "cuda_fake") for name in ON_FAKE],
)
def test_scenario(name: str, kind: str) -> None:
    done = run(name, kind)
    assert done.returncode == 0, done.stderr
    if name == "at_exit":
        assert done.stderr == ""


def test_bad_frees_are_told_once_for_each_kind() -> None:
    told = [line for line in run("bad_frees", "host").stderr.splitlines() if "vattn:" in line]
    assert len(told) == 3
    for kind, line in zip(("unknown", "wrong_size", "wrong_device"), told, strict=True):
        assert f"({kind};" in line
