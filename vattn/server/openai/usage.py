"""How many tokens a request took, as OpenAI tells it."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from vattn.outputs import RequestOutput


class PromptTokensDetails(BaseModel):
    """Of ``prompt_tokens``, those whose K and V were in the cache."""

    cached_tokens: int


class UsageInfo(BaseModel):
    """For the documentation of responses."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class Usage:
    """Counts a request's tokens while its outputs come.

    Each prompt is counted once, whatever ``n`` is, and all new tokens of all samples.
    """

    __slots__ = ("_cached", "_prompts", "completion_tokens")

    def __init__(self) -> None:
        self.completion_tokens = 0
        self._prompts: dict[int, int] = {}
        self._cached: dict[int, int] = {}

    def add(self, prompt_index: int, output: RequestOutput) -> None:
        """Counts an output of kind DELTA, or the only one of kind FINAL_ONLY."""
        self._prompts[prompt_index] = len(output.prompt_token_ids)
        self._cached[prompt_index] = output.num_cached_tokens
        for sample in output.outputs:
            self.completion_tokens += len(sample.token_ids)

    @property
    def prompt_tokens(self) -> int:
        """Of the prompts that have been seen."""
        return sum(self._prompts.values())

    @property
    def cached_tokens(self) -> int:
        """Of these, tokens that were found in the cache."""
        return sum(self._cached.values())

    def body(self) -> dict[str, Any]:
        """As responses have it."""
        prompt = self.prompt_tokens
        return {
            "prompt_tokens": prompt,
            "completion_tokens": self.completion_tokens,
            "total_tokens": prompt + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }
