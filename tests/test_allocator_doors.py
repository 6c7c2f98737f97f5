"""``vattn.allocator``: enable, disable, pool, tags and statistics, without a GPU."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
import torch

from tests.door_cases import CASES
from tests.fake_cuda.fake import ROOT
from vattn import allocator

if TYPE_CHECKING:
    from tests.own_process import Template

pytest_plugins = ("tests.own_process",)


@pytest.mark.parametrize("case", [case.__name__ for case in CASES])
def test_door(own_process: Template, case: str) -> None:
    """In a process of its own: torch's allocator is swapped once."""
    own_process.run_case("tests.door_cases", case)


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch is built with CUDA")
def test_a_torch_without_cuda_is_refused() -> None:
    with pytest.raises(RuntimeError, match="built without CUDA"):
        allocator.enable()
    with pytest.raises(RuntimeError, match="built without CUDA"), allocator.pool("weights"):
        pass
    assert not allocator.is_enabled()


def test_importing_it_loads_no_torch() -> None:
    code = "import sys, vattn.allocator; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
