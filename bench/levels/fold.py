"""Rows that have most in common as one, so that a result file stays small."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from bench.common import Json


def fold(rows: Sequence[Json]) -> Json:
    """One row: what all have alike as it is, everything else as a list with a value for each.

    Raises:
        ValueError: no rows, others with other keys, or a value that is a list.
    """
    if not rows or any(row.keys() != rows[0].keys() for row in rows):
        raise ValueError(f"rows to fold need the same keys, and there must be one: {rows}")
    if any(isinstance(value, list) for row in rows for value in row.values()):
        raise ValueError(f"rows to fold must have no lists: {rows}")
    return {
        key: value if all(row[key] == value for row in rows) else [row[key] for row in rows]
        for key, value in rows[0].items()
    }


def unfold(folded: Iterable[Json]) -> list[Json]:
    """The rows of which these were made; of rows that are all alike, one."""
    return [row for each in folded for row in _rows(each)]


def _rows(folded: Json) -> list[Json]:
    count = max((len(v) for v in folded.values() if isinstance(v, list)), default=1)
    return [
        {k: v[i] if isinstance(v, list) else v for k, v in folded.items()} for i in range(count)
    ]


def grouped(rows: Iterable[Json], *by: str) -> list[Json]:
    """Folds the rows that have the same keys, and the same values of the keys ``by``, in order."""
    groups: dict[tuple[object, ...], list[Json]] = {}
    for row in rows:
        groups.setdefault((tuple(row), *(row.get(key) for key in by)), []).append(row)
    return [fold(group) for group in groups.values()]
