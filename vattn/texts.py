"""Work on texts that would hold up an event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

LONG_CHARS = 16_384  # which take about four milliseconds to tokenize
_T = TypeVar("_T")


async def beside(chars: int, work: Callable[[], _T]) -> _T:
    """What ``work`` returns; it runs in a thread if its text is long, so that others go on.

    Args:
        chars: of the text.
        work: tokenizes it, or renders a template to it; any thread may call it.
    """
    return await asyncio.to_thread(work) if chars > LONG_CHARS else work()
