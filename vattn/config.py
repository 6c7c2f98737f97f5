"""Sizes as people write them, and settings from the environment."""

from __future__ import annotations

import os
import re

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12} | {
    "ki": 2**10,
    "mi": 2**20,
    "gi": 2**30,
    "ti": 2**40,
}


def parse_bytes(text: str | int, name: str = "size") -> int:
    """``"512MiB"``, ``"2GB"``, ``"65536"`` or an int as a number of bytes.

    Raises:
        ValueError: not a positive size; the message names the setting.
    """
    if isinstance(text, int):
        value = text
    else:
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?i?)b?\s*", text.lower())
        if match is None or match[2] not in _UNITS:
            raise ValueError(f"{name}={text!r} is not a size; write 512MiB, 2GB or a number")
        value = int(float(match[1]) * _UNITS[match[2]])
    if value <= 0:
        raise ValueError(f"{name}={text!r} must be positive")
    return value


def format_bytes(n: float) -> str:
    """A number of bytes for people: ``1.5 MiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(n) < 1024:
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1024
    return f"{n:.1f} TiB"


def env_bytes(name: str) -> int | None:
    """A size from the environment variable ``name``; None if it is not set.

    Raises:
        ValueError: it is set to something that is not a size.
    """
    text = os.environ.get(name)
    return None if text is None else parse_bytes(text, name)
