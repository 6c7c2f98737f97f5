"""Generates the texts of all prompts at once with a :class:`vattn.llm.LLM`."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from vattn.cli.generate import Request
from vattn.hf.model import LoadedModel
from vattn.kv.report import CacheStats, MemoryMap
from vattn.llm import LLM
from vattn.metrics import EngineStats
from vattn.outputs import CompletionOutput, KVUsage, Logprob, RequestOutput
from vattn.sampling_params import BeamSearchParams, RequestOutputKind, SamplingParams

T = TypeVar("T")

# With so few sequences memory is looked at after each step, else now and then.
_FEW_SEQUENCES = 16
_LOOK_EVERY_S = 0.1
# A model whose generation config has one of these says how it is sampled.
_CHANCE = ("temperature", "top_p", "top_k", "min_p")
# A look that takes long is taken rarely, so that all of them take less than a tenth of the time.
_LONG_LOOK_S = 0.005


@dataclass
class Output:
    """The text of one sample of one prompt."""

    prompt_index: int
    sample: int
    prompt: str
    prompt_tokens: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    cached_tokens: int = 0  # of the prompt, found in the KV cache
    finish_reason: str | None = None  # "stop", "length" or "error"; None: interrupted
    stop_reason: int | str | None = None  # the token or string that stopped it, if it was asked for
    error: str | None = None
    cumulative_logprob: float | None = None
    score: float | None = None  # of a beam
    kv: KVUsage = field(default_factory=KVUsage)
    logprobs: list[dict[int, Logprob]] | None = None
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None  # of the first sample

    def add(self, new: CompletionOutput) -> None:
        """Appends what is new."""
        self.text += new.text
        self.token_ids += new.token_ids
        self.finish_reason, self.stop_reason = new.finish_reason, new.stop_reason
        self.error = new.error
        self.cumulative_logprob, self.kv = new.cumulative_logprob, new.kv or KVUsage()
        if new.logprobs is not None:
            self.logprobs = extended(self.logprobs, new.logprobs)


def extended(before: list[T] | None, new: Sequence[T]) -> list[T]:
    """A list with what is new at its end, which is not copied; None is an empty one."""
    entries = [] if before is None else before
    entries.extend(new)
    return entries


@dataclass
class Timing:
    """When the first token of a run came and how long all of it took, in seconds."""

    first_token_s: float | None = None
    total_s: float = 0.0
    tokens: int = 0

    @property
    def tokens_per_s(self) -> float:
        """Generated tokens of all sequences per second of wall time, prefill included."""
        return self.tokens / self.total_s if self.total_s else 0.0


@dataclass(frozen=True)
class News:
    """What a step gave to one prompt.

    Args:
        prompt_index: of the prompt.
        text: new text of its first sample.
        is_done: all its samples have ended.
    """

    prompt_index: int
    text: str
    is_done: bool


class Peak:
    """The KV cache at the moment when most tokens were live.

    At the end of a run every sequence has ended, so there would be nothing to see.

    Args:
        llm: whose cache it is.
        sequences: that are to be generated.
        with_map: keep the memory map, too.
    """

    def __init__(self, llm: LLM, sequences: int, *, with_map: bool) -> None:
        self._llm = llm
        self._pause_s = 0.0 if sequences <= _FEW_SEQUENCES else _LOOK_EVERY_S
        self._with_map = with_map
        self._next_s = 0.0
        self._step = -1
        self.stats: CacheStats | None = None
        self.memory: MemoryMap | None = None

    def look(self) -> None:
        """Looks once per step, if it is time."""
        step = self._llm.engine.scheduler.stats().steps
        now = time.perf_counter()
        if step == self._step or now < self._next_s:
            return
        self._step = step
        stats: CacheStats = self._llm.stats().cache
        if self.stats is None or stats.tokens > self.stats.tokens:
            self.stats = stats
            self.memory = self._llm.memory_map() if self._with_map else None
        took = time.perf_counter() - now
        pause = max(self._pause_s, 10 * took) if took > _LONG_LOOK_S else self._pause_s
        self._next_s = now + took + pause


class Run:
    """One run over all prompts, and what has come of it so far.

    Args:
        llm: the engine.
        request: with the prompts, as the user gave them.
        prompt_ids: their tokens.
        params: how to sample.
    """

    def __init__(
        self,
        llm: LLM,
        request: Request,
        prompt_ids: Sequence[list[int]],
        params: SamplingParams | BeamSearchParams,
    ) -> None:
        self.llm = llm
        self.params = params
        self.samples = request.samples
        self.timing = Timing()
        self.peak = Peak(llm, request.sequences, with_map=request.memory_map)
        self.outputs = [
            Output(index, sample, prompt, len(ids))
            for index, (prompt, ids) in enumerate(zip(request.prompts, prompt_ids, strict=True))
            for sample in range(self.samples)
        ]
        self._prompt_ids = prompt_ids

    def of_prompt(self, index: int) -> list[Output]:
        """The outputs of one prompt, sample by sample."""
        return self.outputs[index * self.samples : (index + 1) * self.samples]

    def most_tokens(self, index: int) -> int:
        """Most tokens that a sample of a prompt can get."""
        room = self.llm.max_model_len - len(self._prompt_ids[index])
        return min(self.params.max_tokens or room, room)

    @property
    def has_logprobs(self) -> bool:
        """Whether the outputs have log probabilities."""
        params = self.params
        if isinstance(params, BeamSearchParams):
            return True
        return params.logprobs is not None or params.prompt_logprobs is not None

    def stats(self) -> EngineStats:
        """Figures of the engine, now."""
        return self.llm.stats()

    def __iter__(self) -> Iterator[News]:
        """Generates, and tells of each prompt whenever it has something new."""
        started = time.perf_counter()
        try:
            for news, tokens in self._generate([{"prompt_token_ids": i} for i in self._prompt_ids]):
                self.timing.total_s = time.perf_counter() - started
                self.timing.tokens += tokens
                if tokens and self.timing.first_token_s is None:
                    self.timing.first_token_s = self.timing.total_s
                yield news
        finally:
            self.timing.total_s = time.perf_counter() - started

    def _generate(self, prompts: list[Any]) -> Iterator[tuple[News, int]]:
        """News, and how many tokens they are."""
        assert isinstance(self.params, SamplingParams)
        for output in self.llm.stream(prompts, self.params):
            self.peak.look()
            yield self._take(output), sum(len(new.token_ids) for new in output.outputs)

    def _take(self, output: RequestOutput) -> News:
        index = int(output.request_id.rpartition("-")[2])
        samples, text = self.of_prompt(index), ""
        for new in output.outputs:
            samples[new.index].add(new)
            text += new.text if new.index == 0 else ""
        first = samples[0]
        first.cached_tokens = output.num_cached_tokens
        if output.prompt_logprobs is not None:
            first.prompt_logprobs = extended(first.prompt_logprobs, output.prompt_logprobs)
        return News(index, text, output.finished)


def sampling_params(request: Request, loaded: LoadedModel) -> SamplingParams:
    """What was asked for, else the model's own, else 0.8 / 0.95.

    Args:
        request: with None for what is left to the model.
        loaded: the model, with what its generation config asks for.
    """
    own = dict(loaded.generation_defaults)
    says_how = getattr(loaded.model.generation_config, "do_sample", None) or own.keys() & _CHANCE
    given: dict[str, Any] = {} if says_how else {"temperature": 0.8, "top_p": 0.95}
    given |= own
    given |= {name: value for name in _CHANCE if (value := getattr(request, name)) is not None}
    given |= request.decoding.choice
    return SamplingParams(
        **given
        | {
            "n": request.samples,
            "stop": request.stop or None,
            "max_tokens": request.max_tokens,
            "min_tokens": request.min_tokens,
            "output_kind": RequestOutputKind.DELTA,
            "structured_outputs": request.decoding.structured,
        }
    )


def settings(params: SamplingParams | BeamSearchParams) -> dict[str, Any]:
    """The parameters that decide a text, for the record of a run."""
    given = {entry.name: getattr(params, entry.name) for entry in dataclasses.fields(params)}
    if isinstance(params, BeamSearchParams):
        return given
    always = ("temperature", "top_p", "top_k", "min_p", "stop")
    others = ("n", "seed", "max_tokens", "min_tokens", "output_kind", "structured_outputs")
    default = SamplingParams()
    asked = {
        name: value
        for name, value in given.items()
        if name in always or (name not in others and value != getattr(default, name))
    }
    if params.structured_outputs is not None:
        kinds = dataclasses.asdict(params.structured_outputs).items()
        asked["structured_outputs"] = {name: value for name, value in kinds if value}
    return asked
