"""Every paged kernel installed for the length of a block, as a stand-in that records."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.paged import flash_kernels, flashinfer
from tests import paged_flashinfer, paged_kernels
from tests.paged_kernels import PagedRecorder
from vattn.attention import flash_attn, flash_attn_3
from vattn.attention.operators import Kernel


@contextmanager
def installed_kernels(recorder: PagedRecorder, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every kernel is there, with its real signature, and records."""
    fa2 = paged_kernels.flash2_package(recorder)
    fa3 = paged_kernels.flash3_package(recorder)

    def function(module: str, name: str) -> Any:
        return fa3 if module == "flash_attn_interface" else fa2[name]

    with paged_kernels.operators(recorder) as found:
        aten = types.SimpleNamespace(default=found["_flash_attention_forward"])
        monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", aten)

        def of_library(package: str, file: str, namespace: str, name: str) -> Kernel:
            assert (package, Path(file).parts[0]) == ("vllm", "vllm_flash_attn")
            assert namespace == ("_vllm_fa3_C" if name == "fwd" else "_vllm_fa2_C")
            kernel: Kernel = found[name]
            return kernel

        for module in (flash_attn, flash_attn_3, flash_kernels):
            monkeypatch.setattr(module, "library_operator", of_library)
            monkeypatch.setattr(module, "python_function", function)
        wrappers = paged_flashinfer.flashinfer(recorder)
        module = types.ModuleType("flashinfer")
        for wrapper in wrappers:
            setattr(module, wrapper.__name__, wrapper)
        monkeypatch.setitem(sys.modules, "flashinfer", module)
        monkeypatch.setattr(flashinfer, "_WORKSPACE_BYTES", 64)
        yield
