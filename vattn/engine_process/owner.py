"""The owner's side of an engine process: its prompts, its questions, and their answers."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
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
    News,
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

# Longer texts are tokenized in a thread: this many characters take about half a millisecond.
_LONG_TEXT = 2000
_TOKENIZING_THREADS = 2
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
        self._threads: ThreadPoolExecutor | None = None

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
        """Sends a prompt; :meth:`drop` must follow.

        Raises:
            RequestRefused: the prompt, its parameters or its id are at fault.
            EngineDeadError: the engine is not up.
        """
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
                timeout_s,
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
        if not isinstance(text, str) or len(text) <= _LONG_TEXT:
            return parse_prompt(prompt, priority, self._encode)
        if self._threads is None:
            self._threads = ThreadPoolExecutor(_TOKENIZING_THREADS, "vattn-tokenize")
        return await asyncio.get_running_loop().run_in_executor(
            self._threads, parse_prompt, prompt, priority, self._encode
        )

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

    # News -----------------------------------------------------------------------------------------

    def _on_news(self, news: News) -> None:
        if isinstance(news, Steps):
            mirrors = self.mirrors
            for progress in news.progress:
                mirror = mirrors.get(progress.handle)
                if mirror is not None:
                    mirror.apply(progress)
            if news.stats is not None:
                self.stats = news.stats
        elif isinstance(news, Refused):
            mirror = self.mirrors.get(news.handle)
            if mirror is not None:
                mirror.fail(RequestRefused(news.error))
        elif isinstance(news, Answer | Trouble):
            self._on_answer(news)

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
        threads, self._threads = self._threads, None
        try:
            await self.engine.close()
        finally:
            if threads is not None:
                threads.shutdown(wait=False, cancel_futures=True)

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
