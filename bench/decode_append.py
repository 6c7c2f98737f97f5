"""The ways in which a decode step can write its new K and V, and backends that are made to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import vattn.attention.append as append_module
from vattn.attention.append import Writer, append_mode, index_put
from vattn.attention.base import AppendMode, Backend
from vattn.attention.flash import FlashBackend
from vattn.attention.select import choose
from vattn.hf.model import LoadedModel


def append_ways(loaded: LoadedModel, backend: str | None) -> list[AppendMode]:
    """What the backend can be asked for on the model's device, the engine's choice first.

    Args:
        loaded: whose layers it serves.
        backend: by name; None for the engine's choice.
    """
    chosen = choose(loaded.specs, loaded.device, name=backend)
    ways: list[AppendMode] = [chosen.append_mode, append_mode(loaded.device), "index_put"]
    return list(dict.fromkeys(ways))


@contextmanager
def appending(way: AppendMode, loaded: LoadedModel, backend: str | None) -> Iterator[Backend]:
    """A backend that appends in one of the ways, as long as the context lasts.

    Args:
        way: one of :func:`append_ways`.
        loaded: whose layers it serves.
        backend: by name; None for the engine's choice.
    """
    made = choose(loaded.specs, loaded.device, name=backend)
    if isinstance(made, FlashBackend):
        made.appends = way == "kernel"
    writer = append_module.writer
    if way == "index_put":
        append_module.writer = _always_index_put  # type: ignore[assignment]
    try:
        assert made.append_mode == way or way == "index_put", (made.append_mode, way)
        yield made
    finally:
        append_module.writer = writer


def _always_index_put(device_type: str) -> Writer:
    del device_type
    return index_put
