"""How a server ends while requests run: without time for them, and at once."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import ssl
import subprocess
import threading
from dataclasses import replace
from pathlib import Path

import httpx
import pytest

from tests.running_server import PATIENCE_S, RunningServer, paused
from vattn.async_llm import AsyncLLM
from vattn.server.run import Signals, _drain, serve
from vattn.server.settings import ServerSettings

pytest_plugins = ("tests.server_fixtures",)

LONG = {"prompt": "A transaction is", "max_tokens": 500, "n": 8, "stream": True}


def drain(server: RunningServer, signals: Signals) -> None:
    """What a signal begins, of a server that goes on afterwards, with no time for what runs."""
    state = replace(server.state, settings=replace(server.settings, drain_timeout_s=0))

    async def drained() -> None:
        never = asyncio.get_running_loop().create_future()
        await _drain(state, signals, never)  # type: ignore[arg-type]

    server.call(drained())


def test_what_runs_ends_with_what_it_has(server: RunningServer) -> None:
    with server.client() as client:
        stream = client.completions.create(
            model="embedded",
            extra_body={"ignore_eos": True},
            **LONG,  # type: ignore[call-overload]
        )
        chunks = [next(stream)]
        drain(server, Signals())
        assert server.state.admission.samples == 0
        chunks += stream
    ends = {
        choice.index: (choice.finish_reason, choice.stop_reason)
        for chunk in chunks
        for choice in chunk.choices
        if choice.finish_reason
    }
    assert ends == dict.fromkeys(range(8), ("length", "abort"))


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    """Its own, for this machine's address, with the key in the same file."""
    if shutil.which("openssl") is None:
        pytest.skip("certificates are made by openssl")
    path = tmp_path / "certificate.pem"
    make = ("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256")
    what = ("-nodes", "-days", "1", "-subj", "/CN=x", "-addext", "subjectAltName=IP:127.0.0.1")
    files = ("-keyout", path, "-out", tmp_path / "alone.pem")
    subprocess.run([*make, *what, *files], check=True, capture_output=True)
    path.write_text(path.read_text() + (tmp_path / "alone.pem").read_text())
    return path


def test_a_second_signal_ends_at_once(certificate: Path) -> None:
    """What runs is given up, though there would be time for it; over HTTPS."""
    failures: list[BaseException] = []
    threads: list[threading.Thread] = []
    sent: list[int] = []

    def end() -> None:
        sent.append(signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)

    def client(url: str, llm: AsyncLLM) -> None:
        assert url.startswith("https://")
        trust = ssl.create_default_context(cafile=str(certificate))
        with httpx.Client(base_url=url, verify=trust, timeout=PATIENCE_S) as client:
            body = {**LONG, "ignore_eos": True}
            with client.stream("POST", "/v1/completions", json=body) as response:
                chunks = response.iter_text()
                next(chunks)
                with paused(llm):
                    end()
                    while client.get("/health").status_code != 503:
                        pass
                    refused = client.post("/v1/completions", json={"prompt": "A"})
                    assert refused.status_code == 503, refused.text
                    assert "retry-after" in refused.headers
                    end()
                    text = ""
                    with contextlib.suppress(httpx.TransportError):  # it is told, or cut off
                        for chunk in chunks:
                            text += chunk
                assert '"finish_reason":"length"' not in text

    def run(url: str, llm: AsyncLLM) -> None:
        try:
            client(url, llm)
        except BaseException as error:
            failures.append(error)
            while len(sent) < 2:  # a third one could meet pytest instead
                end()

    def told(url: str, llm: AsyncLLM) -> None:
        threads.append(threading.Thread(target=run, args=(url, llm)))
        threads[0].start()

    files = {"ssl_keyfile": str(certificate), "ssl_certfile": str(certificate)}
    settings = ServerSettings(port=0, drain_timeout_s=1000, **files)  # type: ignore[arg-type]
    code = serve(lambda: AsyncLLM(log_level="error", max_num_seqs=16), settings, told)
    threads[0].join(PATIENCE_S)
    assert not threads[0].is_alive()
    if failures:
        raise failures[0]
    assert code == 0
