"""What a machine offers to vattn, found out by trying: plain dicts, ready for JSON."""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import vattn
from vattn import _core
from vattn.cli.console import one_line
from vattn.cli.libcuda import LibCuda
from vattn.config import env_bytes
from vattn.kv.pool import default_budget_bytes

Report = dict[str, Any]

_CAPABILITY_MAJOR, _CAPABILITY_MINOR = 75, 76  # CUdevice_attribute
_TEST_BYTE = 0xA5

# Properties of a GPU that cuda.bindings tells: our name, and CU_DEVICE_ATTRIBUTE_*.
_PROPERTIES = {
    "multiprocessors": "MULTIPROCESSOR_COUNT",
    "l2_cache_bytes": "L2_CACHE_SIZE",
    "shared_memory_per_multiprocessor_bytes": "MAX_SHARED_MEMORY_PER_MULTIPROCESSOR",
    "memory_bus_bits": "GLOBAL_MEMORY_BUS_WIDTH",
    "memory_clock_khz": "MEMORY_CLOCK_RATE",
    "clock_khz": "CLOCK_RATE",
    "virtual_memory_management": "VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED",
    "fabric_handles": "HANDLE_TYPE_FABRIC_SUPPORTED",
}


def versions() -> Report:
    """Of this package and of what it stands on; None for what is not installed."""
    return {
        "vattn": vattn.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "transformers": _version("transformers"),
        "cuda_bindings": _version("cuda-bindings"),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
    }


def host() -> Report:
    """The host driver: sizes, limits of the system, and whether it works."""
    report: Report = {
        "max_map_count": _read_int("/proc/sys/vm/max_map_count"),
        "mappings": _count_lines("/proc/self/maps"),
        "memfd": hasattr(os, "memfd_create"),
    }
    try:
        driver = _core.host_driver()
    except (OSError, RuntimeError) as error:
        return report | {"self_test": {"ok": False, "error": one_line(error)}}
    return report | _sizes(driver, "cpu") | {"self_test": self_test(driver, ctypes.string_at)}


def cuda() -> Report:
    """The CUDA driver library and each device that it shows."""
    path = os.environ.get("VATTN_LIBCUDA") or "libcuda.so.1"
    report: Report = {"library": path, "found": False, "devices": []}
    try:
        library = LibCuda(path)
    except (OSError, AttributeError) as error:
        return report | {"error": one_line(error)}
    report["found"] = True
    try:
        report["driver_version"] = library.version()
        report["devices"] = [_cuda_device(library, i) for i in range(library.device_count())]
    except OSError as error:
        report["error"] = one_line(error)
    return report


def attention(gpu: tuple[int, int] | None) -> list[Report]:
    """The attention backends: whether each can run here and, if not, how to get it.

    Args:
        gpu: compute capability of the GPU that PyTorch sees, None without one.
    """
    lacks_gpu = "" if gpu else "needs a GPU that PyTorch sees"
    lacks_ampere = lacks_gpu or ("" if gpu and gpu >= (8, 0) else "needs an Ampere GPU or newer")
    lacks_hopper = lacks_gpu or ("" if gpu and gpu[0] == 9 else "needs a Hopper GPU")
    has_op = hasattr(torch.ops.aten, "_flash_attention_forward") and (
        not gpu or torch.backends.cuda.is_flash_attention_available()
    )
    return [
        _backend("SDPA", torch.__version__, "", "comes with PyTorch"),
        _backend(
            "PyTorch FlashAttention",
            torch.__version__ if has_op else None,
            lacks_ampere,
            "install a build of PyTorch with FlashAttention",
        ),
        _backend(
            "FlashAttention-2",
            _package("flash_attn", "flash-attn"),
            lacks_ampere,
            "pip install 'vattn[flash]'",
        ),
        _backend(
            "FlashAttention-3",
            _package("flash_attn_interface", "flash-attn-3"),
            lacks_hopper,
            "build the folder hopper of github.com/Dao-AILab/flash-attention",
        ),
        _backend(
            "vLLM's FlashAttention",
            _package("vllm", "vllm", "vllm_flash_attn"),
            lacks_ampere,
            "pip install vllm",
        ),
        _backend(
            "FlashInfer",
            _package("flashinfer", "flashinfer-python"),
            lacks_ampere,
            "pip install flashinfer-python",
        ),
    ]


def gpu_of_torch() -> tuple[int, int] | None:
    """Compute capability of PyTorch's GPU, None where it sees none."""
    return torch.cuda.get_device_capability() if torch.cuda.is_available() else None


def self_test(driver: _core.Driver, read: Callable[[int, int], bytes]) -> Report:
    """Maps one page at two neighbouring addresses, writes at the first and reads at the second.

    Args:
        driver: what to test.
        read: ``(address, bytes)`` to what is there.

    Returns:
        ``ok``, and ``ms`` that it took or ``error``.
    """
    size = driver.default_page_bytes()
    started = time.perf_counter()
    try:
        pages = driver.create(1, size)
        base = driver.reserve(2 * size, size)
        driver.map(base, pages * 2, size)
        driver.set_access(base, 2 * size)
        driver.fill(base, _TEST_BYTE, size)
        driver.synchronize()
        seen = read(base + size, size)
        driver.unmap(base, 2 * size)
        driver.destroy(pages, size)
        driver.release(base, 2 * size)
    except (RuntimeError, MemoryError, ValueError, OSError) as error:
        return {"ok": False, "error": one_line(error)}
    if seen != bytes([_TEST_BYTE]) * size:
        return {"ok": False, "error": "what was written at one address is not seen at its alias"}
    return {"ok": True, "ms": (time.perf_counter() - started) * 1e3}


def _cuda_device(library: LibCuda, index: int) -> Report:
    capability = [library.attribute(index, a) for a in (_CAPABILITY_MAJOR, _CAPABILITY_MINOR)]
    report: Report = {
        "index": index,
        "name": library.name(index),
        "capability": ".".join(map(str, capability)),
        "properties": _properties(index),
    }
    try:
        driver = _core.cuda_driver(device=index)
    except (RuntimeError, MemoryError, ValueError) as error:
        return report | {"self_test": {"ok": False, "error": one_line(error)}}
    return report | _sizes(driver, "cuda") | {"self_test": self_test(driver, library.read)}


def _sizes(driver: _core.Driver, device: str) -> Report:
    free, total = driver.memory_info()
    return {
        "granularity_bytes": driver.granularity(),
        "page_bytes": driver.default_page_bytes(),
        "free_bytes": free,
        "total_bytes": total,
        "default_budget_bytes": env_bytes("VATTN_BUDGET") or default_budget_bytes(device, driver),
    }


def _properties(index: int) -> Report | None:
    """What cuda.bindings tells of a GPU; None if it is not installed."""
    try:
        from cuda.bindings import driver as api
    except ImportError:
        return None
    try:
        api.cuInit(0)
        _, device = api.cuDeviceGet(index)
        found = {}
        for name, attribute in _PROPERTIES.items():
            which = getattr(api.CUdevice_attribute, f"CU_DEVICE_ATTRIBUTE_{attribute}", None)
            code, value = (1, 0) if which is None else api.cuDeviceGetAttribute(which, device)
            if int(code) == 0:
                found[name] = int(value)
    except Exception as error:  # whatever a binding of another driver's age raises
        return {"error": one_line(error)}
    return found


def _backend(name: str, version: str | None, lacks: str, remedy: str) -> Report:
    return {
        "name": name,
        "version": version,
        "usable": version is not None and not lacks,
        "lacks": lacks,
        "remedy": remedy if version is None else None,
    }


def _package(module: str, distribution: str, submodule: str | None = None) -> str | None:
    """The version of an installed package, found without importing it; None if it is missing."""
    spec = importlib.util.find_spec(module)
    if spec is None:
        return None
    if submodule is not None:
        places = [Path(place) for place in spec.submodule_search_locations or ()]
        if not any(any(place.glob(f"{submodule}*")) for place in places):
            return None
    return _version(distribution) or "of unknown version"


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _read_int(path: str) -> int | None:
    try:
        return int(Path(path).read_text())
    except (OSError, ValueError):
        return None


def _count_lines(path: str) -> int | None:
    try:
        return len(Path(path).read_text().splitlines())
    except OSError:
        return None
