"""The owner's side of an engine process: its prompts, its questions, and their answers."""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import msgspec

from vattn.engine.outputs import OutputProcessor
from vattn.engine.prompts import Prompt, check_timeout, parse_prompt
from vattn.engine_process.errors import EngineDeadError, RequestRefused
from vattn.engine_process.messages import (
    Abort,
    Add,
    Answer,
    Ask,
    BudgetReport,
    News,
    Progress,
    Refused,
    Stats,
    Steps,
    Trouble,
    encode,
)
from vattn.engine_process.mirror import Mirror
from vattn.engine_process.params import to_wire
from vattn.engine_process.supervisor import Supervisor
from vattn.sampling_params import SamplingParams
from vattn.texts import beside

_log = logging.getLogger(__name__)
_T = TypeVar("_T")


class Owner:
    """See the module.

    Args:
        make_supervisor: of the three functions that a :class:`Supervisor` calls.
    """

    def __init__(self, make_supervisor: Callable[..., Supervisor]) -> None:
        self.engine = make_supervisor(
            on_news=self._on_news, on_death=self._on_death, is_busy=self._is_busy
        )
        self.tokenizer: Any = None
        self.stats: Stats | None = None
        self.mirrors: dict[int, Mirror] = {}  # by handle, and so in the order of arrival
        self._outputs = OutputProcessor()
        self._by_id: dict[str, Mirror | None] = {}  # None while its prompt is being tokenized
        self._asked: dict[int, asyncio.Future[Any]] = {}
        self._handles = itertools.count(1)
        self._numbers = itertools.count(1)

    def set_tokenizer(self, tokenizer: Any) -> None:
        """Before the first prompt."""
        self.tokenizer = tokenizer
        self._outputs = OutputProcessor(tokenizer)

    # Prompts --------------------------------------------------------------------------------------

    async def add(
        self,
        prompt: Prompt,
        params: SamplingParams,
        request_id: str,
        priority: int,
        timeout_s: float | None,
    ) -> Mirror:
        """Sends a prompt; :meth:`drop` must follow. ``timeout_s`` counts from now.

        Raises:
            RequestRefused: the prompt, its parameters or its id are at fault.
            EngineDeadError: the engine is not up.
        """
        asked_s = time.monotonic()
        self.engine.check_ready()
        if not isinstance(request_id, str):
            raise RequestRefused(f"request_id={request_id!r} must be text")
        if request_id in self._by_id:
            raise RequestRefused(f"request_id={request_id!r} is in use; choose another")
        if not isinstance(params, SamplingParams):
            raise RequestRefused(f"sampling_params={params!r} is not a vattn.SamplingParams")
        self._by_id[request_id] = None
        try:
            text, ids, salt, priority = await self._parse(prompt, priority)
            check_timeout(timeout_s)
            self.engine.check_ready()
            assert self.engine.facts is not None
            _check_ids(ids, self.engine.facts.vocab_size)
            mirror = Mirror(
                next(self._handles),
                request_id,
                text,
                ids,
                params,
                self.engine.facts,
                self._outputs,
                priority,
            )
            add = Add(
                mirror.handle,
                request_id,
                mirror.prompt_ids,
                to_wire(params),
                priority,
                salt,
                None if timeout_s is None else asked_s + float(timeout_s),
            )
            self.engine.send(encode(add))
        except BaseException as error:
            del self._by_id[request_id]
            if isinstance(error, EngineDeadError) or not isinstance(error, Exception):
                raise
            # Whatever a tokenizer raises is of this prompt, and so is what cannot be encoded.
            expected = isinstance(error, (ValueError, TypeError)) and str(error)
            raise RequestRefused(
                str(error) if expected else f"{type(error).__name__}: {error}"
            ) from error
        self._by_id[request_id] = self.mirrors[mirror.handle] = mirror
        return mirror

    def drop(self, mirror: Mirror) -> None:
        """Forgets a prompt; it is aborted if it has not ended."""
        del self.mirrors[mirror.handle], self._by_id[mirror.request_id]
        mirror.drop()
        if not mirror.is_finished and self.engine.is_ready:
            self.engine.send(encode(Abort([mirror.handle])))

    def abort(self, request_ids: Iterable[str]) -> None:
        """Has prompts ended; who waits for them is told by the engine."""
        known = [self._by_id.get(name) for name in request_ids]
        handles = [mirror.handle for mirror in known if mirror is not None]
        if handles and self.engine.is_ready:
            self.engine.send(encode(Abort(handles)))

    async def _parse(self, prompt: Any, priority: Any) -> tuple[str | None, list[int], str, int]:
        text = prompt.get("prompt") if isinstance(prompt, dict) else prompt
        chars = len(text) if isinstance(text, str) else 0
        return await beside(chars, lambda: parse_prompt(prompt, priority, self._encode))

    def _encode(self, text: str) -> Any:
        return self.tokenizer.encode(text)

    # Questions ------------------------------------------------------------------------------------

    async def ask(self, what: str, argument: Any, answer: type[_T]) -> _T:
        """Asks the engine, and waits for the answer.

        Raises:
            ValueError: the argument is at fault.
            RuntimeError: the engine could not answer.
            EngineDeadError: it died, or is not up.
        """
        number = next(self._numbers)
        self.engine.send(encode(Ask(number, what, argument)))
        future = self._asked[number] = asyncio.get_running_loop().create_future()
        try:
            return msgspec.convert(await future, answer)
        finally:
            del self._asked[number]

    async def set_budget(self, budget_bytes: int) -> BudgetReport:
        """Moves the budget, also of the processes that replace this one; raises as :meth:`ask`."""
        report = await self.ask("set_budget", budget_bytes, BudgetReport)
        self.engine.keep_budget(report.budget)
        return report

    # News -----------------------------------------------------------------------------------------

    def _on_news(self, news: News) -> None:
        if isinstance(news, Steps):
            mirrors = self.mirrors
            for progress in news.progress:
                mirror = mirrors.get(progress.handle)
                if mirror is not None:
                    try:
                        mirror.apply(progress)
                    except Exception as error:
                        self._fail(mirror, progress, error)
            if news.stats is not None:
                self.stats = news.stats
        elif isinstance(news, Refused):
            mirror = self.mirrors.get(news.handle)
            if mirror is not None:
                mirror.fail(RequestRefused(news.error))
        elif isinstance(news, Answer | Trouble):
            self._on_answer(news)

    def _fail(self, mirror: Mirror, progress: Progress, error: Exception) -> None:
        """Of a bug that one prompt has found; the others go on."""
        _log.exception("what the engine says of %s cannot be taken", mirror.request_id)
        if not mirror.is_finished:
            mirror.fail(
                RuntimeError(f"its tokens cannot be taken: {type(error).__name__}: {error}")
            )
            self.engine.send(encode(Abort([progress.handle])))

    def _on_answer(self, news: Answer | Trouble) -> None:
        future = self._asked.get(news.number)
        if future is None or future.done():
            return
        if isinstance(news, Answer):
            future.set_result(news.value)
        else:
            future.set_exception((ValueError if news.is_input else RuntimeError)(news.error))

    def _on_death(self, error: EngineDeadError) -> None:
        self.stats = None
        for mirror in self.mirrors.values():
            mirror.fail(EngineDeadError(str(error), restarting=error.restarting))
        for future in self._asked.values():
            if not future.done():
                future.set_exception(EngineDeadError(str(error), restarting=error.restarting))

    def _is_busy(self) -> bool:
        return bool(self._asked) or any(not mirror.is_finished for mirror in self.mirrors.values())

    # End ------------------------------------------------------------------------------------------

    async def close(self) -> None:
        """Ends everything; twice is once."""
        await self.engine.close()

    def check(self) -> None:
        """Verifies that ids and handles agree, and what is known of each prompt."""
        for handle, mirror in self.mirrors.items():
            assert mirror.handle == handle, handle
            assert self._by_id[mirror.request_id] is mirror, mirror.request_id
            for sample in mirror.samples:
                assert len(sample.tokens) <= sample.limit, sample
                assert sample.tokens[: len(mirror.prompt_ids)] == mirror.prompt_ids, sample
        self._outputs.check()

    def check_idle(self) -> None:
        """Verifies that nothing is left of any prompt or question."""
        self.check()
        assert not self.mirrors, self.mirrors
        assert not self._by_id, self._by_id
        assert not self._asked, self._asked
        assert not self._outputs._watched, self._outputs._watched


def _check_ids(ids: list[int], vocab_size: int) -> None:
    """Refuses what tokenizers and messages have no numbers for, in the engine's words."""
    if ids and (min(ids) < 0 or max(ids) >= vocab_size):
        bad = next(token for token in ids if not 0 <= token < vocab_size)
        raise ValueError(f"token id {bad} is not one of the {vocab_size} of this model")
