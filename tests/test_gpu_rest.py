"""gpu-check after a lost CUDA context, and what it knows of the native module; without a GPU."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from bench.gpu import native
from bench.gpu.check import Run
from bench.gpu.stages import Stage

# A context that is lost ---------------------------------------------------------------------------

# The device, which no longer answers after the test that is named here.
CONFTEST = """
import os
import pytest
from tests.gpu import conftest as real
from tests.gpu.conftest import _errors_are_of_this_test, pytest_runtest_protocol

real.DEVICE = "cuda"
broken = []

@pytest.fixture
def breaks():
    broken.append(os.environ["STAYS"] == "yes")

def wait():
    if broken:
        if not broken[0]:
            broken.clear()
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

real.wait_for_device = wait
"""
TESTS = """
import os
import pytest

def test_a(): pass
@pytest.mark.parametrize("how", ["in place", "x"])
def test_b(how, request):
    if how == "in place":
        if os.environ["STAYS"] == "crash":
            os.abort()
        request.getfixturevalue("breaks")
def test_bb(): pass
def test_c(): pass
"""


@pytest.fixture
def fake_tests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stage:
    monkeypatch.setattr("bench.gpu.stages.ROOT", tmp_path)
    monkeypatch.setattr("bench.gpu.child.ROOT", tmp_path)
    (tmp_path / "conftest.py").write_text(CONFTEST)
    (tmp_path / "test_x.py").write_text("import pytest\npytestmark = pytest.mark.gpu\n" + TESTS)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu: x\n")
    return Stage("x", 0, 120, tests=("test_x.py",))


@pytest.mark.parametrize(
    ("stays", "processes", "note"),
    [
        ("no", 1, "exit code 1, 5 passed, 1 error"),  # the test passed, what it launched did not
        ("yes", 2, "exit code 2, 5 passed, 1 error"),
        ("crash", 2, "exit code -6, 4 passed"),
    ],
)
def test_after_a_lost_context_the_rest_runs_in_a_fresh_process(
    tmp_path: Path,
    fake_tests: Stage,
    monkeypatch: pytest.MonkeyPatch,
    stays: str,
    processes: int,
    note: str,
) -> None:
    monkeypatch.setenv("STAYS", stays)
    (outcome,) = Run(tmp_path / "out").all([fake_tests])
    assert (outcome.status, outcome.note) == ("failed", note), outcome.log
    assert outcome.log.count("test session starts") == processes
    lost = "the CUDA context is lost after test_x.py::test_b[in place]"
    assert (lost in outcome.log) == (stays == "yes")
    if stays != "crash":
        assert "test_x.py::test_b[in place] ERROR" in outcome.log
    for name in ("test_a", "test_b[x]", "test_bb", "test_c"):
        assert outcome.log.count(f"test_x.py::{name} PASSED") == 1


def test_without_time_the_rest_is_left(
    tmp_path: Path, fake_tests: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STAYS", "yes")
    monkeypatch.setattr("bench.gpu.child.LEAST_S", 100.0)
    (outcome,) = Run(tmp_path / "out", total_s=100).all([fake_tests])
    assert (outcome.status, outcome.note) == ("failed", "exit code 2, 2 passed, 1 error")


# The native module --------------------------------------------------------------------------------


def test_a_module_is_known_by_what_it_was_built_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, module, note = tmp_path / "x.cpp", tmp_path / "core.so", tmp_path / "build/note.json"
    source.write_text("int x;")
    module.write_text("built")
    monkeypatch.setattr(native, "ROOT", tmp_path)
    monkeypatch.setattr(native, "sources", lambda: [source])
    monkeypatch.setattr(native, "find_module", lambda: module)
    os.utime(module, (1000, 1000))
    newer = "x.cpp is newer than vattn._core"
    assert native.native_module_problem(note) == newer
    native.note_build(module, note)
    assert native.native_module_problem(note) is None  # whatever the times are
    source.write_text("int y;")
    os.utime(source, (500, 500))
    assert "not those that vattn._core was built from" in str(native.native_module_problem(note))
    module.write_text("built by hand")  # the note is not of this one: times decide
    assert native.native_module_problem(note) is None
    os.utime(module, (400, 400))
    assert native.native_module_problem(note) == newer
    monkeypatch.setattr(native, "find_module", lambda: None)
    assert native.native_module_problem(note) == "vattn._core is not built"
