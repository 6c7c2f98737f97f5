"""Text of a sequence while it grows, and where a stop string ends it.

A token is not a piece of text: characters span tokens, and tokenizers write a space or not by what
came before. The text here is such that all pieces together are the tokenizer's decoding of the
output, for tokenizers of bytes, exactly, whatever the tokens; for others, its continuation of the
prompt (a space that belongs between prompt and output is kept).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenizers import Tokenizer

from vattn.engine.decoders import Backend, Decoder, WindowDecoder
from vattn.engine.stops import StopStrings
from vattn.sampling_params import SamplingParams


class TextSource:
    """A tokenizer, as what makes decoders. One serves all requests.

    Args:
        tokenizer: of transformers, or anything with ``decode(ids, skip_special_tokens=...)``.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        backend = getattr(tokenizer, "backend_tokenizer", None)
        self._backend = Backend(backend) if isinstance(backend, Tokenizer) else None
        if self._backend is not None:
            self.special = self._backend.special
        else:
            self.special = frozenset(tokenizer.all_special_ids)
        self._names: dict[int, str] = {}

    def decoder(self, prompt_ids: Sequence[int], skip_special_tokens: bool) -> Decoder:
        """A decoder for the continuation of a prompt."""
        skip = self.special if skip_special_tokens else frozenset()
        if self._backend is not None:
            return self._backend.decoder(prompt_ids, skip)
        return WindowDecoder(self.tokenizer, prompt_ids, skip)

    def text(
        self, prompt_ids: Sequence[int], token_ids: Sequence[int], skip_special_tokens: bool = True
    ) -> str:
        """The whole text of a prompt's continuation."""
        decoder = self.decoder(prompt_ids, skip_special_tokens)
        return decoder.push(token_ids) + decoder.flush()

    def name(self, token: int) -> str:
        """The text of a token by itself, for log probabilities."""
        name = self._names.get(token)
        if name is None:
            name = self._names[token] = str(self.tokenizer.decode([token]))
        return name


class Detokenizer:
    """The text of one sequence's output.

    Args:
        source: the tokenizer.
        params: stop strings, and whether special tokens are text.
        prompt_ids: what the output continues.
    """

    def __init__(
        self, source: TextSource, params: SamplingParams, prompt_ids: Sequence[int]
    ) -> None:
        self._decoder = source.decoder(prompt_ids, params.skip_special_tokens)
        self._stops: StopStrings | None = None
        if params.stop_strings:
            self._stops = StopStrings(params.stop_strings, params.include_stop_str_in_output)
        self._min_tokens = params.min_tokens
        self._parts: list[str] = []
        self._untaken: list[str] = []
        self._ended = False
        self.tokens = 0  # that were taken, up to the one that completed a stop string
        self.stop: str | None = None

    @property
    def text(self) -> str:
        """All text let go so far."""
        if len(self._parts) > 1:
            self._parts = ["".join(self._parts)]
        return self._parts[0] if self._parts else ""

    def append(self, token_ids: Sequence[int]) -> tuple[str, str | None]:
        """Takes the next tokens; what follows a stop string is not looked at.

        Returns:
            The text that is new, and the stop string that ended it, if one did. As in vLLM, one
            that is complete within the first ``min_tokens`` tokens does not count.
        """
        if self._ended:
            return "", self.stop
        if self._stops is None:
            self.tokens += len(token_ids)
            new = self._decoder.push(token_ids)
        else:
            new = "".join([self._append(token, self._stops) for token in token_ids])
        self._give(new)
        return new, self.stop

    def _append(self, token: int, stops: StopStrings) -> str:
        if self._ended:
            return ""
        self.tokens += 1
        text = self._decoder.push([token])
        new, self.stop = stops.push(text, self.tokens > self._min_tokens)
        self._ended = self.stop is not None
        return new

    def finish(self) -> str:
        """Ends the text, and returns what had been held back; again, nothing."""
        if self._ended:
            return ""
        self._ended = True
        rest = self._decoder.flush()
        if self._stops is not None:
            rest = self._stops.push(rest, may_stop=False)[0] + self._stops.flush()
        self._give(rest)
        return rest

    def take(self) -> str:
        """The text let go since the last time."""
        new = "".join(self._untaken)
        self._untaken.clear()
        return new

    def _give(self, new: str) -> None:
        if new:
            self._parts.append(new)
            self._untaken.append(new)

    def check(self) -> None:
        """Verifies that a stop string has ended the text, and that nothing is held then."""
        assert self.text.endswith("".join(self._untaken)), self.text
        assert self.stop is None or self._ended, self.stop
        assert self._stops is None or not (self._ended and self._stops.held), self.text
