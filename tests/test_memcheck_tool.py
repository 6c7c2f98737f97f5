"""What finds compute-sanitizer, runs it and reads what it says, without a GPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.gpu import memcheck
from bench.gpu.child import GRACE_S, TIMEOUT_CODE

UNSUPPORTED = "========= Error: Device not supported. Please see the documentation"


def make_tool(folder: Path, script: str) -> str:
    tool = folder / "compute-sanitizer"
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(0o755)
    return str(tool)


def test_errors_are_counted() -> None:
    log = "========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: {} errors\n"
    assert memcheck.errors_in(log.format(0)) == 0
    assert memcheck.errors_in(log.format(12)) == 12
    assert memcheck.errors_in("========= ERROR SUMMARY: 1 error\n") == 1
    assert memcheck.errors_in("cut short") is None


@pytest.mark.parametrize(
    ("script", "status", "errors", "code"),
    [
        ('echo \'{"steps": 3}\'; echo "========= ERROR SUMMARY: 0 errors"', "passed", 0, 0),
        (
            'echo \'{"steps": 3}\'; echo "========= ERROR SUMMARY: 2 errors"; exit 86',
            *("failed", 2, 86),
        ),
        ('echo "========= ERROR SUMMARY: 0 errors"', "failed", 0, 0),  # nothing was run
        ("echo broken; exit 1", "failed", None, 1),
        (f'echo "{UNSUPPORTED}"; exit 1', "skipped", None, 1),
        (  # the run went on without the tool
            f'echo "{UNSUPPORTED}"; echo \'{{"steps": 3}}\'; echo "= ERROR SUMMARY: 0 errors"',
            *("skipped", 0, 0),
        ),
        (
            f'echo "{UNSUPPORTED}"; echo "========= ERROR SUMMARY: 2 errors"; exit 86',
            *("failed", 2, 86),
        ),
    ],
)
def test_what_the_tool_says_is_believed(
    tmp_path: Path, script: str, status: str, errors: int | None, code: int | None
) -> None:
    result = memcheck.check(make_tool(tmp_path, script), limit_s=60)
    assert (result["status"], result["errors"], result["exit_code"]) == (status, errors, code)


def test_a_run_that_comes_to_no_end_is_no_failure_of_memory(tmp_path: Path) -> None:
    result = memcheck.check(make_tool(tmp_path, "exec sleep 600"), limit_s=GRACE_S + 0.5)
    assert (result["status"], result["errors"], result["exit_code"]) == ("timeout", None, None)


@pytest.mark.parametrize(
    ("script", "limit_s", "code", "last", "status"),
    [
        ("exec sleep 600", GRACE_S + 0.5, TIMEOUT_CODE, "give it more: --limit-s", "timeout"),
        (
            f'echo "{UNSUPPORTED}"; exit 1',
            60.0,
            0,
            "skipped: Device not supported. Please see",
            None,
        ),
        ("echo broken; exit 1", 60.0, 1, "broken", "failed"),
    ],
)
def test_the_exit_status_and_the_last_line_are_for_gpu_check(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    script: str,
    limit_s: float,
    code: int,
    last: str,
    status: str | None,
) -> None:
    tool = make_tool(tmp_path, script)
    monkeypatch.setattr(memcheck, "gpu_missing", lambda: None)
    monkeypatch.setattr(memcheck, "find_sanitizer", lambda: tool)
    path = tmp_path / "memcheck.json"
    assert memcheck.main(["--limit-s", str(limit_s), "--json", str(path)]) == code
    assert last in capsys.readouterr().out.strip().splitlines()[-1]
    assert (json.loads(path.read_text())["status"] if path.exists() else None) == status


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
