"""Tensors over reserved memory whose rows get physical pages when they are committed.

:func:`reserve` gives a tensor of the full shape at once: addresses, nothing physical. Its handle,
a :class:`VirtualTensor`, commits and gives up rows in place. The tensor never moves, so whatever
holds it or its ``data_ptr()`` (an optimizer, a captured graph, a kernel) goes on working as it
grows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import TracebackType
from typing import Self, TypeAlias

import torch

from vattn import _core
from vattn.config import positive_int
from vattn.kv.arrays import as_integer
from vattn.kv.defaults import default_page_bytes
from vattn.kv.pool import (
    PagePool,
    default_budget_bytes,
    open_driver,
    parse_device,
    shared_pool,
)

# Of torch's dtypes those of whole bytes in which zero bits are zero. Memory travels as bytes and is
# reinterpreted, so it does not matter which of them a DLPack consumer knows.
DTYPES: tuple[torch.dtype, ...] = (
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2,
    torch.float8_e5m2fnuz,
    torch.complex128,
    torch.complex64,
    torch.complex32,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint64,
    torch.uint32,
    torch.uint16,
    torch.uint8,
    torch.bool,
)

RowsLike: TypeAlias = "int | slice | range"

_MAX_RESERVE = 2**46  # half of the user's address space on x86-64


class VirtualTensor:
    """The handle of a tensor over reserved memory: which of its rows exist. See :func:`reserve`.

    Rows are counted along the first dimension, and ``rows`` is an int ``n`` for the first ``n`` of
    them, or a ``slice`` or ``range`` (step 1, no negative numbers). Rows that are committed keep
    their contents and their place whatever happens to others. A row that becomes committed, for the
    first time or again, is zero.

    Only committed rows may be touched. Others fault on a GPU, which ends the CUDA context; on the
    host they read as zeros and fault when written (in a strict pool when read, too). So ``print``,
    reductions and whatever reads all of a tensor belong on :meth:`view`.

    Work that is queued on the stream of a call is safe: zeros are written on it, and pages are
    unmapped after it. Work on other streams must be ordered by the caller, as for any tensor. A
    captured CUDA graph may use committed rows and stays valid as others come; no row is committed
    or given up during a capture.

    Attributes:
        tensor: all of it, as :func:`reserve` returned it.
        pool: where its pages come from.
        rows: the first dimension.
    """

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, pool: PagePool, own: bool):
        self.pool = pool
        self.rows = shape[0]
        self._own_pool = own
        self._range = _core.VirtualRange(
            pool.core, rows=self.rows, row_bytes=math.prod(shape[1:]) * dtype.itemsize
        )
        # A tensor made in inference mode could not be written outside of it, whoever asks first.
        with torch.inference_mode(False):
            data: torch.Tensor = torch.utils.dlpack.from_dlpack(self._range.dlpack())
            self._tensor: torch.Tensor | None = data.view(dtype).view(shape)

    @property
    def tensor(self) -> torch.Tensor:
        """All of it, committed or not.

        Raises:
            ValueError: it is closed.
        """
        if self._tensor is None:
            raise ValueError("this virtual tensor is closed; reserve a new one")
        return self._tensor

    def view(self) -> torch.Tensor:
        """The committed rows from row 0 on, ``[n, ...]``: safe to look at and to compute with.

        It shares memory with the tensor and is good until one of its rows is given up.
        """
        first = next(iter(self.committed), range(0))
        return self.tensor[: first.stop if first.start == 0 else 0]

    # Rows -----------------------------------------------------------------------------------------

    def commit(self, rows: RowsLike, *, stream: int | None = None) -> None:
        """Makes rows readable and writable, in place. Rows that are so already are left alone.

        Args:
            rows: an int for the first so many, or a slice or range.
            stream: raw CUDA stream that will use them; None for torch's current one.

        Raises:
            OutOfPages: the budget or the device is exhausted; nothing has changed.
            DriverError: a driver call failed; nothing has changed unless it is ``fatal``.
            ValueError: rows that are not reserved, or a closed virtual tensor.
            TypeError: ``rows`` is no int, slice or range.
            RuntimeError: the current stream is being captured into a CUDA graph.
        """
        begin, end = _row_range(rows, self.rows)
        self._range.commit(begin, end, self._stream(stream))

    def decommit(self, rows: RowsLike, *, stream: int | None = None) -> None:
        """Gives rows up. Pages that hold no committed row any more go back to the pool.

        Where there are such pages, the thread waits until ``stream`` has done what was submitted to
        it before. A pool that was made for this tensor gives the memory back to the device, one
        that was passed in keeps it for its next user. To keep the first ``n`` rows only, give up
        ``slice(n, None)``.

        Args:
            rows: as in :meth:`commit`; those that are not committed are left alone.
            stream: raw CUDA stream of the last work on them; None for torch's current one.

        Raises:
            DriverError, ValueError, TypeError, RuntimeError: as in :meth:`commit`.
        """
        begin, end = _row_range(rows, self.rows)
        self._range.decommit(begin, end, self._stream(stream))
        self._give_back()

    @property
    def committed(self) -> list[range]:
        """The committed rows as ranges, ascending and apart from each other."""
        return [range(begin, end) for begin, end in self._range.committed()]

    @property
    def committed_rows(self) -> int:
        """How many rows are committed."""
        return sum(len(rows) for rows in self.committed)

    @property
    def committed_bytes(self) -> int:
        """Bytes of physical pages behind the committed rows, whole pages."""
        return self._range.committed_bytes()

    # Lifetime -------------------------------------------------------------------------------------

    def close(self, *, stream: int | None = None) -> None:
        """Gives every row up, as :meth:`decommit`. A second close does nothing.

        Tensors over the memory keep their addresses and nothing behind them: no row may be touched
        any more. Without a close, pages go when the handle and every tensor over them are gone,
        after the work of the stream that a call named last, which must still exist.

        Raises:
            DriverError: a driver call failed and nothing has changed; close it again.
        """
        self._range.close(self._stream(stream))
        self._tensor = None
        self._give_back()

    @property
    def closed(self) -> bool:
        """Whether :meth:`close` was called."""
        return self._range.closed()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def check(self) -> None:
        """Verifies the invariants of this virtual tensor and of its pool.

        Raises:
            InvariantError: one is broken, which is a bug of vattn.
        """
        self._range.check()

    def __repr__(self) -> str:
        if self._tensor is None:
            return "VirtualTensor(closed)"
        return (
            f"VirtualTensor(shape={tuple(self._tensor.shape)}, dtype={self._tensor.dtype}, "
            f"device={str(self._tensor.device)!r}, committed_rows={self.committed_rows}, "
            f"committed_bytes={self.committed_bytes})"
        )

    def _stream(self, stream: int | None) -> int:
        if stream is not None:
            return stream
        if self.pool.device.type != "cuda" or not torch.cuda.is_available():
            return 0
        if torch.cuda.is_current_stream_capturing():
            # The zeros would become a part of the graph: written by each replay, and not now.
            raise RuntimeError(
                "the current stream is being captured into a CUDA graph; commit, decommit and "
                "close before or after the capture"
            )
        return int(torch.cuda.current_stream(self.pool.device).cuda_stream)

    def _give_back(self) -> None:
        """Nobody else takes from a pool that was made for this tensor."""
        if not self._own_pool:
            return
        try:
            self.pool.trim()
        except _core.DriverError as error:
            if error.fatal:
                raise
            # The rows are given up; the memory is tried again with the next ones.


def reserve(
    shape: Sequence[int],
    dtype: torch.dtype = torch.float32,
    device: str | torch.device | None = None,
    *,
    pool: PagePool | None = None,
    page_bytes: int | None = None,
) -> tuple[torch.Tensor, VirtualTensor]:
    """A tensor over reserved addresses, and the handle that commits its rows.

    ::

        table, rows = vattn.reserve((1_000_000, 256), torch.bfloat16, "cuda")  # no memory yet
        rows.commit(10_000)  # table[:10_000] is zero, and yours
        rows.commit(20_000)  # grows in place: the same data_ptr(), nothing copied
        rows.decommit(slice(5_000, None))  # the first 5,000 stay
        rows.committed_bytes  # what it costs now

    Args:
        shape: full shape; its first dimension is the rows.
        dtype: element type, one of :data:`DTYPES`.
        device: ``"cpu"`` or ``"cuda[:n]"``; None for the pool's, else ``"cpu"``.
        pool: a pool to share with others; else one of its own, with a budget of the full tensor or
            as :class:`PagePool`'s default if that is less. Under ``vattn.allocator.enable()`` a
            tensor on a GPU shares the allocator's instead.
        page_bytes: page size of a pool of its own, a multiple of the granularity; None for the
            device's default. Memory is committed in whole pages.

    Returns:
        The contiguous tensor, without a committed row, and its :class:`VirtualTensor`. Pages last
        until the handle is closed, or until both and every view are gone.

    Raises:
        ValueError: an empty shape or a size that is not positive, a dtype or device that is not
            supported, a pool on another device, ``page_bytes`` where the pool is shared, more than
            2**46 bytes.
        TypeError: a shape that is no sequence of integers, or no pool.
        OutOfPages: the system has no such stretch of addresses.
        DriverError: no usable CUDA driver.
    """
    sizes = _checked_shape(shape)
    if dtype not in DTYPES:
        names = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
        raise ValueError(f"dtype={dtype!r} is not supported; use one of torch's {names}")
    nbytes = math.prod(sizes) * dtype.itemsize
    if nbytes > _MAX_RESERVE:
        raise ValueError(
            f"shape={sizes} of {dtype} reserves {nbytes} bytes of addresses, beyond 2**46; "
            "lower one of its dimensions"
        )
    own = False
    if pool is None:
        place = parse_device("cpu" if device is None else device)
        pool = shared_pool(place, page_bytes=page_bytes)
        if pool is None:
            own = True
            pool = _own_pool(place, nbytes, page_bytes)
    else:
        _check_pool(pool, device, page_bytes)
    handle = VirtualTensor(sizes, dtype, pool, own)
    return handle.tensor, handle


def _checked_shape(shape: object) -> tuple[int, ...]:
    if not isinstance(shape, Sequence) or isinstance(shape, str | bytes):
        raise TypeError(f"shape={shape!r} is not a sequence of integers; write (rows, ...)")
    sizes = tuple(as_integer(size) for size in shape)
    if not sizes:
        raise ValueError("shape=() has no rows; give at least one dimension")
    for size in sizes:
        positive_int(size, f"shape={sizes}: each dimension, here")
    return sizes


def _own_pool(device: torch.device, nbytes: int, page_bytes: int | None) -> PagePool:
    driver = open_driver(device)
    if page_bytes is None:
        page_bytes = default_page_bytes(device, driver)
    positive_int(page_bytes, "page_bytes")
    most = -(-nbytes // page_bytes) * page_bytes
    budget_bytes = max(page_bytes, min(most, default_budget_bytes(device.type, driver)))
    return PagePool(device, page_bytes=page_bytes, budget_bytes=budget_bytes, driver=driver)


def _check_pool(pool: PagePool, device: str | torch.device | None, page_bytes: int | None) -> None:
    if not isinstance(pool, PagePool):
        raise TypeError(f"pool={pool!r} is not a vattn.PagePool")
    if page_bytes is not None:
        raise ValueError(f"page_bytes={page_bytes} belongs to the pool given; leave it out")
    if device is not None and parse_device(device) != pool.device:
        raise ValueError(f"device={str(device)!r}, but the pool given is on {pool.device}")


def _row_range(rows: RowsLike, limit: int) -> tuple[int, int]:
    """``rows`` as ``[begin, end)`` within ``limit`` rows."""
    if isinstance(rows, slice | range):
        if rows.step not in (None, 1):
            raise ValueError(f"rows={rows!r} has a step; rows are committed in stretches")
        begin = 0 if rows.start is None else as_integer(rows.start)
        end = limit if rows.stop is None else as_integer(rows.stop)
    elif isinstance(rows, bool) or not hasattr(rows, "__index__"):
        raise TypeError(f"rows={rows!r} is not a number of rows, a slice or a range")
    else:
        begin, end = 0, as_integer(rows)
    if not 0 <= begin <= end <= limit:
        raise ValueError(f"rows={rows!r} is not within the {limit} rows that are reserved")
    return begin, end
