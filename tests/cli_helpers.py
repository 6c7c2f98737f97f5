"""Calls of the command line in tests, and what they are judged by."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 256  # tokens of the random model
PROMPT = "The pages of a slot are mapped when tokens come."

Cli = Callable[..., Any]


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())


def write_prompts(path: Path, *prompts: str) -> Path:
    """A file for --prompts."""
    path.write_text("\n".join(prompts) + "\n")
    return path


def copy_without(model_dir: Path, path: Path, *patterns: str) -> Path:
    shutil.copytree(model_dir, path, ignore=shutil.ignore_patterns(*patterns))
    return path


def assert_refused(result: Any, *parts: str) -> None:
    """One line on stderr that holds the parts, no text, exit code 2."""
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    for part in parts:
        assert part in line


def start(*args: object, **how: Any) -> subprocess.Popen[str]:
    """`vattn` in a process of its own."""

    def default_signals() -> None:  # a parent in the background may ignore Ctrl-C
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    command = [sys.executable, "-m", "vattn.cli", *map(str, args)]
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **how}
    return subprocess.Popen(command, text=True, preexec_fn=default_signals, cwd=ROOT, **pipes)
