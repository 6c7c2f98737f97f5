"""Which neighbouring slots share one call: a small dynamic program over the decodes of a step.

One call over slots ``s0..s1`` and tokens ``b..e`` costs a constant and, per slot in between (holes
included), ``e - b`` tokens. Few calls waste work on padding, many calls waste constants.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Int64 = npt.NDArray[np.int64]

# Sequences of one call. Beyond this the constant is spread thin enough, and it bounds the table.
_MOST_PER_CALL = 64


@dataclass(frozen=True)
class Reads:
    """What each decode needs to read of its slot, and what it may; all int64 ``[n]``.

    Args:
        slots: ascending.
        begin, end: the tokens it attends to are ``[begin, end)``.
        lowest, highest: tokens ``[lowest, highest)`` hold finite numbers and may be read and
            masked; None where all of every slot may be, open or not.
    """

    slots: Int64
    begin: Int64
    end: Int64
    lowest: Int64 | None = None
    highest: Int64 | None = None

    def may_share(self) -> bool:
        """Whether one call may read all of them."""
        if self.lowest is None or self.highest is None:
            return True
        return bool(
            self.slots[-1] - self.slots[0] == len(self.slots) - 1
            and self.begin.min() >= self.lowest.max()
            and self.end.max() <= self.highest.min()
        )


def split(reads: Reads, call_tokens: float) -> list[tuple[int, int]]:
    """Cuts the decodes into calls so that the total cost is least.

    Args:
        reads: of at least one decode.
        call_tokens: what a call costs beside its tokens, in tokens.

    Returns:
        ``(first, last)`` per call: rows ``[first, last)``, in order. Calls of more than 64 rows are
        considered only where one call for all wastes less than a second call would cost.
    """
    n = len(reads.slots)
    span = int(reads.slots[-1] - reads.slots[0] + 1)
    tokens = int(reads.end.max() - reads.begin.min())
    waste = span * tokens - int((reads.end - reads.begin).sum())
    if waste <= call_tokens and reads.may_share():
        return [(0, n)]
    cost = _costs(reads) + call_tokens
    width = cost.shape[1]
    # least[width - 1 + i] is the least cost of the first i rows; impossible starts stay infinite.
    least = np.full(n + width, np.inf)
    least[width - 1] = 0.0
    best_start = np.empty(n, np.int64)
    for i in range(n):
        total = cost[i] + least[i : i + width]
        best = int(total.argmin())
        least[i + width] = total[best]
        best_start[i] = i - width + 1 + best
    calls = []
    last = n
    while last > 0:
        first = int(best_start[last - 1])
        calls.append((first, last))
        last = first
    return calls[::-1]


def _costs(reads: Reads) -> npt.NDArray[np.float64]:
    """Tokens read by a call of rows ``[i - width + 1 + c, i]``: ``[n, width]`` at ``[i, c]``."""
    n = len(reads.slots)
    width = min(n, _MOST_PER_CALL)

    def windows(values: Int64) -> Int64:
        padded = np.concatenate([np.full(width - 1, values[0]), values])
        return np.lib.stride_tricks.sliding_window_view(padded, width)

    def running(ufunc: np.ufunc, values: Int64) -> Int64:
        # From the call's last row backwards, so that column c covers rows c and after.
        out: Int64 = ufunc.accumulate(windows(values)[:, ::-1], axis=1)[:, ::-1]
        return out

    spans = reads.slots[:, None] - windows(reads.slots) + 1
    ends, begins = running(np.maximum, reads.end), running(np.minimum, reads.begin)
    cost = (spans * (ends - begins)).astype(np.float64)
    if reads.lowest is not None and reads.highest is not None:
        rows = np.arange(width, 0, -1)
        allowed = (
            (spans == rows)
            & (begins >= running(np.maximum, reads.lowest))
            & (ends <= running(np.minimum, reads.highest))
        )
        cost[~allowed] = np.inf
    return cost
