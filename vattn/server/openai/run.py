"""Runs the prompts of a request on the engine, and turns its failures into those of the API."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from vattn.engine.grammars import CANNOT_BE_COMPILED, problem
from vattn.engine_process.errors import EngineDeadError, RequestRefused
from vattn.outputs import RequestOutput
from vattn.request import OUT_OF_PAGES, FinishReason
from vattn.sampling_params import SamplingParams, StructuredOutputsParams
from vattn.server.errors import ApiError, engine_dead
from vattn.server.openai.common import SamplingFields
from vattn.server.openai.sampling import FORMAT_PARAMS, refusal
from vattn.server.state import ServerState

# Ends that OpenAI's API has no name for. A client that has left, the other cause of an abort, does
# not read why.
_CUT_SHORT = (FinishReason.DEADLINE.value, FinishReason.ABORT.value)
# Prompts of a request; between them others' requests go on.
_BEGUN_AT_ONCE = 8
_RETRY_PAGES_S = 10.0
_AT_ONCE_S = 1e-6


@dataclass(frozen=True, kw_only=True)
class Job:
    """The prompts of one request.

    Args:
        prompts: token ids of each, one at least.
        params: of all of them.
        request_id: of the response. The engine's own has more behind it, as clients and proxies may
            send one id with several requests.
        arrival_s: when the request came, of ``time.monotonic``.
        body: for the names of fields in errors, ``priority`` and ``cache_salt``.
        parts: what ``structured_outputs`` of the parameters was made of, if it was not the body's
            own: fields with what each alone asks for.
    """

    prompts: Sequence[list[int]]
    params: SamplingParams
    request_id: str
    arrival_s: float
    body: SamplingFields
    parts: Sequence[tuple[str, StructuredOutputsParams]] = ()

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
            failure within the engine, 503 if it has died, or has not the memory any more.
    """
    with state.admission.admit(len(job.prompts) * job.params.n, job.tokens):
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

    Its ``stop_reason`` says ``deadline``, or ``abort`` if the server ended meanwhile; see
    :func:`stop_reason`.
    """
    return FinishReason.LENGTH.value if reason in _CUT_SHORT else reason


def stop_reason(reason: str | None, stop: int | str | None) -> int | str | None:
    """What vLLM adds: a stop string or token; ``deadline`` or ``abort`` for what was cut short.

    Args:
        reason: the engine's ``finish_reason``.
        stop: the engine's ``stop_reason``.
    """
    return reason if reason in _CUT_SHORT else stop


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

    pumps: list[asyncio.Task[None]] = []
    try:
        for index in range(len(job.prompts)):
            pumps.append(asyncio.create_task(pump(index)))
            if len(pumps) % _BEGUN_AT_ONCE == 0:
                await asyncio.sleep(0)
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
    only_prompt = getattr(job.body, "max_tokens", None) == 0
    record = state.metrics.begin(job.params, only_prompt=only_prompt)
    try:
        async with aclosing(
            state.llm.generate(
                prompt,
                job.params,
                f"{job.request_id}-{secrets.token_hex(4)}",
                priority=job.body.priority or 0,
                timeout_s=_time_left(state, job),
            )
        ) as outputs:
            async for output in outputs:
                record.output(output)
                _check(output)
                yield output
    except RequestRefused as error:
        record.drop()
        raise await _refusal(error, job) from error
    except EngineDeadError as error:
        record.end("error")
        raise engine_dead(error) from error
    except Exception:
        record.end("error")  # one that is cancelled ends as aborted
        raise
    finally:
        record.end()


def _time_left(state: ServerState, job: Job) -> float | None:
    """What its arrival has left of ``request_timeout_s``; next to nothing ends it at once."""
    limit_s = state.settings.request_timeout_s
    return limit_s and max(_AT_ONCE_S, job.arrival_s + limit_s - time.monotonic())


async def _refusal(error: RequestRefused, job: Job) -> ApiError:
    """With the schema that is at fault, if one is."""
    if not str(error).startswith(CANNOT_BE_COMPILED):
        return refusal(error, job.body)
    for param, params in job.parts:
        # It may take long, so others' streams go on meanwhile.
        if why := await asyncio.to_thread(problem, params):
            return ApiError(400, f"{param} cannot be compiled: {why}", param=param)
    found = refusal(error, job.body)
    if len(job.parts) == 1:
        found.param = job.parts[0][0]
    elif job.parts:
        found.param = "tools"
    elif job.body.structured_outputs is None:
        found.param = FORMAT_PARAMS.get(getattr(job.body.response_format, "type", ""))
    return found


def _check(output: RequestOutput) -> None:
    """Raises what a sample failed of; its client gets nothing else."""
    for sample in output.outputs:
        if sample.finish_reason != FinishReason.ERROR.value:
            continue
        why = sample.error or "the request failed in the engine"
        if OUT_OF_PAGES in why:  # the budget was made smaller: an order, which passes
            raise ApiError(503, why, type="server_error", retry_after_s=_RETRY_PAGES_S)
        raise ApiError(500, why, type="server_error")
