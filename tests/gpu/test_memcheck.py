"""A short engine run under compute-sanitizer's memcheck, and what finds and reads the tool."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.gpu import memcheck


def test_the_run_does_what_it_is_there_for(device: str) -> None:
    did = memcheck.run(device)
    assert (did["by_graph"] > 0) == (device == "cuda")
    assert min(did[name] for name in ("prefix_hit_tokens", "forked", "preempted")) > 0


def test_no_kernel_leaves_its_memory(device: str) -> None:
    if device != "cuda":
        pytest.skip("needs kernels")
    sanitizer = memcheck.find_sanitizer()
    if sanitizer is None:
        pytest.skip("no compute-sanitizer is installed")
    result = memcheck.check(sanitizer)
    assert result["passed"], result


def test_errors_are_counted() -> None:
    log = "========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: {} errors\n"
    assert memcheck.errors_in(log.format(0)) == 0
    assert memcheck.errors_in(log.format(12)) == 12
    assert memcheck.errors_in("========= ERROR SUMMARY: 1 error\n") == 1
    assert memcheck.errors_in("cut short") is None


@pytest.mark.parametrize(
    ("script", "passed", "errors", "code"),
    [
        ('echo \'{"steps": 3}\'; echo "========= ERROR SUMMARY: 0 errors"', True, 0, 0),
        ('echo \'{"steps": 3}\'; echo "========= ERROR SUMMARY: 2 errors"; exit 86', False, 2, 86),
        ('echo "========= ERROR SUMMARY: 0 errors"', False, 0, 0),  # nothing was run
        ("echo broken; exit 1", False, None, 1),
        ("echo started; exec sleep 60", False, None, None),
    ],
)
def test_what_the_tool_says_is_believed(
    tmp_path: Path, script: str, passed: bool, errors: int | None, code: int | None
) -> None:
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(0o755)
    result = memcheck.check(str(tool), limit_s=5)
    assert (result["passed"], result["errors"], result["exit_code"]) == (passed, errors, code)


def test_the_tool_is_found_beside_the_toolkit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = tmp_path / "bin" / "compute-sanitizer"
    tool.parent.mkdir()
    tool.write_text("")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert memcheck.find_sanitizer() != str(tool)  # it cannot be run
    tool.chmod(0o755)
    assert memcheck.find_sanitizer() == str(tool)
