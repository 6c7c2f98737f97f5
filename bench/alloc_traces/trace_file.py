"""A trace of allocations: what a program asked for and gave back, in order.

One record is a request (its bytes as the program asked, never rounded) or, with 0 bytes, the
release of the block that has the record's id. An id is taken again after its block's release, so
identical iterations of a program are identical records. Blocks that are never released were alive
when the recording ended.

A file is a zip of npy arrays that ``numpy.load`` opens, packed by LZMA: deflate's window of 32 KiB
is shorter than one iteration of a model.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

ROUND_BYTES = 512  # what every request is rounded up to where live bytes are counted
RECORD = np.dtype([("id", "<u4"), ("stream", "<u4"), ("bytes", "<u8")])
COLUMNS = {"ids": np.uint32, "sizes": np.uint64, "streams": np.uint8}

Ids = npt.NDArray[np.uint32]
Sizes = npt.NDArray[np.uint64]
Streams = npt.NDArray[np.uint8]
_Numbers = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class AllocTrace:
    """Requests and releases of one program, in order.

    Args:
        name: of the trace.
        ids: uint32 ``[records]``, which block.
        sizes: uint64 ``[records]``, bytes requested; 0 is the release of the id's block.
        streams: uint8 ``[records]``, index of the stream that the block was requested on, also in
            its release's record.
        steady_from: the record from which on all iterations are identical; -1: no two were.
        meta: what made the trace, for people; it has to fit in JSON.

    Raises:
        ValueError: columns of other types or of different lengths, or ``steady_from`` outside.
    """

    name: str
    ids: Ids
    sizes: Sizes
    streams: Streams
    steady_from: int = -1
    meta: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for column, dtype in COLUMNS.items():
            found = getattr(self, column)
            if found.dtype != dtype or found.shape != (len(self.ids),):
                raise ValueError(
                    f"{self.name}: {column} is {found.dtype}{list(found.shape)}; give "
                    f"{np.dtype(dtype)}[{len(self.ids)}], one value per record"
                )
        if not -1 <= self.steady_from < max(1, len(self.ids)):
            raise ValueError(
                f"{self.name}: steady_from is {self.steady_from}; give a record's number below "
                f"{len(self.ids)}, or -1"
            )

    @property
    def operations(self) -> int:
        """Requests and releases together."""
        return len(self.ids)

    @property
    def peak_live_bytes(self) -> int:
        """Most bytes alive at once, each request rounded up to 512.

        Raises:
            ValueError: the trace is not valid (see :meth:`validate`).
        """
        return int(max(0, self._live_bytes().max(initial=0)))

    @property
    def live_at_end(self) -> int:
        """Bytes never released, each request rounded up to 512.

        Raises:
            ValueError: the trace is not valid (see :meth:`validate`).
        """
        live = self._live_bytes()
        return int(live[-1]) if len(live) else 0

    def validate(self) -> Self:
        """Checks that blocks are requested once and released once, on the stream that they have.

        Returns:
            The trace itself.

        Raises:
            ValueError: names the first record that is wrong, and why.
        """
        before = self._before()
        free = self.sizes == 0
        used = (before >= 0) & (self.sizes[before] > 0)
        wrong = np.flatnonzero((free != used) | (free & (self.streams != self.streams[before])))
        if len(wrong):
            raise ValueError(f"{self.name}, record {wrong[0]}: {self._fault(wrong[0], before)}")
        return self

    def raw(self) -> bytes:
        """All records, 16 bytes each and nothing before them: little-endian id, stream, bytes."""
        records = np.empty(self.operations, RECORD)
        records["id"] = self.ids
        records["stream"] = self.streams
        records["bytes"] = self.sizes
        return records.tobytes()

    def save(self, path: Path) -> None:
        """Writes the trace to an npz file, the same bytes for the same trace.

        Raises:
            ValueError: the trace is not valid.
        """
        about = {"name": self.name, "steady_from": self.steady_from, "meta": dict(self.meta)}
        arrays: dict[str, npt.NDArray[Any]] = {name: getattr(self, name) for name in COLUMNS}
        arrays["about"] = np.array(json.dumps(about, sort_keys=True))
        self.validate()
        with zipfile.ZipFile(path, "w", zipfile.ZIP_LZMA) as file:
            for name, array in arrays.items():
                # A ZipInfo of its own has no time of day in it.
                info = zipfile.ZipInfo(f"{name}.npy")
                info.compress_type = zipfile.ZIP_LZMA
                with file.open(info, "w") as member:
                    np.lib.format.write_array(member, array, allow_pickle=False)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Reads and validates what :meth:`save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is not a trace, or not a valid one.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                about = json.loads(str(file["about"]))
                columns = {name: file[name] for name in COLUMNS}
            trace = cls(**columns, **about)
        except (KeyError, TypeError, zipfile.BadZipFile, ValueError) as error:
            raise ValueError(f"{path} is not a trace of allocations: {error}") from error
        return trace.validate()

    def _before(self) -> _Numbers:
        """For each record the last one before it with the same id, else -1."""
        order = np.argsort(self.ids, kind="stable")
        same = self.ids[order[1:]] == self.ids[order[:-1]]
        before = np.full(self.operations, -1, np.int64)
        before[order[1:][same]] = order[:-1][same]
        return before

    def _live_bytes(self) -> _Numbers:
        """Live bytes after each record."""
        self.validate()
        rounded = -(-self.sizes.astype(np.int64) // ROUND_BYTES) * ROUND_BYTES
        change = np.where(self.sizes > 0, rounded, -rounded[self._before()])
        return np.cumsum(change)

    def _fault(self, record: int, before: _Numbers) -> str:
        """What is wrong with a record."""
        block = int(self.ids[record])
        last = int(before[record])
        if self.sizes[record] > 0:
            return f"id {block} is requested, and was by record {last}; release it first"
        if last < 0:
            return f"id {block} is released and was never requested"
        if self.sizes[last] == 0:
            return f"id {block} is released, and was by record {last}"
        return (
            f"id {block} is released on stream {self.streams[record]}; it was requested on "
            f"stream {self.streams[last]}, so name that one"
        )
