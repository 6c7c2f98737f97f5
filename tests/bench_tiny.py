"""What the tests of the benchmarks of whole models share: the smallest model, and their files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

TINY = ["--device", "cpu", "--shape", "tiny-llama"]


def load(path: Path, benchmark: str) -> dict[str, Any]:
    """The results of a run that ended well, after a look at what every file says."""
    document: dict[str, Any] = json.loads(path.read_text())
    assert document["benchmark"] == benchmark
    assert {"time", "versions", "commit", "machine", "command"} < set(document)
    assert document["settings"]["model"]["layers"] == 2
    assert "failed" not in document["results"]
    results: dict[str, Any] = document["results"]
    return results
