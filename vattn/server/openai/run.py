"""Runs the prompts of a request on the engine, and turns its failures into those of the API."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from vattn.engine_process.errors import EngineDeadError, RequestRefused
from vattn.outputs import RequestOutput
from vattn.request import FinishReason
from vattn.sampling_params import SamplingParams
from vattn.server.errors import ApiError
from vattn.server.openai.common import SamplingFields
from vattn.server.openai.sampling import refusal
from vattn.server.state import ServerState


@dataclass(frozen=True, kw_only=True)
class Job:
    """The prompts of one request.

    Args:
        prompts: token ids of each, one at least.
        params: of all of them.
        request_id: for the engine; several prompts have ``-0``, ``-1``... behind it.
        body: for the names of fields in errors, ``priority`` and ``cache_salt``.
    """

    prompts: Sequence[list[int]]
    params: SamplingParams
    request_id: str
    body: SamplingFields

    @property
    def tokens(self) -> int:
        """Most that it may come to: of the prompts, and new ones of all samples."""
        new = (self.params.max_tokens or 0) * self.params.n * len(self.prompts)
        return sum(map(len, self.prompts)) + new


async def run(state: ServerState, job: Job) -> AsyncGenerator[tuple[int, RequestOutput], None]:
    """Gives (number of the prompt, output) as outputs come, of all prompts at once.

    Leaving the loop (by ``aclosing``) aborts what still runs, and so does one that fails.

    Raises:
        ApiError: 400 for what the engine refuses, 429 if there are too many requests, 500 for a
            failure within the engine, 503 if the engine has died.
    """
    with state.admission.admit(len(job.prompts), job.tokens):
        if len(job.prompts) == 1:
            async with aclosing(_outputs(state, job, 0)) as outputs:
                async for output in outputs:
                    yield 0, output
            return
        async with aclosing(_merged(state, job)) as both:
            async for item in both:
                yield item


def finish_reason(reason: str | None) -> str | None:
    """As OpenAI's clients know it: a request that ran out of time ended for its length.

    Its ``stop_reason`` says ``deadline``; see :func:`stop_reason`.
    """
    return FinishReason.LENGTH.value if reason == FinishReason.DEADLINE.value else reason


def stop_reason(reason: str | None, stop: int | str | None) -> int | str | None:
    """What vLLM adds: the stop string or token; or ``deadline`` for a time that ran out.

    Args:
        reason: the engine's ``finish_reason``.
        stop: the engine's ``stop_reason``.
    """
    return reason if reason == FinishReason.DEADLINE.value else stop


async def _merged(state: ServerState, job: Job) -> AsyncGenerator[tuple[int, RequestOutput], None]:
    # Bounded, so that a slow client slows its own prompts' outputs down, and these grow instead.
    queue: asyncio.Queue[tuple[int, RequestOutput] | Exception | None] = asyncio.Queue(1)

    async def pump(index: int) -> None:
        try:
            async with aclosing(_outputs(state, job, index)) as outputs:
                async for output in outputs:
                    await queue.put((index, output))
        except Exception as error:
            await queue.put(error)
        else:
            await queue.put(None)

    pumps = [asyncio.create_task(pump(index)) for index in range(len(job.prompts))]
    try:
        running = len(pumps)
        while running:
            item = await queue.get()
            if item is None:
                running -= 1
            elif isinstance(item, Exception):
                raise item
            else:
                yield item
    finally:
        for task in pumps:
            task.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)


async def _outputs(state: ServerState, job: Job, index: int) -> AsyncGenerator[RequestOutput, None]:
    """Of one prompt, told to the metrics."""
    prompt: dict[str, object] = {"prompt_token_ids": job.prompts[index]}
    if job.body.cache_salt is not None:
        prompt["cache_salt"] = job.body.cache_salt
    record = state.metrics.begin(job.params)
    try:
        async with aclosing(
            state.llm.generate(
                prompt,
                job.params,
                job.request_id if len(job.prompts) == 1 else f"{job.request_id}-{index}",
                priority=job.body.priority or 0,
                timeout_s=state.settings.request_timeout_s,
            )
        ) as outputs:
            async for output in outputs:
                record.output(output)
                if output.finished or len(output.outputs) > 1:
                    _check(output)
                yield output
    except RequestRefused as error:
        record.drop()
        raise refusal(error, job.body) from error
    except EngineDeadError as error:
        record.end("error")
        raise ApiError(503, str(error), type="server_error", retry_after_s=1) from error
    finally:
        record.end()


def _check(output: RequestOutput) -> None:
    """Raises what a sample failed of; its client gets nothing else."""
    for sample in output.outputs:
        if sample.finish_reason == FinishReason.ERROR.value:
            raise ApiError(
                500, sample.error or "the request failed in the engine", type="server_error"
            )
        if sample.finish_reason == FinishReason.ABORT.value:
            raise ApiError(
                503, "the request was aborted; try again", type="server_error", retry_after_s=1
            )
