"""What the scheduler schedules: one sample of one prompt, and how far it is; no torch here."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Any

from vattn.outputs import KVUsage, Logprob, Timings
from vattn.sampling_params import SamplingParams

# In what a request ended with that needs more pages than the budget has.
OUT_OF_PAGES = "out of pages"


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
    rank: Any = None  # by the scheduling policy: smaller goes first; set by the scheduler
    deadline_s: float | None = None  # of time.monotonic
    cache_salt: str = ""
    source: Request | None = None  # the sample 0 whose prompt this one shares
    grammar: Any = None  # what its output must be in, as far as it has come; see structured.py
    group: Any = None  # the beams that it is one of; see beams.py
    bad_words_ids: tuple[tuple[int, ...], ...] = ()  # what bad_words are as tokens
    # The scheduler launches no step of it before its latest token has arrived on the host.
    waits_for_tokens: bool = False
    # A step of it is sampled only when its latest token has arrived on the host.
    needs_tokens: bool = False

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
    drafts: list[int] = field(default_factory=list)  # guesses at its next tokens, to be verified
    never_drafts: bool = False  # it is decoded without them from now on
    logprobs: list[dict[int, Logprob]] | None = None  # per output token, if asked for
    # Per token of the prompt, if asked for; as far as they are known.
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    kv: KVUsage | None = None  # when it ended; until then what it has from slots that it lost
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
