"""``vattn.AsyncLLM``: an engine in a process of its own, for servers and other asyncio programs."""

from __future__ import annotations

import asyncio
import warnings
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

from vattn.config import parse_bytes
from vattn.engine.prompts import Prompt
from vattn.engine_process.errors import EngineDeadError
from vattn.engine_process.messages import BudgetReport, Facts, PageRows, Stats
from vattn.engine_process.mirror import output_tokens
from vattn.engine_process.owner import Owner
from vattn.engine_process.settings import check_seconds, start_command
from vattn.engine_process.supervisor import Supervisor
from vattn.hf.model import load_tokenizer
from vattn.outputs import RequestOutput
from vattn.sampling_params import SamplingParams


@dataclass(frozen=True)
class LiveRequest:
    """An unfinished prompt, as its owner sees it."""

    request_id: str
    prompt_tokens: int
    max_tokens: int  # new ones, of each sample
    samples: int
    output_tokens: tuple[int, ...]  # so far, of each sample
    cached_tokens: int
    arrival_s: float  # of time.monotonic
    first_token_s: float  # 0 for not yet
    handle: int  # as in PageRows and Stats
    is_streamed: bool = True  # whether its caller gets outputs before the last one


class AsyncLLM:
    """An LLM whose engine runs in another process; names are those of vLLM's AsyncLLM.

    ::

        async with vattn.AsyncLLM("path/or/hub-id", max_num_seqs=64) as llm:
            async for output in llm.generate("Hello", SamplingParams(max_tokens=32), "request-1"):
                print(output.outputs[0].text)

    The prompt is tokenized here and tokens become text here; the engine process computes and does
    nothing else. If it dies, everybody who waits gets an :class:`EngineDeadError` at once, and
    another one is started. If this process dies, the engine process ends as well, at once.

    All methods are for one event loop.

    Args:
        model: a directory or an id of the Hugging Face Hub; None for the embedded model.
        tokenizer: another directory or id for the tokenizer.
        dtype: as for :class:`vattn.LLM`, by name.
        device: as for :class:`vattn.LLM`, by name.
        revision: of a Hub model.
        llm_factory: ``"package.module:function"``, called in the engine process as
            ``function(model, **settings)`` to make the :class:`vattn.LLM`: for storages and
            policies of one's own, which are objects and cannot travel.
        restart: start another engine process when one dies.
        engine_timeout_s: a step that takes longer counts as a hang: the engine process is killed,
            as if it had died. None for no limit.
        start_timeout_s: how long loading the model may take.
        log_level: of the engine process.
        log_format: of the engine process: ``"text"`` or ``"json"``.
        options: of :class:`vattn.engine.config.EngineConfig`.

    Raises:
        TypeError: an option that does not exist.
        ValueError: a value out of range, or one that cannot be sent to another process.
    """

    def __init__(
        self,
        model: str | Path | None = None,
        *,
        tokenizer: str | Path | None = None,
        dtype: str = "auto",
        device: str | None = None,
        revision: str | None = None,
        llm_factory: str | None = None,
        restart: bool = True,
        engine_timeout_s: float | None = 120.0,
        start_timeout_s: float = 1800.0,
        log_level: str = "info",
        log_format: str = "text",
        **options: Any,
    ) -> None:
        loading = {
            "tokenizer": tokenizer,
            "dtype": dtype,
            "device": device,
            "revision": revision,
        }
        start = start_command(
            model,
            options,
            loading=loading,
            llm_factory=llm_factory,
            log_level=log_level,
            log_format=log_format,
        )
        if not isinstance(restart, bool):
            raise ValueError(f"restart={restart!r} must be True or False")
        if engine_timeout_s is not None:
            engine_timeout_s = check_seconds("engine_timeout_s", engine_timeout_s)
        self._tokenizer_source = start.model if tokenizer is None else tokenizer
        self._revision = revision
        self._owner = Owner(
            partial(
                Supervisor,
                start,
                restart=restart,
                engine_timeout_s=engine_timeout_s,
                start_timeout_s=check_seconds("start_timeout_s", start_timeout_s),
            )
        )
        self._engine = self._owner.engine

    async def start(self) -> None:
        """Starts the engine process and waits until it serves; again is nothing.

        After :meth:`close` it starts anew. While it waits, leaving it ends what has begun, unless
        another task waits for the same.

        Raises:
            ValueError: the model or the settings are at fault.
            EngineDeadError: the process died, or took too long.
        """
        if self._owner.tokenizer is None:
            # Before there is a process, which would have to be ended if there is no tokenizer.
            self._owner.set_tokenizer(
                await asyncio.to_thread(
                    load_tokenizer, self._tokenizer_source, revision=self._revision
                )
            )
        await self._engine.start()

    async def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None,
        request_id: str,
        *,
        priority: int = 0,
        timeout_s: float | None = None,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Gives an output whenever the prompt has new tokens; leaving the loop aborts it.

        What outputs hold is for ``sampling_params.output_kind`` to say. A consumer that is slower
        than the engine gets fewer and larger outputs: nothing queues up.

        Args:
            prompt: text, token ids, ``{"prompt": ...}`` or ``{"prompt_token_ids": [...]}``, with a
                ``cache_salt`` if it must not share K and V with others.
            sampling_params: None for the model's own.
            request_id: unique among those that are unfinished.
            priority: smaller first; needs ``scheduling_policy="priority"``.
            timeout_s: seconds after which it ends with what it has, for the reason
                ``"deadline"``; from the first output that is asked for, so that tokenizing and
                compiling are part of them. None for no limit.

        Raises:
            RequestRefused: a ValueError; the prompt or its parameters cannot be served, or the id
                is in use.
            EngineDeadError: the engine process died, or is not up.
        """
        if sampling_params is None:
            sampling_params = self.get_default_sampling_params()
        mirror = await self._owner.add(prompt, sampling_params, request_id, priority, timeout_s)
        try:
            while True:
                output = await mirror.next_output()
                yield output
                if output.finished:
                    return
        finally:
            self._owner.drop(mirror)

    async def abort(self, request_id: str | Sequence[str]) -> None:
        """Ends requests with what they have; unknown ids are left as they are."""
        self._owner.abort([request_id] if isinstance(request_id, str) else request_id)

    async def close(self) -> None:
        """Aborts what runs and ends the engine process; twice is once. Leaves nothing behind."""
        await self._owner.close()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    # What it is -----------------------------------------------------------------------------------

    @property
    def facts(self) -> Facts:
        """Of the model and the engine. Raises EngineDeadError before :meth:`start`."""
        if self._engine.facts is None:
            self._engine.check_ready()
        assert self._engine.facts is not None
        return self._engine.facts

    @property
    def tokenizer(self) -> Any:
        """The model's, of transformers. Raises EngineDeadError before :meth:`start`."""
        if self._owner.tokenizer is None:
            self._engine.check_ready()
        return self._owner.tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """What the model's own generation config asks for.

        Raises:
            EngineDeadError: before :meth:`start`.

        Warns:
            UserWarning: it asks for something that SamplingParams has not; it is left out.
        """
        facts = self.facts
        if facts.generation_ignored:
            warnings.warn(
                f"the model's generation config asks for {', '.join(facts.generation_ignored)}, "
                "which is not served and left out; give sampling_params to choose for yourself",
                stacklevel=2,
            )
        return SamplingParams(**facts.generation_defaults)

    # How it is ------------------------------------------------------------------------------------

    @property
    def is_ready(self) -> bool:
        """Whether requests are served now."""
        return self._engine.is_ready

    @property
    def restarts(self) -> int:
        """How often an engine process was replaced by another."""
        return self._engine.restarts

    @property
    def engine_pid(self) -> int | None:
        """The engine process; None while there is none."""
        child = self._engine.child
        return None if child is None else child.process.pid

    @property
    def last_error(self) -> EngineDeadError | None:
        """Why the engine is not up, or why the one before it died."""
        return self._engine.last_error

    def check_health(self) -> None:
        """Raises EngineDeadError unless requests are served now."""
        self._engine.check_ready()

    async def wait_for_failure(self) -> EngineDeadError:
        """Returns when the engine is dead for good: restarts are off, or fail one after another."""
        return await self._engine.wait_for_failure()

    def stats(self) -> Stats | None:
        """The latest figures, at most a second old while the engine is up; None before them."""
        return self._owner.stats

    def live_requests(self) -> list[LiveRequest]:
        """All unfinished prompts, in the order of their arrival."""
        return [
            LiveRequest(
                request_id=mirror.request_id,
                prompt_tokens=len(mirror.prompt_ids),
                max_tokens=mirror.max_tokens,
                samples=len(mirror.samples),
                output_tokens=output_tokens(mirror.samples),
                cached_tokens=mirror.samples[0].cached,
                arrival_s=mirror.samples[0].timings.arrival_s,
                first_token_s=mirror.samples[0].timings.first_token_s,
                handle=mirror.handle,
                is_streamed=mirror.is_streamed,
            )
            for mirror in self._owner.mirrors.values()
            if not mirror.is_finished
        ]

    # Orders ---------------------------------------------------------------------------------------

    async def memory_map(self, max_cells: int = 256) -> PageRows:
        """The virtual address space at this moment, at most so many cells for each slot."""
        return await self._owner.ask("memory_map", max_cells, PageRows)

    async def set_budget(self, budget_bytes: int | str) -> BudgetReport:
        """Moves the KV cache's budget; memory beyond it goes back to the device.

        Engine processes that replace this one begin with it.

        Raises:
            ValueError: no size.
        """
        budget = parse_bytes(budget_bytes, "budget_bytes")
        return await self._owner.set_budget(budget)

    async def reset_prefix_cache(self) -> None:
        """Forgets the K and V of finished requests."""
        await self._owner.ask("reset_prefix_cache", None, object)

    async def check(self) -> None:
        """Verifies the engine's and the pool's invariants.

        Raises:
            RuntimeError: what is broken.
        """
        self._owner.check()
        await self._owner.ask("check", None, object)
