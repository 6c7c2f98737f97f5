"""The examples for a server run against one, as a reader would run them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.running_server import RunningServer

pytest_plugins = ("tests.server_fixtures",)

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(*command: str) -> str:
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={name: value for name, value in os.environ.items() if name != "VATTN_API_KEY"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_openai_client(server: RunningServer) -> None:
    told = run(sys.executable, str(EXAMPLES / "openai_client.py"), server.url)
    assert "0: ..." in told
    assert "1: ..." in told
    assert told.splitlines()[-1].endswith("tokens of 8")


def test_curl(server: RunningServer) -> None:
    told = run("sh", str(EXAMPLES / "serve_curl.sh"), server.url)
    assert "data: [DONE]" in told
    assert '"text_completion"' in told
    assert '"tokens":' in told
    assert "vattn:remaps_avoided_total" in told
