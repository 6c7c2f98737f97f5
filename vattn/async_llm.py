"""``vattn.AsyncLLM``: an engine in a process of its own, for servers and other asyncio programs."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from vattn.engine.prompts import Prompt
from vattn.engine_process.messages import BudgetReport, Facts, PageRows, Stats
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
        raise NotImplementedError

    async def start(self) -> None:
        """Starts the engine process and waits until it serves; again is nothing.

        Raises:
            ValueError: the model or the settings are at fault.
            EngineDeadError: the process died, or took too long.
        """
        raise NotImplementedError

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
            timeout_s: as for :meth:`vattn.LLM.generate`.

        Raises:
            RequestRefused: a ValueError; the prompt or its parameters cannot be served, or the id
                is in use.
            EngineDeadError: the engine process died, or is not up.
        """
        raise NotImplementedError
        yield

    async def abort(self, request_id: str | Sequence[str]) -> None:
        """Ends requests with what they have; unknown ids are left as they are."""
        raise NotImplementedError

    async def close(self) -> None:
        """Aborts what runs and ends the engine process; twice is once. Leaves nothing behind."""
        raise NotImplementedError

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    # What it is -----------------------------------------------------------------------------------

    @property
    def facts(self) -> Facts:
        """Of the model and the engine. Raises EngineDeadError before :meth:`start`."""
        raise NotImplementedError

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer, a transformers one."""
        raise NotImplementedError

    def get_default_sampling_params(self) -> SamplingParams:
        """What the model's own generation config asks for."""
        raise NotImplementedError

    # How it is ------------------------------------------------------------------------------------

    @property
    def is_ready(self) -> bool:
        """Whether requests are served now."""
        raise NotImplementedError

    @property
    def restarts(self) -> int:
        """How often an engine process was replaced by another."""
        raise NotImplementedError

    @property
    def engine_pid(self) -> int | None:
        """The engine process."""
        raise NotImplementedError

    @property
    def last_error(self) -> EngineDeadError | None:
        """Why the engine is not up, or why the one before it died."""
        raise NotImplementedError

    def check_health(self) -> None:
        """Raises EngineDeadError unless requests are served now."""
        raise NotImplementedError

    async def wait_for_failure(self) -> EngineDeadError:
        """Returns when the engine is dead for good: restarts are off, or fail one after another."""
        raise NotImplementedError

    def stats(self) -> Stats | None:
        """The latest figures, at most a second old while the engine is up; None before them."""
        raise NotImplementedError

    def live_requests(self) -> list[LiveRequest]:
        """All unfinished prompts, in the order of their arrival."""
        raise NotImplementedError

    # Orders ---------------------------------------------------------------------------------------

    async def memory_map(self, max_cells: int = 256) -> PageRows:
        """The virtual address space at this moment, at most so many cells for each slot."""
        raise NotImplementedError

    async def set_budget(self, budget_bytes: int | str) -> BudgetReport:
        """Moves the KV cache's budget; memory beyond it goes back to the device.

        Raises:
            ValueError: no size.
        """
        raise NotImplementedError

    async def reset_prefix_cache(self) -> None:
        """Forgets the K and V of finished requests."""
        raise NotImplementedError

    async def check(self) -> None:
        """Verifies the engine's and the pool's invariants.

        Raises:
            RuntimeError: what is broken.
        """
        raise NotImplementedError
