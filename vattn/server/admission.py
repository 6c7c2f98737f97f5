"""Who is let in: how many samples and tokens may be unfinished at once."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from vattn.async_llm import AsyncLLM
from vattn.server.errors import ApiError
from vattn.server.settings import ServerSettings

_LONGEST_WAIT_S = 60.0
_REMEMBERED = 64  # served requests, for the rate at which they end


class Admission:
    """Counts unfinished samples and their tokens, and refuses what goes beyond the limits.

    Samples, for each has its own tokens in both processes: a prompt has ``n``. Used on one event
    loop::

        with state.admission.admit(samples=len(prompts) * n, tokens=tokens):
            ...

    Args:
        settings: the limits.
        llm: the engine; it need not be started yet.
        rejected: is told of each refusal: "queue", "tokens", "draining" or "engine".
    """

    def __init__(
        self,
        settings: ServerSettings,
        llm: AsyncLLM,
        rejected: Callable[[str], None] = lambda reason: None,
    ) -> None:
        self._settings = settings
        self._rejected = rejected
        self._llm = llm
        self._samples = 0
        self._tokens = 0
        self._draining = False
        self._idle = asyncio.Event()
        self._idle.set()
        self._finished: deque[tuple[float, int]] = deque(maxlen=_REMEMBERED)  # when, how many

    @property
    def samples(self) -> int:
        """Unfinished samples."""
        return self._samples

    @property
    def tokens(self) -> int:
        """Of unfinished samples: of their prompts, and the most that may follow."""
        return self._tokens

    @property
    def places(self) -> int:
        """Samples that may be unfinished at once: those that run and those that wait."""
        return self._llm.facts.max_num_seqs + self._settings.max_queued_requests

    def drain(self) -> None:
        """From now on nobody is let in."""
        self._draining = True

    async def wait_idle(self) -> None:
        """Returns when nothing is unfinished."""
        await self._idle.wait()

    def expect(self, samples: int) -> None:
        """Refuses at once what :meth:`admit` would, before any work is made of it.

        Args:
            samples: of all prompts of a request; their tokens are not known yet.

        Raises:
            ApiError: as :meth:`admit`.
        """
        self._refuse(samples, 0)

    @contextmanager
    def admit(self, samples: int, tokens: int) -> Iterator[None]:
        """Holds places for samples and their tokens.

        Args:
            samples: of all prompts of a request.
            tokens: of the prompts, with the most new ones of each sample.

        Raises:
            ApiError: 413 for what could never be served, 429 for what could be later, 503 while
                the server ends or has no engine.
        """
        self._refuse(samples, tokens)
        self._samples += samples
        self._tokens += tokens
        self._idle.clear()
        failed = False
        try:
            yield
        except Exception:
            failed = True  # what is refused takes no time, and tells nothing of those that wait
            raise
        finally:
            self._samples -= samples
            self._tokens -= tokens
            if not failed:
                self._finished.append((time.monotonic(), samples))
            if self._samples == 0:
                self._idle.set()

    def check(self) -> None:
        """Verifies that nothing is held; for when no request runs.

        Raises:
            RuntimeError: places were not given back.
        """
        if self._samples or self._tokens or not self._idle.is_set():
            raise RuntimeError(
                f"{self._samples} samples and {self._tokens} tokens are counted as unfinished"
            )

    def _refuse(self, samples: int, tokens: int) -> None:
        if self._draining:
            self._rejected("draining")
            raise _unavailable("the server is shutting down; ask another one", 5)
        if not self._llm.is_ready:
            self._rejected("engine")
            raise _unavailable("the engine is not up; try again when /health says so", 5)
        places, most = self.places, self._settings.max_queued_tokens
        if samples > places:
            self._rejected("queue")
            raise ApiError(
                413,
                f"{samples} samples in one request (prompts times n), but only {places} may be "
                "unfinished at once; ask for fewer in each request",
                code="request_too_large",
            )
        if most is not None and tokens > most:
            self._rejected("tokens")
            raise ApiError(
                413,
                f"the request asks for up to {tokens} tokens, prompts included, but only {most} "
                "may be unfinished at once; ask for fewer",
                code="request_too_large",
            )
        if self._samples + samples > places:
            self._rejected("queue")
            over = self._samples + samples - places
            raise self._busy(f"{self._samples} of {places} places are taken", over)
        if most is not None and self._tokens + tokens > most:
            self._rejected("tokens")
            # As if all requests were alike.
            excess = (self._tokens + tokens - most) * self._samples / max(1, self._tokens)
            raise self._busy(f"{self._tokens} of {most} tokens are taken", excess)

    def _busy(self, why: str, excess: float) -> ApiError:
        return ApiError(
            429,
            f"the server is busy: {why}; try again later",
            type="rate_limit_error",
            code="server_busy",
            retry_after_s=self._wait_s(excess),
        )

    def _wait_s(self, excess: float) -> float:
        """How long until so many samples have ended, going by those that did lately."""
        if not self._finished:
            return 1.0
        elapsed = time.monotonic() - self._finished[0][0]
        rate = sum(number for _, number in self._finished) / max(elapsed, 1e-3)
        return min(max(excess / rate, 1.0), _LONGEST_WAIT_S)


def _unavailable(message: str, retry_after_s: float) -> ApiError:
    return ApiError(503, message, type="server_error", retry_after_s=retry_after_s)
