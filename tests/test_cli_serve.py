"""`vattn serve` as people run it: in a process of its own, ended by a signal."""

from __future__ import annotations

import logging
import os
import shlex
import signal
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import httpx
import pytest

from tests.cli_helpers import Cli, assert_refused, start
from vattn.cli.serve_flags import Flags, variable

pytest_plugins = ("tests.cli_fixtures",)
PATIENCE_S = 120


@pytest.fixture(autouse=True)
def logging_as_it_was() -> Iterator[None]:
    """A command that runs in this process sets its logging up for good."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.fixture
def serving() -> Iterator[subprocess.Popen[str]]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "VATTN_LOG_LEVEL": "warning"}
    process = start("serve", "--port", "0", "--max-num-seqs", "4", env=environment)
    yield process
    process.kill()
    process.communicate()


def test_it_serves_drains_and_ends(serving: subprocess.Popen[str]) -> None:
    """The printed line works, a running stream ends well after SIGTERM, nothing is left."""
    assert serving.stdout is not None
    page = serving.stdout.readline()
    line = serving.stdout.readline().partition("curl ")[2]
    url = line.split()[0].removesuffix("/v1/completions")
    assert f"{url}/" in page
    done = subprocess.run(
        ["curl", "-s", *shlex.split(line)], capture_output=True, text=True, check=True
    )
    assert '"text":"' in done.stdout
    children = Path(f"/proc/{serving.pid}/task/{serving.pid}/children").read_text().split()
    assert children
    body = {"prompt": "A transaction", "max_tokens": 300, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=PATIENCE_S) as stream:
        parts = stream.iter_text()
        text = next(parts)
        serving.send_signal(signal.SIGTERM)
        text += "".join(parts)
    assert text.rstrip().endswith("data: [DONE]")
    assert '"finish_reason":"length"' in text
    assert serving.wait(PATIENCE_S) == 0
    assert not [pid for pid in children if Path(f"/proc/{pid}").exists()]


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        (["--port", "x"], "not a whole number"),
        (["--port", "70000"], "--port"),
        (["--page-bytes", "much"], "--page-bytes"),
        (["--max-num-seqs", "0"], "--max-num-seqs"),
        (["--tool-call-parser", "none"], "--tool-call-parser"),
        (["--enable-auto-tool-choice"], "tool_call_parser"),
        (["--ssl-keyfile", "x"], "ssl_certfile"),
        (["--allowed-origins", "nobody"], "--allowed-origins"),
        (["--chat-template", "/nothing"], "--chat-template"),
        (["--api-key", "sécret"], "--api-key has a key that no header can carry"),
        (["--admin-api-key", "a\tb"], "--admin-api-key"),
        (["--api-key", "two words"], "--api-key"),
        (["--ssl-keyfile", "x", "--ssl-certfile", "y"], "--ssl-certfile y is no"),
        (["--ssl-keyfile", __file__, "--ssl-certfile", __file__], "PEM"),
        (["--engine-timeout", "0"], "--engine-timeout 0"),
        (["--start-timeout", "inf"], "--start-timeout inf"),
        (["--nothing"], "--nothing"),
    ],
)
def test_bad_flags(cli: Cli, flags: list[str], part: str) -> None:
    assert_refused(cli("serve", *flags), part)


def test_environment_and_file(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A flag goes before the environment, and that before the file."""
    config = tmp_path / "serve.yaml"
    config.write_text("port: 70001\nallowed-origins: [a]\n")
    assert_refused(cli("serve", "--config", config), "--port 70001")
    monkeypatch.setenv("VATTN_PORT", "70002")
    assert_refused(cli("serve", "--config", config), "--port 70002")
    assert_refused(cli("serve", "--config", config, "--port", "70003"), "--port 70003")
    monkeypatch.setenv("VATTN_PORT", "tcp://10.0.0.1:80")
    assert_refused(cli("serve"), "Kubernetes")


@pytest.mark.parametrize(
    ("name", "meant"),
    [("API_KEYS", "API_KEY"), ("MAX_NUM_SEQ", "MAX_NUM_SEQS"), ("SERVER_KEY", "API_KEY")],
)
def test_variables_that_look_mistyped(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, name: str, meant: str
) -> None:
    monkeypatch.setenv(f"VATTN_{name}", "3")
    assert_refused(cli("serve", "--port", "70000"), f"VATTN_{name} in", f"use VATTN_{meant},")


@pytest.mark.parametrize("name", ["VATTN_API_KEY", "VATTN_ADMIN_API_KEY"])
def test_an_empty_key_does_not_open(cli: Cli, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "")
    assert_refused(cli("serve", "--port", "70000"), f"{name} in the environment is empty")


def test_other_variables_are_no_errors(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SERVICE_HOST", "PORT_8000_TCP", "BUDGET", "SOMETHING_ELSE"):
        monkeypatch.setenv(f"VATTN_{name}", "3")
    assert_refused(cli("serve", "--port", "70000"), "--port 70000")


def test_help_has_whole_names(cli: Cli) -> None:
    """Of all flags and variables, in the 80 columns that a pipe has."""
    text = cli("serve", "--help").stdout
    words = set(text.replace("]", " ").replace("/", " ").split())
    for field in fields(Flags):
        names = {variable(field.name)}
        if field.name != "model":
            names.add("--" + field.name.replace("_", "-"))
        assert names <= words
    assert max(map(len, text.splitlines())) <= 80
    assert "--no-enable-prefix-caching" in words


@pytest.mark.parametrize("text", ["nothing: 1", "[", "- a", "port: true", "enforce-eager: 1"])
def test_bad_files(cli: Cli, tmp_path: Path, text: str) -> None:
    config = tmp_path / "serve.yaml"
    config.write_text(text)
    assert_refused(cli("serve", "--config", config), str(config))


def test_a_taken_port_fails_before_loading(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[object] = []
    monkeypatch.setattr("vattn.server.run._serve", lambda *given: made.append(given))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        result = cli("serve", "--port", taken.getsockname()[1], "--log-level", "error")
    assert result.exit_code == 1
    assert "give another port or host" in result.stderr
    assert made == []
