"""What comes back from the engine; no torch here."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class Timings:
    """Moments of a request, in seconds of ``time.monotonic``; 0 for not yet."""

    arrival_s: float = 0.0
    scheduled_s: float = 0.0
    first_token_s: float = 0.0
    last_token_s: float = 0.0
    finished_s: float = 0.0

    def copy(self) -> Timings:
        """These moments, for somebody else; a tenth of what ``copy.copy`` takes."""
        return Timings(
            self.arrival_s,
            self.scheduled_s,
            self.first_token_s,
            self.last_token_s,
            self.finished_s,
        )


@dataclass(slots=True)
class Logprob:
    """Log probability of a token at one position, and its rank (1 is the likeliest)."""

    logprob: float
    rank: int
    decoded_token: str | None = None


@dataclass(frozen=True, slots=True)
class KVUsage:
    """What a sequence has of the KV cache, or had when it ended.

    Args:
        pages: with its tokens, shared ones included.
        shared_pages: of these, those that another running sequence has as well, or had while this
            one had them already. So samples of one prompt that end one after the other tell the
            same, the last one included.
        copied_bytes: copied so far because it went on where another sequence had been: partly
            filled pages. Copies to host memory and back do not count.
    """

    pages: int = 0
    shared_pages: int = 0
    copied_bytes: int = 0


@dataclass(frozen=True)
class CompletionOutput:
    """One sample, so far or whole. ``text`` is empty without a tokenizer.

    ``cumulative_logprob`` is the sum over its tokens, if log probabilities were asked for. ``kv``
    is what it had of the KV cache when it ended; None before, and if it never began.
    """

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[dict[int, Logprob]] | None
    finish_reason: str | None
    stop_reason: int | str | None
    error: str | None = None
    cumulative_logprob: float | None = None
    kv: KVUsage | None = None


@dataclass(frozen=True)
class RequestOutput:
    """What became of one prompt.

    ``num_cached_tokens`` counts prompt tokens whose K and V were found in the cache. ``metrics``
    are the moments of the first sample. ``prompt_logprobs`` has an entry for each token of the
    prompt, None for the first, if they were asked for.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    num_cached_tokens: int
    metrics: Timings
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None


@dataclass(frozen=True)
class BeamSearchSequence:
    """One sequence that beam search found.

    Args:
        token_ids: the new tokens, an end-of-sequence token included.
        text: of the new tokens; empty without a tokenizer.
        cum_logprob: sum of the log probabilities of the new tokens.
        score: ``cum_logprob`` over the number of new tokens to the power of ``length_penalty``.
        finish_reason: ``"stop"`` or ``"length"``.
        stop_reason: as of :class:`CompletionOutput`.
        kv: what its beam had at the end.
    """

    token_ids: list[int]
    text: str
    cum_logprob: float
    score: float
    finish_reason: str | None
    stop_reason: int | str | None = None
    kv: KVUsage = field(default_factory=KVUsage)


@dataclass(frozen=True)
class BeamSearchOutput:
    """The sequences of one prompt, best first; none, and ``error``, if it could not be served."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    sequences: list[BeamSearchSequence]
    num_cached_tokens: int
    metrics: Timings
    finish_reason: str | None = None  # of the search: "stop", "length", "abort", "deadline"...
    error: str | None = None
