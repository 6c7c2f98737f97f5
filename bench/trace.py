"""Requests as others have served them: how long their prompts and their answers were.

A trace is a file with the columns ContextTokens and GeneratedTokens, as the Azure LLM inference
traces have them, or num_prefill_tokens and num_decode_tokens, as those of vAttention's artifact do
(csv, or csv.gz). Without one, lengths are drawn with the means and medians of the
conversation trace of 2023.
"""

from __future__ import annotations

import csv
import gzip
import math
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

Lengths = npt.NDArray[np.int64]

# Of the prompt and of the answer, by who publishes traces.
COLUMNS = (("ContextTokens", "GeneratedTokens"), ("num_prefill_tokens", "num_decode_tokens"))

# Of the conversation trace: (mean, median) of the prompt's tokens and of the answer's.
CONTEXT = (1155.0, 1020.0)
GENERATED = (211.0, 129.0)


@dataclass(frozen=True)
class Trace:
    """Requests in the order of their arrival: tokens of the prompts and of the answers."""

    context: Lengths
    generated: Lengths
    source: str  # the file's name, or what was drawn

    def __post_init__(self) -> None:
        if len(self.context) == 0 or len(self.context) != len(self.generated):
            raise ValueError(
                f"{self.source} has {len(self.context)} prompts and {len(self.generated)} answers; "
                "give one of each per request, and at least one request"
            )

    def __len__(self) -> int:
        return len(self.context)

    @property
    def total(self) -> Lengths:
        """Tokens of each request at its end."""
        return self.context + self.generated

    def first(self, requests: int) -> Self:
        """The first requests to arrive.

        Raises:
            ValueError: there are fewer.
        """
        return self.part(0, requests)

    def part(self, start: int, requests: int) -> Self:
        """So many requests from number ``start`` on.

        Raises:
            ValueError: there are fewer.
        """
        end = start + requests
        if end > len(self):
            raise ValueError(f"{self.source} has {len(self)} requests, and {end} are asked for")
        return type(self)(self.context[start:end], self.generated[start:end], self.source)

    def scaled(self, divisor: int) -> Self:
        """All lengths divided, and at least one token each."""
        context = np.maximum(1, self.context // divisor)
        generated = np.maximum(1, self.generated // divisor)
        return type(self)(context, generated, f"{self.source}, lengths / {divisor}")

    def as_json(self) -> dict[str, Any]:
        """What a result says about the requests that it is of."""
        return {
            "source": self.source,
            "requests": len(self),
            "context_mean": float(self.context.mean()),
            "generated_mean": float(self.generated.mean()),
            "longest": int(self.total.max()),
            "tokens": int(self.total.sum()),
        }


def read_trace(path: Path) -> Trace:
    """A trace from a file.

    Raises:
        ValueError: none of the pairs of :data:`COLUMNS`, or no rows.
    """
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", newline="") as file:
        rows = csv.DictReader(file)
        header = set(rows.fieldnames or ())
        names = next((pair for pair in COLUMNS if set(pair) <= header), None)
        if names is None:
            wanted = ", or ".join(" and ".join(pair) for pair in COLUMNS)
            raise ValueError(f"{path} has no columns {wanted}")
        found = [(int(row[names[0]]), int(row[names[1]])) for row in rows]
    if not found:
        raise ValueError(f"{path} has no requests")
    columns = np.array(found, dtype=np.int64)
    return Trace(columns[:, 0], columns[:, 1], path.name)


def read_moments(path: Path) -> npt.NDArray[np.float64]:
    """When the requests of a trace came, in seconds from the first on; float64, ascending.

    Raises:
        ValueError: no column TIMESTAMP, a moment that is no date with a time, or one before the
            moment in front of it.
    """
    opener = gzip.open if path.suffix == ".gz" else open
    found: list[float] = []
    with opener(path, "rt", newline="") as file:
        rows = csv.DictReader(file)
        if "TIMESTAMP" not in (rows.fieldnames or ()):
            raise ValueError(f"{path.name} has no column TIMESTAMP")
        for number, row in enumerate(rows, 1):
            try:
                # Those of 2023 have seven digits after the second, those of 2024 a time zone.
                moment = datetime.fromisoformat(row["TIMESTAMP"]).replace(tzinfo=UTC)
            except ValueError:
                raise ValueError(
                    f"{path.name}: TIMESTAMP {row['TIMESTAMP']!r} of request {number} is not a "
                    "date with a time, such as 2023-11-16 18:15:46.680"
                ) from None
            found.append(moment.timestamp())
            if found[-1] < found[max(0, len(found) - 2)]:
                raise ValueError(
                    f"{path.name}: request {number} comes before the one in front of it; sort them"
                )
    return np.array(found) - (found[0] if found else 0.0)


def draw_trace(requests: int = 4000, seed: int = 0) -> Trace:
    """Log-normal lengths with the means and medians of the conversation trace."""
    random = np.random.default_rng(seed)

    def draw(mean: float, median: float) -> Lengths:
        sigma = math.sqrt(2 * math.log(mean / median))
        values = random.lognormal(math.log(median), sigma, requests)
        return np.maximum(1, np.rint(values)).astype(np.int64)

    context = draw(*CONTEXT)
    return Trace(context, draw(*GENERATED), f"log-normal draw, seed {seed}")


def open_trace(path: Path | None) -> Trace:
    """The trace in a file, or a drawn one."""
    return draw_trace() if path is None else read_trace(path)
