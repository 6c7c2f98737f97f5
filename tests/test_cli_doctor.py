"""`vattn doctor` as a user meets it, and what it asks of drivers and packages."""

import contextlib
import json
import os
import re
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import vattn
from tests.cli_helpers import ROOT, Cli, assert_refused, start
from vattn.cli import probes

pytest_plugins = ("tests.cli_fixtures",)
pytestmark = pytest.mark.usefixtures("plain_environment")

FAKE_CUDA = Path(
    os.environ.get("VATTN_FAKE_CUDA", ROOT / "build" / "fake_cuda" / "libfake_cuda.so")
)


def test_doctor_on_any_machine(cli: Cli) -> None:
    result = cli("doctor")
    assert result.exit_code == 0, result.output
    assert f"vattn {vattn.__version__}" in result.stdout
    for text in ("mapped, wrote, aliased and unmapped", "16.0 KiB", "vm.max_map_count", "SDPA"):
        assert text in result.stdout
    assert max(len(line) for line in result.stdout.splitlines()) <= 80


def test_doctor_in_json(cli: Cli) -> None:
    report = json.loads(cli("doctor", "--json").stdout)
    assert report["versions"]["torch"] == torch.__version__
    assert report["host"]["self_test"]["ok"] is True
    assert report["host"]["granularity_bytes"] == 4096
    assert 0 < report["host"]["default_budget_bytes"] <= report["host"]["free_bytes"]
    backends = {backend["name"]: backend for backend in report["attention"]}
    assert backends["SDPA"]["usable"] is True
    for backend in backends.values():
        assert backend["usable"] or backend["lacks"] or backend["remedy"]
        assert (backend["version"] is None) == (backend["remedy"] is not None)


def test_doctor_without_libcuda(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VATTN_LIBCUDA", "/nowhere/libcuda.so")
    result = cli("doctor")
    assert result.exit_code == 0
    assert "/nowhere/libcuda.so" in result.stdout
    assert "NVIDIA GPU and its driver" in " ".join(result.stdout.split())


def test_doctor_with_a_library_that_is_no_libcuda(
    cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VATTN_LIBCUDA", "libc.so.6")
    result = cli("doctor")
    assert result.exit_code == 0
    assert "cuInit" in result.stdout


@pytest.mark.skipif(not FAKE_CUDA.exists(), reason="no fake CUDA driver here; make fake builds it")
def test_doctor_with_the_fake_gpu() -> None:
    environment = {**os.environ, "VATTN_LIBCUDA": str(FAKE_CUDA)}
    process = start("doctor", "--json", env=environment)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    cuda = json.loads(out)["cuda"]
    assert cuda["found"] is True
    assert re.fullmatch(r"\d+\.\d+", cuda["driver_version"])
    for device in cuda["devices"]:
        assert device["capability"] == "9.0"
        assert device["self_test"]["ok"] is True
        assert device["granularity_bytes"] == 2 << 20


def test_bad_budget_in_the_environment(
    cli: Cli, generate: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VATTN_BUDGET", "lots")
    assert_refused(cli("doctor"), "VATTN_BUDGET='lots'", "512MiB")
    assert_refused(generate("-p", "a"), "VATTN_BUDGET='lots'", "512MiB")


def test_doctor_fails_if_the_host_driver_fails(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ctypes.string_at", lambda address, size: bytes(size))
    result = cli("doctor")
    assert result.exit_code == 1
    assert "failed" in result.stdout
    assert "not seen at its alias" in " ".join(result.stdout.split())


@contextlib.contextmanager
def bindings(call: Callable[..., Any]) -> Iterator[None]:
    """A stand-in for cuda.bindings.driver, which machines without a GPU need not have."""
    attributes = {f"CU_DEVICE_ATTRIBUTE_{name}": name for name in ("MULTIPROCESSOR_COUNT",)}
    driver = types.SimpleNamespace(
        cuInit=lambda flags: (0,),
        cuDeviceGet=lambda index: (0, index),
        cuDeviceGetAttribute=call,
        CUdevice_attribute=types.SimpleNamespace(**attributes),
    )
    modules: Any = {
        "cuda": types.ModuleType("cuda"),
        "cuda.bindings": types.SimpleNamespace(driver=driver),
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, module in modules.items():
            patch.setitem(sys.modules, name, module)
        yield


def test_properties_by_cuda_bindings() -> None:
    with bindings(lambda which, device: (0, 132)):
        assert probes._properties(0) == {"multiprocessors": 132}
    with bindings(lambda which, device: (1, 0)):
        assert probes._properties(0) == {}

    def broken(which: str, device: int) -> None:
        raise RuntimeError("no libcuda")

    with bindings(broken):
        assert probes._properties(0) == {"error": "no libcuda"}


@pytest.mark.parametrize(
    ("gpu", "usable"),
    [(None, set()), ((7, 5), set()), ((8, 0), {"PyTorch FlashAttention", "FlashAttention-2"})],
)
def test_backends_need_their_gpu(
    monkeypatch: pytest.MonkeyPatch, gpu: tuple[int, int] | None, usable: set[str]
) -> None:
    installed = {"flash_attn": "2.8.0", "flash_attn_interface": "3.0.0"}
    monkeypatch.setattr(probes, "_package", lambda module, *_: installed.get(module))
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    found = {b["name"] for b in probes.attention(gpu) if b["usable"]}
    assert found == {"SDPA"} | usable
