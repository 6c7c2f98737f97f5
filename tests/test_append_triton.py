"""The fused append: by Triton's interpreter on a CPU, and compiled for GPUs without one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.append_cases import cases

pytest.importorskip("triton", reason="Triton is not installed; the dev extra has it")

ROOT = Path(__file__).resolve().parent.parent


def test_by_the_interpreter() -> None:
    """In a process of its own: it takes a switch at import, and a wild access ends it."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.append_cases"],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.split() == [*map(str, cases()), "far-slots"]


def compiled(arch: int, kind: str, index: str, heads: int, head_dim: int, unit: int) -> Any:
    """The kernel for a GPU of compute capability ``arch / 10``, as the launcher specialises it."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from vattn.attention.triton_append import append_kernel, blocks

    block_heads, block_dim, warps = blocks(heads, head_dim)
    constants = {
        "heads": heads,
        "head_dim": head_dim,
        "block_heads": block_heads,
        "block_dim": block_dim,
        "unit": unit,
    }
    types = dict.fromkeys(append_kernel.arg_names, "i32")
    types |= dict.fromkeys(("key", "value", "k", "v"), f"*{kind}")
    types |= dict.fromkeys(("slots", "positions"), f"*{index}")
    types |= {"slot_stride": "i64"} | dict.fromkeys(constants, "constexpr")
    at = append_kernel.arg_names.index
    source = ASTSource(
        append_kernel,
        types,
        {(at(name),): value for name, value in constants.items()},
        {(at(name),): [["tt.divisibility", 16]] for name in ("key", "value", "k", "v")},
    )
    options = {"num_warps": warps, "enable_fp_fusion": True}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize(
    ("kind", "index", "heads", "head_dim"),
    [("bf16", "i64", 8, 128), ("fp16", "i32", 3, 24), ("fp32", "i64", 40, 80), ("u8", "i32", 1, 8)],
)
def test_compiles_for_gpus(arch: int, kind: str, index: str, heads: int, head_dim: int) -> None:
    built = compiled(arch, kind, index, heads, head_dim, unit=8)
    assert f".target sm_{arch}" in built.asm["ptx"]
    assert built.asm["cubin"].startswith(b"\x7fELF")
    assert built.metadata.shared == 0


@pytest.mark.parametrize("kind", ["bf16", "fp32"])
def test_moves_16_bytes_at_a_time(kind: str) -> None:
    """If strides allow it; else one element."""
    wide = compiled(90, kind, "i64", 8, 128, unit=8).asm["ptx"]
    narrow = compiled(90, kind, "i64", 8, 128, unit=1).asm["ptx"]
    for move in ("ld.global.v4.b32", "st.global.v4.b32"):
        assert wide.count(move) >= 2
        assert move not in narrow


@pytest.mark.parametrize(
    ("key", "value", "cache", "message"),
    [
        ((2, 3, 8), (2, 3, 8), (4, 16, 2, 8), "do not fit a cache of 2 heads of 8"),
        ((2, 2, 8), (2, 2, 16), (4, 16, 2, 8), r"\(2, 2, 8\) and \(2, 2, 16\)"),
        ((1, 2, 8), (2, 2, 8), (4, 16, 2, 8), r"\(1, 2, 8\) and \(2, 2, 8\)"),
    ],
)
def test_shapes_that_do_not_fit(
    key: tuple[int, ...], value: tuple[int, ...], cache: tuple[int, ...], message: str
) -> None:
    from vattn.attention.triton_append import append_kv

    k, index = torch.zeros(cache), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match=message):
        append_kv(torch.zeros(key), torch.zeros(value), k, k.clone(), index, index)


def test_another_dtype_is_not_converted() -> None:
    from vattn.attention.triton_append import append_kv

    new, k = torch.zeros(1, 2, 8), torch.zeros(4, 16, 2, 8)
    index = torch.zeros(1, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"torch\.float32, and the cache holds torch\.bfloat16"):
        append_kv(new, new, k.bfloat16(), k.bfloat16(), index, index)
