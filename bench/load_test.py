"""Load generators of others against `vattn serve`, unmodified: guidellm and aiperf.

    make load-test     # installs both, each in an environment of its own, and runs this

A server of the embedded model is started on a free port of 127.0.0.1, and each of them sends a
bounded number of requests with synthetic prompts. Their reports go to results/load-test; a failed
request, or none at all, is an error.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.common import print_table
from vattn.models import tiny_path

REQUESTS, STREAMS, PROMPT, ANSWER = 40, 4, 32, 16
SERVER_S, TOOL_S = 120.0, 300.0
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
MODEL = "embedded"


@dataclass(frozen=True)
class Tool:
    """A load generator: how it is called, and what its report counts."""

    name: str
    command: Callable[[str, Path], list[str]]  # of the server's URL and the folder for reports
    counts: Callable[[Path], tuple[int, int]]  # requests that succeeded, that failed
    environment: Mapping[str, str] = field(default_factory=dict)


def guidellm(url: str, folder: Path) -> list[str]:
    tokens = f"prompt_tokens={PROMPT},output_tokens={ANSWER}"
    return [
        *("run", "--disable-progress"),
        *("--backend", f"kind=openai_http,target={url},model={MODEL}"),
        *("--profile", f"kind=concurrent,streams={STREAMS}"),
        *("--constraint", f"kind=max_requests,count={REQUESTS}"),
        *("--constraint", f"kind=max_duration,seconds={TOOL_S / 2:.0f}"),
        *("--tokenizer", f"kind=hf_auto,model={tiny_path()}"),
        *("--data", f"kind=synthetic_text,{tokens}"),
        *("--output", f"kind=json,path={folder / 'guidellm.json'}"),
    ]


def guidellm_counts(folder: Path) -> tuple[int, int]:
    found: Any = json.loads((folder / "guidellm.json").read_text())
    totals = [run["metrics"]["request_totals"] for run in found["benchmarks"]]
    failed = sum(t["errored"] + t["incomplete"] for t in totals)
    return sum(t["successful"] for t in totals), failed


def aiperf(url: str, folder: Path) -> list[str]:
    return [
        *("profile", "--model", MODEL, "--url", url, "--tokenizer", str(tiny_path())),
        *("--endpoint-type", "chat", "--streaming", "--ui", "none"),
        *("--concurrency", str(STREAMS), "--request-count", str(REQUESTS)),
        *("--isl", str(PROMPT), "--osl", str(ANSWER), "--extra-inputs", "ignore_eos:true"),
        *("--output-artifact-dir", str(folder / "aiperf")),
    ]


def aiperf_counts(folder: Path) -> tuple[int, int]:
    (path,) = (folder / "aiperf").rglob("profile_export_aiperf.json")
    found: Any = json.loads(path.read_text())

    def count(name: str) -> int:
        return int((found.get(name) or {}).get("avg") or 0)

    return count("request_count"), count("error_request_count")


TOOLS = (
    Tool("guidellm", guidellm, guidellm_counts, OFFLINE),
    # Told to be offline, it takes a directory for the name of a repository.
    Tool("aiperf", aiperf, aiperf_counts),
)


@contextmanager
def server() -> Iterator[str]:
    """The URL of a `vattn serve`, which ends with it."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    process = subprocess.Popen([sys.executable, "-m", "vattn.cli", "serve", "--port", str(port)])
    try:
        wait_until_healthy(url, process)
        yield url
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        finally:
            process.kill()


def wait_until_healthy(url: str, process: subprocess.Popen[bytes]) -> None:
    """Returns when ``/health`` answers 200.

    Raises:
        RuntimeError: the server has ended, or does not serve in time.
    """
    end = time.monotonic() + SERVER_S
    while time.monotonic() < end and process.poll() is None:
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):
                return
        except OSError:
            time.sleep(0.2)
    raise RuntimeError(f"the server does not serve; exit code {process.poll()}")


def main(argv: Sequence[str] | None = None) -> int:
    cli = argparse.ArgumentParser(prog="python -m bench.load_test", description=__doc__)
    for tool in TOOLS:
        cli.add_argument(f"--{tool.name}", type=Path, metavar="PROGRAM", help="run this one")
    cli.add_argument("--results", type=Path, default=Path("results/load-test"))
    args = cli.parse_args(argv)
    args.results.mkdir(parents=True, exist_ok=True)
    chosen = [(tool, path) for tool in TOOLS if (path := getattr(args, tool.name)) is not None]
    if not chosen:
        cli.error("give --guidellm PROGRAM or --aiperf PROGRAM")
    rows: list[tuple[str, int, int]] = []
    with server() as url:
        for tool, program in chosen:
            command = [str(program), *tool.command(url, args.results)]
            with (args.results / f"{tool.name}.log").open("w") as log:
                subprocess.run(
                    command,
                    env={**os.environ, **tool.environment},
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    timeout=TOOL_S,
                    check=True,
                )
            rows.append((tool.name, *tool.counts(args.results)))
    print_table("requests", ["by", "succeeded", "failed"], rows)
    return int(any(failed or succeeded < REQUESTS for _, succeeded, failed in rows))


if __name__ == "__main__":
    raise SystemExit(main())
