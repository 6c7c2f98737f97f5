"""Where a measurement comes from: versions, commit, machine, GPU. Reads, never changes anything."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    names = ("vattn", "torch", "transformers", "numpy", "triton", "flash-attn", "vllm")
    for name in (*names, "flashinfer-python", "nano-vllm", "cuda-bindings"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    torch = sys.modules.get("torch")
    if torch is not None and torch.version.cuda is not None:
        found["cuda"] = torch.version.cuda
    if "vattn" not in found:  # on PYTHONPATH only
        found["vattn"] = _first_match(ROOT / "vattn/version.py", r'__version__ = "(.+)"') or "?"
    return found


def git_commit() -> str:
    """The commit of the checkout, with "-dirty" if files differ from it.

    A copy of the tree without ``.git`` is what ``VATTN_COMMIT`` says, else "unknown".

    Raises:
        ValueError: ``VATTN_COMMIT`` is not a commit.
    """
    git = shutil.which("git")
    if git is None or not (ROOT / ".git").exists():
        return _commit_told()
    described = subprocess.run(
        [git, "describe", "--always", "--dirty", "--exclude=*", "--abbrev=40"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    return described.stdout.strip() or _commit_told()


def _commit_told() -> str:
    told = os.environ.get("VATTN_COMMIT", "unknown")
    if told != "unknown" and not re.fullmatch(r"[0-9a-f]{7,40}(-dirty)?", told):
        raise ValueError(
            f"VATTN_COMMIT={told!r} is not a commit; give 7 to 40 hexadecimal digits, and -dirty "
            "if files differ from it, or unset it"
        )
    return told


def machine() -> dict[str, Any]:
    found: dict[str, Any] = {
        "system": f"{platform.system()} {platform.release()}",
        "cpu": _first_match("/proc/cpuinfo", r"model name\s*:\s*(.+)") or platform.machine(),
        "cpus": len(os.sched_getaffinity(0)),
        "load": os.getloadavg()[0],
    }
    memory = _first_match("/proc/meminfo", r"MemTotal:\s*(\d+) kB")
    if memory:
        found["memory_bytes"] = int(memory) * 1024
    return found | gpu_state()


def gpu_state() -> dict[str, Any]:
    """Name, driver, clocks and load of the first GPU, as nvidia-smi reads them; {} without one."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return {}
    fields = (
        "name",
        "driver_version",
        "memory.total",
        "clocks.sm",
        "clocks.max.sm",
        "clocks.mem",
        "clocks.max.mem",
        "temperature.gpu",
        "power.draw",
        "power.limit",
        "utilization.gpu",
    )
    command = [tool, f"--query-gpu={','.join(fields)}", "--format=csv,noheader", "--id=0"]
    try:
        out = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return {}
    values = [value.strip() for value in out.stdout.strip().split(",")]
    if out.returncode != 0 or len(values) != len(fields):
        return {}
    return {"gpu": dict(zip(fields, values, strict=True))}


def _first_match(path: str | Path, pattern: str) -> str | None:
    try:
        match = re.search(pattern, Path(path).read_text())
    except OSError:
        return None
    return match[1].strip() if match else None


def gpu_missing() -> str | None:
    """Why no CUDA device can be used here; None if one can."""
    import torch

    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} finds no CUDA device"
    return None


def device_slug(device: str) -> str:
    """A folder name for results: ``cpu``, ``nvidia-h200``."""
    if not device.startswith("cuda"):
        return device
    import torch

    return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(device).lower()).strip("-")
