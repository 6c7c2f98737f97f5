"""What is recorded: a program that runs on a device and says where its iterations begin."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch


class Marks(Protocol):
    """Where a program says what it is about to do."""

    def iteration(self, stream: int = 0) -> None:
        """The next iteration begins, and requests its memory on this stream.

        Args:
            stream: index of the stream, 0 to 255; 0 is the one that the program began on.
        """


# Runs on a device; what it returns stays alive until the recording has ended.
Program = Callable[[torch.device, Marks], object]


@dataclass(frozen=True)
class Workload:
    """A program to record.

    Args:
        name: of its trace and of the trace's file.
        program: what to run.
        about: one sentence for people.
        settings: sizes and counts, for people.
    """

    name: str
    program: Program
    about: str
    settings: dict[str, Any]
