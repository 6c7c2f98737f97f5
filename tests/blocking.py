"""Calls that must wait for a stream of the fake."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.fake_cuda.fake import FakeCuda


def blocks_until(
    fake: FakeCuda,
    stream: int,
    act: Callable[[], object],
    meanwhile: Callable[[], object] | None = None,
) -> None:
    """`act` does not return, and unmaps nothing, before the held `stream` has finished."""
    errors: list[BaseException] = []

    def work() -> None:
        try:
            act()
        except BaseException as error:
            errors.append(error)

    unmapped = fake.calls("cuMemUnmap")
    thread = threading.Thread(target=work)
    thread.start()
    thread.join(0.05)
    assert thread.is_alive(), errors
    if meanwhile:
        meanwhile()
    assert fake.calls("cuMemUnmap") == unmapped
    fake.release(stream)
    thread.join()
    assert errors == []
