"""What an owner knows of its prompts: requests that grow as the engine tells of their tokens.

Outputs are made of them by the same code as those of :class:`vattn.LLM`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable

from vattn.engine.outputs import OutputProcessor
from vattn.engine_process.messages import End, Facts, Progress
from vattn.outputs import Logprob, RequestOutput
from vattn.request import FinishReason, Request, Status
from vattn.sampling_params import RequestOutputKind, SamplingParams


class Mirror:
    """One prompt and its samples.

    There is no queue: who waits is woken, and gets an output of all that has come by then.

    Args:
        handle: of the prompt.
        request_id: its caller's name for it.
        prompt: its text, if it was given as text.
        prompt_ids: its tokens, of which ``truncate_prompt_tokens`` are used.
        params: its own.
        facts: of the engine.
        outputs: makes its outputs.
        priority: as given.

    Raises:
        ValueError: the parameters cannot be served.
    """

    def __init__(
        self,
        handle: int,
        request_id: str,
        prompt: str | None,
        prompt_ids: list[int],
        params: SamplingParams,
        facts: Facts,
        outputs: OutputProcessor,
        priority: int = 0,
    ) -> None:
        self.handle = handle
        self.request_id = request_id
        self.prompt = prompt
        keep = params.truncate_prompt_tokens
        if keep is not None:
            prompt_ids = prompt_ids[-(facts.max_model_len - 1 if keep < 0 else keep) :]
        self.prompt_ids = prompt_ids
        self.params = params
        most = max(0, facts.max_model_len - len(prompt_ids))
        self.max_tokens = min(params.max_tokens or most, most)
        stop_ids = frozenset(params.stop_ids)
        if not params.ignore_eos:
            stop_ids |= frozenset(facts.eos_token_ids)
        self.error: Exception | None = None
        self._outputs = outputs
        self._is_final = params.output_kind is RequestOutputKind.FINAL_ONLY
        self._unfinished = params.n
        self._has_news = False
        self._waiter: asyncio.Future[None] | None = None
        self.samples: list[Request] = []
        now = time.monotonic()
        for index in range(params.n):
            sample = Request(
                id=request_id,
                prompt_ids=prompt_ids,
                params=params,
                limit=len(prompt_ids) + self.max_tokens,
                index=index,
                stop_ids=stop_ids,
                priority=priority,
                # The output processor only asks whether there is one.
                grammar=None if params.structured_outputs is None else True,
                logprobs=None if params.logprobs is None else [],
                prompt_logprobs=None if params.prompt_logprobs is None or index else [],
            )
            sample.timings.arrival_s = now
            outputs.add(sample)
            self.samples.append(sample)

    @property
    def is_finished(self) -> bool:
        """Whether nothing more will come."""
        return self._unfinished == 0 or self.error is not None

    @property
    def is_streamed(self) -> bool:
        """Whether there are outputs before the last one."""
        return not self._is_final

    @property
    def _is_due(self) -> bool:
        return self._has_news and (not self._is_final or self.is_finished)

    def apply(self, progress: Progress) -> None:
        """Takes what is new of a sample."""
        sample = self.samples[progress.index]
        if sample.finished:
            return
        if progress.tokens and not sample.timings.first_token_s:
            sample.timings.first_token_s = time.monotonic()
        sample.tokens += progress.tokens
        sample.cached = progress.cached
        if progress.logprobs is not None and sample.logprobs is not None:
            sample.logprobs += map(_named, progress.logprobs)
        if progress.prompt_logprobs is not None and sample.prompt_logprobs is not None:
            sample.prompt_logprobs += [
                None if entry is None else _named(entry) for entry in progress.prompt_logprobs
            ]
        if progress.end is not None:
            self._end(sample, progress.end)
        self._has_news = True
        if self._is_due:
            self._wake()

    def _end(self, sample: Request, end: End) -> None:
        if isinstance(end.stop_reason, str):
            # Before it counts as ended: the last token of what a stop token ended is not read, and
            # this one ended by its text.
            self._outputs.end_of_text(sample)
        sample.status = Status.FINISHED
        sample.finish_reason = FinishReason(end.finish_reason)
        sample.stop_reason = end.stop_reason
        sample.error = end.error
        sample.timings = end.timings
        sample.kv = end.kv
        sample.preemptions = end.preemptions
        self._unfinished -= 1
        self._outputs.ended([sample])

    def fail(self, error: Exception) -> None:
        """Ends it for who waits."""
        if not self.is_finished:
            self.error = error
            self._has_news = True
            self._wake()

    async def next_output(self) -> RequestOutput:
        """Waits until there is something new, and returns it.

        Raises:
            Exception: what it failed with.
        """
        while not self._is_due:
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        self._has_news = False
        if self.error is not None:
            raise self.error
        return self._outputs.request_output(
            self.request_id, self.prompt, self.prompt_ids, self.samples, self.params.output_kind
        )

    def drop(self) -> None:
        """Nobody asks for it any more."""
        self._outputs.ended(self.samples)

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


def _named(entry: dict[int, tuple[float, int]]) -> dict[int, Logprob]:
    return {token: Logprob(logprob, rank) for token, (logprob, rank) in entry.items()}


def output_tokens(samples: Iterable[Request]) -> tuple[int, ...]:
    """How many each has."""
    return tuple(len(sample.tokens) - len(sample.prompt_ids) for sample in samples)
