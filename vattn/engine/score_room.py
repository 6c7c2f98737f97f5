"""How many tokens of prompts a step can score; no torch here.

Each of them has a row of logits of its own, and some log probabilities that go to the host.
"""

from __future__ import annotations

from vattn.engine.gangs import wanted_tokens
from vattn.engine.policy import to_score
from vattn.request import Request
from vattn.sampling_params import ALL_LOGPROBS, MAX_LOGPROBS, SamplingParams

# Tokens of prompts that a step scores: for a vocabulary of 128K their logits are half a gigabyte.
# As many times MAX_LOGPROBS is how many log probabilities it can have of them: a million, which
# take 200 MB of the host as long as somebody holds them.
MAX_SCORED_TOKENS = 1024


class ScoreRoom:
    """What is left of a step's share of scores.

    Args:
        vocab_size: logits of a row.
    """

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._left = MAX_SCORED_TOKENS

    def reset(self) -> None:
        """Begins a step."""
        self._left = MAX_SCORED_TOKENS

    def tokens(self, request: Request) -> int:
        """How many of the tokens that a request wants to compute it can be given.

        Those that need no score, or have theirs from before a preemption, are not limited.
        """
        wanted = wanted_tokens(request)
        if request.prompt_logprobs is None:
            return wanted
        first, count = to_score(request, wanted)
        left = self._left // score_share(request.params, self._vocab_size)
        return wanted if count <= left else first - request.computed + left

    def spend(self, request: Request, tokens: int) -> None:
        """Takes what so many tokens of a request need."""
        if request.prompt_logprobs is not None:
            _, count = to_score(request, tokens)
            self._left -= count * score_share(request.params, self._vocab_size)
            assert self._left >= 0, self._left


def score_share(params: SamplingParams, vocab_size: int) -> int:
    """How much of :data:`MAX_SCORED_TOKENS` a token of a prompt takes, by its log probabilities.

    One, unless those of the whole vocabulary are wanted. Of the largest vocabulary it takes all.
    """
    if params.prompt_logprobs != ALL_LOGPROBS:
        return 1
    return min(-(-vocab_size // MAX_LOGPROBS), MAX_SCORED_TOKENS)
