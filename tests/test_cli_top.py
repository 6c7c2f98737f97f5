"""`vattn top` as a user meets it: tables, JSON, a live view, and what it refuses."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import signal
import subprocess
import sys
from typing import Any

import pytest
from rich.console import Console

from tests.cli_helpers import ROOT, Cli, assert_refused, start
from tests.stats_processes import OTHER_VERSION, busy, running
from vattn.allocator.figures_page import process
from vattn.cli.top import render

pytest_plugins = ("tests.cli_fixtures",)
pytestmark = pytest.mark.usefixtures("plain_environment")


def block_of(text: str, pid: int) -> str:
    """What is printed about one process."""
    (found,) = [part for part in text.split("\n\n") if part.startswith(f"{pid} ")]
    return found


# What it prints ---------------------------------------------------------------------------------


def test_pools_and_tags(cli: Cli) -> None:
    with busy("weights") as other:
        result = cli("top", other.pid, "--once")
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0].startswith(f"{other.pid}  ")
    rows = [re.split(r" {2,}|(?<=B) (?=\S)", line.strip()) for line in lines]
    (pool,) = [row for row in rows if row[0].startswith("host")]
    assert pool[0].split()[0] == "host"
    assert "40.0 MiB" in " ".join(pool)
    assert "3.1 MiB" in " ".join(pool)
    (weights,) = [line for line in lines if line.startswith("weights")]
    assert re.fullmatch(r"weights +host +3\.0 MiB +3\.0 MiB +3\.0 MiB +- +1 +in use *", weights)
    (no_tag,) = [line for line in lines if line.startswith("(no tag)")]
    assert re.search(r" 512 B +512 B +64\.0 KiB ", no_tag)
    assert max(map(len, lines)) <= 80
    assert "0x" not in result.stdout


def test_ranges(cli: Cli) -> None:
    with busy() as other:
        shown = process(other.pid).ranges
        text = cli("top", other.pid, "--once", "--ranges").stdout
        for each in shown:
            (line,) = [line for line in text.splitlines() if line.startswith(f"{each.address:#x} ")]
            assert each.tag in line
            assert each.kind in line
            assert "default" in line
    assert len(shown) == 2


def test_all_processes(cli: Cli) -> None:
    with busy("one") as first, busy("two") as second, running(OTHER_VERSION) as third:
        result = cli("top")  # stdout is no terminal: one look
    assert result.exit_code == 0, result.stderr
    text = result.stdout
    assert "one " in block_of(text, first.pid)
    assert "two " not in block_of(text, first.pid)
    assert "two " in block_of(text, second.pid)
    assert re.search(rf"^{third.pid} (.|\n)*version 99", text, re.MULTILINE)


def test_json(cli: Cli) -> None:
    with busy() as other:
        (line,) = cli("top", other.pid, "--json").stdout.splitlines()
        with_ranges = json.loads(cli("top", other.pid, "--json", "--ranges").stdout)
    report = json.loads(line)
    assert report["unreadable"] == []
    (found,) = report["processes"]
    assert found["pid"] == other.pid
    (pool,) = found["pools"]
    assert pool["budget_bytes"] == 40 << 20
    assert pool["torch_mapped_bytes"] == (3 << 20) + 65536
    assert pool["other_bytes"] == 0
    assert {tag["name"]: tag["live_bytes"] for tag in found["tags"]} == {
        "(no tag)": 512,
        "weights": 3 << 20,
    }
    assert "ranges" not in found
    assert len(with_ranges["processes"][0]["ranges"]) == 2


def test_nobody_is_there() -> None:
    out = io.StringIO()
    Console(file=out).print(render([], [], ranges=False))
    assert out.getvalue().startswith("no process")


def test_several_pools_of_a_driver_are_told_apart(cli: Cli) -> None:
    program = """
from vattn import _core
driver = _core.host_driver()
pools = [_core.PagePool(driver, page_bytes=4096, budget_bytes=n << 20) for n in (3, 5)]
"""
    with running(program) as other:
        text = cli("top", other.pid, "--once").stdout
    assert re.search(r"^host/0 +3\.0 MiB", text, re.MULTILINE)
    assert re.search(r"^host/1 +5\.0 MiB", text, re.MULTILINE)


def test_names_do_not_steer_the_terminal(cli: Cli) -> None:
    with busy("a\x1b[31mb\nc") as other:
        text = cli("top", other.pid, "--once").stdout
    assert "\x1b" not in text
    assert "a[31mb c" in text


# Live -------------------------------------------------------------------------------------------


def test_looks_go_on_until_the_process_ends() -> None:
    with busy() as other:
        top = start("top", other.pid, "--interval", 0.05, "--json")
        assert top.stdout is not None
        first = json.loads(top.stdout.readline())
        second = json.loads(top.stdout.readline())
        other.kill()
        rest, errors = top.communicate(timeout=60)
    assert top.returncode == 0, errors
    assert errors == ""
    assert first["processes"][0]["pools"] == second["processes"][0]["pools"]
    assert all(json.loads(line) for line in rest.splitlines())


def test_live_view_on_a_terminal() -> None:
    controller, terminal = pty.openpty()
    with busy("weights") as other:
        top = start(
            "top",
            other.pid,
            "--interval",
            0.05,
            stdout=terminal,
            env={**os.environ, "TERM": "xterm", "COLUMNS": "80", "LINES": "40"},
        )
        os.close(terminal)
        seen = b""
        while seen.count(b"weights") < 3:  # it is drawn again and again
            seen += os.read(controller, 65536)
        other.kill()
        while b"the process has ended" not in seen:
            seen += os.read(controller, 65536)
        _, errors = top.communicate(timeout=60)
    os.close(controller)
    assert top.returncode == 0
    assert errors == ""


def test_ends_by_ctrl_c() -> None:
    with busy() as other:
        top = start("top", other.pid, "--interval", 0.05, "--json")
        assert top.stdout is not None
        top.stdout.readline()
        top.send_signal(signal.SIGINT)
        _, errors = top.communicate(timeout=60)
    assert top.returncode == 130
    assert errors == ""


def test_starts_without_torch() -> None:
    code = """
import sys
from vattn.cli import app
try:
    app(["top", "--once", "--ranges"])
except SystemExit as end:
    assert end.code == 0, end.code
assert not {"torch", "transformers", "numpy"} & set(sys.modules)
"""
    with busy():
        subprocess.run(
            [sys.executable, "-c", code], check=True, cwd=ROOT, timeout=60, capture_output=True
        )


# What it refuses --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("--interval", 0), ("--interval 0", "at least 0.05 seconds")),
        (("--interval", "nan"), ("--interval nan", "at least 0.05 seconds")),
        (("--interval", 2, "--once"), ("--interval 2", "--once")),
        (("--interval", "soon"), ("'soon' is not a number",)),
        ((0,), ("PID 0",)),
        (("me",), ("'me' is not a whole number",)),
    ],
)
def test_bad_input(cli: Cli, arguments: tuple[Any, ...], parts: tuple[str, ...]) -> None:
    assert_refused(cli("top", *arguments), *parts)


def test_process_that_is_not_there(cli: Cli) -> None:
    with busy() as other:
        pass
    assert_refused(cli("top", other.pid, "--once"), f"no process {other.pid}", "vattn top")


def test_process_that_does_not_use_vattn(cli: Cli) -> None:
    with running("import vattn") as other:
        assert_refused(cli("top", other.pid), f"process {other.pid} has no pool of vattn")


def test_process_of_somebody_else(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Any) -> list[str]:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("vattn.allocator.figures_page.os.listdir", refuse)
    result = cli("top", os.getpid())
    assert result.exit_code == 1
    (line,) = result.stderr.splitlines()
    assert "belongs to somebody else" in line
