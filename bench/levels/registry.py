"""The levels by name."""

from __future__ import annotations

from importlib import import_module

from bench.levels.level import Level

# Module and class of each; imported when it is asked for, since some need much.
_LEVELS = {
    "kernels": ("bench.levels.kernels.level", "Kernels"),
    "memory": ("bench.levels.memory.level", "Memory"),
    "offline": ("bench.levels.offline.level", "Offline"),
    "serving": ("bench.levels.serving.level", "Serving"),
    "allocator": ("bench.levels.allocator", "Allocator"),
    "ablations": ("bench.levels.ablations.level", "Ablations"),
    "peers": ("bench.levels.peers.level", "Peers"),
}
NAMES = tuple(_LEVELS)


def load(name: str) -> Level:
    """A level.

    Raises:
        KeyError: there is none of that name.
    """
    module, kind = _LEVELS[name]
    made: Level = getattr(import_module(module), kind)()
    return made
