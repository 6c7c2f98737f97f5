"""Sizes as people write them, and settings from the environment."""

from __future__ import annotations

import operator
import os
import re

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12} | {
    "ki": 2**10,
    "mi": 2**20,
    "gi": 2**30,
    "ti": 2**40,
}


# The native module counts in 64 bits.
_TOO_MANY = 2**63


def positive_int(value: object, name: str, otherwise: str = "") -> int:
    """``value`` as an int, if it is a whole number above zero and below 2**63 (NumPy's count).

    Raises:
        ValueError: it is not; the message names the setting and what else it may be.
    """
    is_whole = not isinstance(value, bool) and hasattr(value, "__index__")
    if not is_whole or operator.index(value) <= 0:  # type: ignore[arg-type]
        raise ValueError(f"{name}={value!r} must be a positive integer{otherwise}")
    whole = operator.index(value)  # type: ignore[arg-type]
    if whole >= _TOO_MANY:
        raise ValueError(f"{name}={value!r} is too large; give less than 2**63")
    return whole


def not_negative_int(value: object, name: str) -> int:
    """``value`` as an int, if it is zero; or as :func:`positive_int`.

    Raises:
        ValueError: it is neither.
    """
    if not isinstance(value, bool) and value == 0:
        return 0
    return positive_int(value, name, " or 0")


def parse_bytes(text: str | int, name: str = "size", otherwise: str = "") -> int:
    """``"512MiB"``, ``"2GB"``, ``"65536"`` or an int as a number of bytes.

    Raises:
        ValueError: not a positive size below 2**63; the message names the setting and what else it
            may be.
    """
    if not isinstance(text, str):
        value = positive_int(text, name, otherwise)
    else:
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?i?)b?\s*", text.lower())
        if not text.isascii() or match is None or match[2] not in _UNITS:
            raise ValueError(
                f"{name}={text!r} is not a size; write 512MiB, 2GB or a number{otherwise}"
            )
        value = int(float(match[1]) * _UNITS[match[2]])
    if value <= 0:
        raise ValueError(f"{name}={text!r} must be a positive integer{otherwise}")
    if value >= _TOO_MANY:
        raise ValueError(f"{name}={text!r} is too large; give less than 2**63")
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
    return parse_bytes(text, name) if text else None
