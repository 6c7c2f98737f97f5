"""What a user asks of the engine and what comes back; no torch here."""

from __future__ import annotations

import enum
import math
import numbers
import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

_SEED_LIMIT = 2**63
MAX_LOGPROBS = 1024
# Below it a distribution is a single token but for rounding; vLLM draws the line here, too.
GREEDY_TEMPERATURE = 1e-5


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How one request is sampled. Names and defaults are vLLM's; an unknown one is a TypeError.

    Args:
        n: samples per prompt; they share the pages of the prompt.
        temperature: 0, or anything below 1e-5, takes the likeliest token.
        top_p: smallest set of tokens with this much probability, 0 < p <= 1.
        top_k: the k likeliest tokens; 0 or -1 for all.
        min_p: tokens at least this probable relative to the likeliest, 0 <= p <= 1.
        seed: of this request; the same seed gives the same tokens in any batch. None draws one.
        stop: strings that end the text; not part of it unless ``include_stop_str_in_output``.
        stop_token_ids: tokens that end it, beside the model's end-of-sequence tokens.
        ignore_eos: go on after the model's end-of-sequence tokens.
        max_tokens: most new tokens; None for as many as the model's length allows.
        min_tokens: no end-of-sequence or stop token and no stop string before so many new tokens.
        logprobs: the log probabilities of this many likeliest tokens and of the sampled one, at
            each position; None for none.
        detokenize: produce text; needs a tokenizer.
        skip_special_tokens: leave special tokens out of the text.

    Raises:
        ValueError: a value out of range; the message names it and what is allowed.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False

    def __post_init__(self) -> None:
        self._check_whole("n", 1, 4096)
        self._check_number("temperature", 0.0, math.inf)
        self._check_number("top_p", 0.0, 1.0)
        if self.top_p == 0:
            raise ValueError("top_p=0 leaves no token; use a value above 0 and at most 1")
        self._check_whole("top_k", -1, _SEED_LIMIT)
        self._check_number("min_p", 0.0, 1.0)
        if self.seed is not None:
            self._check_whole("seed", 0, _SEED_LIMIT - 1)
        if self.max_tokens is not None:
            self._check_whole("max_tokens", 1, _SEED_LIMIT)
        self._check_whole("min_tokens", 0, _SEED_LIMIT)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(
                f"min_tokens={self.min_tokens} is more than max_tokens={self.max_tokens}; lower it"
            )
        if self.logprobs is not None:
            self._check_whole("logprobs", 0, MAX_LOGPROBS)
        for name in (
            "ignore_eos",
            "detokenize",
            "skip_special_tokens",
            "include_stop_str_in_output",
        ):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}={getattr(self, name)!r} must be True or False")
        object.__setattr__(self, "stop", self._stop_strings())
        object.__setattr__(self, "stop_token_ids", self._stop_ids())
        if self.stop and not self.detokenize:
            raise ValueError("stop strings need text; leave detokenize on, or use stop_token_ids")

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """The stop strings, none of them empty."""
        return tuple(self.stop or ())

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """The stop token ids."""
        return tuple(self.stop_token_ids or ())

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken always."""
        return self.temperature < GREEDY_TEMPERATURE or self.top_k == 1

    def _stop_strings(self) -> tuple[str, ...]:
        given: Any = self.stop
        stop = [given] if isinstance(given, str) else _list(given)
        if stop is None or not all(isinstance(text, str) and text for text in stop):
            raise ValueError(f"stop={given!r} must be non-empty strings")
        return tuple(stop)

    def _stop_ids(self) -> tuple[int, ...]:
        ids = _list(self.stop_token_ids)
        if ids is None or not all(_is_whole(token) and token >= 0 for token in ids):
            raise ValueError(f"stop_token_ids={self.stop_token_ids!r} must be token ids, 0 or more")
        return tuple(operator.index(token) for token in ids)

    def _check_whole(self, name: str, low: int, high: int) -> None:
        value = getattr(self, name)
        if not _is_whole(value):
            raise ValueError(f"{name}={value!r} must be a whole number")
        if not low <= operator.index(value) <= high:
            raise ValueError(f"{name}={value!r} must be at least {low} and at most {high}")
        object.__setattr__(self, name, operator.index(value))

    def _check_number(self, name: str, low: float, high: float) -> None:
        value = getattr(self, name)
        if not _is_number(value):
            raise ValueError(f"{name}={value!r} must be a number")
        if not low <= value <= high or math.isinf(value):
            limit = "" if math.isinf(high) else f" and at most {high:g}"
            raise ValueError(f"{name}={value!r} must be at least {low:g}{limit}, and finite")
        object.__setattr__(self, name, float(value))


def _is_whole(value: Any) -> bool:
    """Whether it is an integer, numpy's included; True and False are not meant as numbers."""
    return not isinstance(value, bool) and hasattr(value, "__index__")


def _is_number(value: Any) -> bool:
    return not isinstance(value, bool) and isinstance(value, numbers.Real)


def _list(values: Any) -> list[Any] | None:
    """Any iterable as a list, None as an empty one; None if it is neither."""
    if values is None:
        return []
    try:
        return list(values)
    except TypeError:
        return None


class Status(enum.IntEnum):
    """Where a request is."""

    WAITING = 0  # new, or preempted; holds no slot unless it is staged for the next step
    RUNNING = 1
    FINISHED = 2


class FinishReason(enum.StrEnum):
    """Why a request ended; the names are those of the OpenAI API where it has one."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    DEADLINE = "deadline"
    ERROR = "error"


@dataclass(slots=True)
class Timings:
    """Moments of a request, in seconds of ``time.monotonic``; 0 for not yet."""

    arrival_s: float = 0.0
    scheduled_s: float = 0.0
    first_token_s: float = 0.0
    last_token_s: float = 0.0
    finished_s: float = 0.0


@dataclass(slots=True)
class Logprob:
    """Log probability of a token at one position, and its rank (1 is the likeliest)."""

    logprob: float
    rank: int
    decoded_token: str | None = None


@dataclass(slots=True, eq=False)
class Request:
    """One sample of one prompt: what the scheduler schedules.

    Four integers say how far it is, ``cached <= computed <= length = len(tokens) + in_flight``;
    everything else about its progress is derived. ``computed`` tokens have their K and V in the
    slot as soon as the steps that were launched are done; ``in_flight`` tokens are sampled by such
    steps and have not arrived. A request that decodes has one token that is not computed.
    """

    id: str
    prompt_ids: list[int]
    params: SamplingParams
    limit: int  # length in tokens, prompt included, at which it ends
    index: int = 0  # which of the n samples
    seed: int = 0
    stop_ids: frozenset[int] = frozenset()  # that end it, end-of-sequence tokens included
    priority: int = 0  # smaller goes first, under the priority policy
    deadline_s: float | None = None  # of time.monotonic
    cache_salt: str = ""
    source: Request | None = None  # the sample 0 whose prompt this one shares

    tokens: list[int] = field(default_factory=list)  # prompt and output
    computed: int = 0
    in_flight: int = 0
    cached: int = 0  # prompt tokens that the first admission found in the cache
    slot: int = -1
    saved: Any = None  # what the memory manager swapped out
    output: Any = None  # its text so far, and what has been told of it; of the output processor
    status: Status = Status.WAITING
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None  # the stop token or string that ended it
    error: str | None = None
    order: int = 0  # of arrival; set by the scheduler
    preemptions: int = 0
    logprobs: list[dict[int, Logprob]] | None = None  # per output token, if asked for
    timings: Timings = field(default_factory=Timings)

    def __post_init__(self) -> None:
        if not self.tokens:
            self.tokens = list(self.prompt_ids)

    @property
    def length(self) -> int:
        """Tokens, those included that are sampled and have not arrived."""
        return len(self.tokens) + self.in_flight

    @property
    def uncomputed(self) -> int:
        """Tokens whose K and V are still to be computed."""
        return len(self.tokens) + self.in_flight - self.computed

    @property
    def output_ids(self) -> list[int]:
        """The tokens generated so far."""
        return self.tokens[len(self.prompt_ids) :]

    @property
    def finished(self) -> bool:
        """Whether it has ended, for whatever reason."""
        return self.status is Status.FINISHED

    def check(self) -> None:
        """Verifies the order of its integers."""
        assert 0 <= self.computed <= self.length <= self.limit, self
        assert self.in_flight >= 0, self
        assert self.tokens[: len(self.prompt_ids)] == self.prompt_ids, self
        assert (self.finish_reason is None) == (self.status is not Status.FINISHED), self


@dataclass(frozen=True)
class CompletionOutput:
    """One sample, so far or whole. ``text`` is empty without a tokenizer."""

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[dict[int, Logprob]] | None
    finish_reason: str | None
    stop_reason: int | str | None
    error: str | None = None


@dataclass(frozen=True)
class RequestOutput:
    """What became of one prompt.

    ``num_cached_tokens`` counts prompt tokens whose K and V were found in the cache. ``metrics``
    are the moments of the first sample.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    num_cached_tokens: int
    metrics: Timings
