"""A pytest plugin: notes each test as it begins, and leaves out those that were noted before.

With it a second process runs what a first one, which lost its CUDA context, did not come to. The
notes are in the file that ``VATTN_TESTS_BEGUN`` names; without that variable it does nothing.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pytest

BEGUN = "VATTN_TESTS_BEGUN"
# What tests/gpu/conftest.py says when it ends a run.
LOST = "the CUDA context is lost after"


def _file() -> Path | None:
    name = os.environ.get(BEGUN)
    return None if name is None else Path(name)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    file = _file()
    if file is None or not file.exists():
        return
    begun = set(file.read_text().splitlines())  # an id has no newline: pytest escapes it
    left_out = [item for item in items if item.nodeid in begun]
    items[:] = [item for item in items if item.nodeid not in begun]
    if left_out:
        config.hook.pytest_deselected(items=left_out)


def pytest_runtest_logstart(nodeid: str) -> None:
    file = _file()
    if file is not None:
        with file.open("a") as out:
            out.write(nodeid + "\n")
