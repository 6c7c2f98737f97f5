"""An unchanged program under each of the allocator's doors computes what it does without vattn."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.gpu.allocator_scripts.spawn import DEVICE, HERE, output_of, spawn

SCRIPT = str(HERE / "train.py")
WAYS = ("enable", "pool", "run")
UNDER = ("-m", "tests.gpu.allocator_scripts.under")
DTYPES = ("torch.float32", "torch.bfloat16")


def run(way: str, device: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the program printed, and what the door says of itself."""
    if way == "run":
        started = spawn("-m", "vattn.run", SCRIPT, device, environment={"VATTN_ALLOCATOR": "1"})
    else:
        started = spawn(*UNDER, way, device, SCRIPT, device)
    lines = [line for line in output_of(started).splitlines() if line.startswith("{")]
    printed = [json.loads(line) for line in lines]
    return printed[0], printed[1] if len(printed) > 1 else {}


@pytest.fixture(scope="module")
def found() -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """Of all ways, run side by side: nothing of them depends on how much memory is free."""
    # vattn.run refuses a torch without CUDA, as enable() does.
    ways = ("native", *WAYS) if DEVICE == "cuda" else ("native", *WAYS[:2])
    with ThreadPoolExecutor(len(ways) if DEVICE == "cuda" else 1) as workers:
        started = {way: workers.submit(run, way, DEVICE) for way in ways}
        return {way: each.result() for way, each in started.items()}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("way", WAYS)
def test_same_losses_weights_and_tokens(
    found: dict[str, tuple[dict[str, Any], dict[str, Any]]], way: str, dtype: str, device: str
) -> None:
    if way not in found:
        pytest.skip("python -m vattn.run needs torch with CUDA")
    native, ours = found["native"][0], found[way][0]
    assert ours[dtype] == native[dtype]
    losses = native[dtype]["losses"]
    assert len(set(losses)) == len(losses)
    assert len(native[dtype]["tokens"][0]) == 9 + 24
    if device == "cuda":
        expected = "native" if way == "pool" else "pluggable"
        assert (native["allocator"], ours["allocator"]) == ("native", expected)
    if way != "run":
        assert found[way][1]["peak_live_bytes"] > 1 << 20, "nothing came from vattn"
