"""How result files are written; standard library only, as of what runs before all is built."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any


def as_text(document: Mapping[str, Any]) -> str:
    """JSON with a line for each entry and each row of a list: small, and changes are readable.

    Numbers have ten digits, which is more than any measurement has.
    """
    return _lines(_rounded(document), depth=3) + "\n"


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.10g}")
    if isinstance(value, Mapping):
        return {key: _rounded(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(part) for part in value]
    return value


def _lines(value: Any, depth: int) -> str:
    if depth and isinstance(value, Mapping) and value:
        parts = [f"{json.dumps(str(k))}: {_lines(v, depth - 1)}" for k, v in value.items()]
        return "{\n" + ",\n".join(parts) + "\n}"
    if isinstance(value, list) and any(isinstance(row, Mapping) for row in value):
        return "[\n" + ",\n".join(json.dumps(row, default=str) for row in value) + "\n]"
    return json.dumps(value, default=str)
