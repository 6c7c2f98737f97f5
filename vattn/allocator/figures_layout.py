"""The layout of the page of figures that a process shares, as ``csrc/stats_page.h`` has it."""

from __future__ import annotations

import ctypes
from typing import Any, ClassVar

MAGIC = 0x31746174736E7476
VERSION = 1
SHOWN = 2  # state of an entry that is in use


def _entry(*fields: tuple[str, Any]) -> list[tuple[str, Any]]:
    """Fields of an entry; the page pads each to a multiple of 64 bytes."""
    used = sum(ctypes.sizeof(kind) for _, kind in fields) + 4
    return [("entry", ctypes.c_uint32), *fields, ("_padding", ctypes.c_char * (-used % 64))]


_u32, _u64 = ctypes.c_uint32, ctypes.c_uint64


class _Pool(ctypes.Structure):
    _fields_: ClassVar[Any] = _entry(
        ("unused", _u32),
        ("name", ctypes.c_char * 24),
        ("page", _u64),
        ("budget", _u64),
        ("created", _u64),
        ("peak_created", _u64),
        ("free", _u64),
        ("stale", _u64),
        ("refused", _u64),
    )


class _Allocator(ctypes.Structure):
    _fields_: ClassVar[Any] = _entry(
        ("pool", _u32),
        ("mapped", _u64),
        ("idle_pages", _u64),
        ("limit", _u64),
        ("out_of_memory", _u64),
    )


class _Tag(ctypes.Structure):
    _fields_: ClassVar[Any] = _entry(
        ("allocator", _u32),
        ("name", ctypes.c_char * 56),
        ("state", _u32),
        ("unused", _u32),
        ("live", _u64),
        ("peak_live", _u64),
        ("blocks", _u64),
        ("mapped", _u64),
        ("budget", _u64),
        ("allocations", _u64),
    )


class _Range(ctypes.Structure):
    _fields_: ClassVar[Any] = _entry(
        ("tag", _u32),
        ("base", _u64),
        ("stream", _u64),
        ("kind", _u64),
        ("reserved", _u64),
        ("mapped", _u64),
    )


class Page(ctypes.Structure):
    """All of it; entries that are not SHOWN mean nothing."""

    _fields_: ClassVar[Any] = [
        ("magic", _u64),
        ("version", _u32),
        ("bytes", _u32),
        ("pid", _u64),
        ("start_ns", _u64),
        ("_padding", ctypes.c_char * 32),
        ("pools", _Pool * 16),
        ("allocators", _Allocator * 16),
        ("tags", _Tag * 64),
        ("ranges", _Range * 256),
    ]


class Header(ctypes.Structure):
    """What every version of the page begins with."""

    _fields_: ClassVar[Any] = Page._fields_[:4]
