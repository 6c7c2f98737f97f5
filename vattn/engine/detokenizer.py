"""Text of a sequence while it grows, and where a stop string ends it.

A token is not a piece of text: characters span tokens, and tokenizers write a space or not by what
came before. The text here is such that all pieces together are the tokenizer's decoding of the
output, for tokenizers of bytes, exactly, whatever the tokens; for others, its continuation of the
prompt (a space that belongs between prompt and output is kept).
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Any, Protocol

from vattn.engine.stops import StopStrings
from vattn.sampling_params import SamplingParams

_UNFINISHED = "\ufffd"  # how decoders write a character whose rest may still come
_CONTEXT_TOKENS = 6  # of the prompt; enough for a decoder to know what to put before the next
_STUCK_TOKENS = 16  # no character is that long: what waits is not going to become text


class Decoder(Protocol):
    """Turns tokens into text that will not change any more."""

    def push(self, tokens: Sequence[int]) -> str:
        """The text that is certain now."""
        ...

    def flush(self) -> str:
        """The rest, as no more tokens will come."""
        ...


class TextSource:
    """A tokenizer, as what makes decoders. One serves all requests.

    Args:
        tokenizer: of transformers, or anything with ``decode(ids, skip_special_tokens=...)``.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.special = _special_ids(tokenizer)
        self.pieces = _Pieces(tokenizer.backend_tokenizer) if _is_bytes(tokenizer) else None
        self._names: dict[int, str] = {}

    def decoder(self, prompt_ids: Sequence[int], skip_special_tokens: bool) -> Decoder:
        """A decoder for the continuation of a prompt."""
        skip = self.special if skip_special_tokens else frozenset()
        if self.pieces is not None:
            return _ByteDecoder(self.pieces, skip)
        return _WindowDecoder(self.tokenizer, prompt_ids, skip)

    def name(self, token: int) -> str:
        """The text of a token by itself, for log probabilities."""
        name = self._names.get(token)
        if name is None:
            name = self._names[token] = str(self.tokenizer.decode([token]))
        return name


def _special_ids(tokenizer: Any) -> frozenset[int]:
    """What ``skip_special_tokens`` leaves out: of a Rust tokenizer, the tokens marked special."""
    added = getattr(tokenizer, "added_tokens_decoder", None)
    if added and getattr(tokenizer, "is_fast", False):
        return frozenset(i for i, token in added.items() if token.special)
    return frozenset(tokenizer.all_special_ids)


# Tokenizers of bytes ------------------------------------------------------------------------------


def _is_bytes(tokenizer: Any) -> bool:
    """Whether each token stands for bytes, whatever is around it (GPT-2, Llama 3, Qwen, ...)."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return backend is not None and type(backend.decoder).__name__ == "ByteLevel"


def _byte_of_character() -> dict[str, int]:
    """Byte-level vocabularies write printable Latin-1 as itself, other bytes from U+0100 on.

    A. Radford et al., "Language models are unsupervised multitask learners", 2019.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = sorted(set(range(256)) - set(printable))
    table = {chr(byte): byte for byte in printable}
    return table | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_BYTES = _byte_of_character()


class _Pieces(dict[int, bytes]):
    """The bytes of each token, looked up when first seen; none for an id without a token."""

    def __init__(self, backend: Any) -> None:
        super().__init__()
        self._backend = backend

    def __missing__(self, token: int) -> bytes:
        written = self._backend.id_to_token(token) or ""
        try:
            piece = bytes(_BYTES[character] for character in written)
        except KeyError:  # an added token, which is written as it reads
            piece = written.encode()
        self[token] = piece
        return piece


class _ByteDecoder:
    """Joins bytes; holds back the beginning of a character."""

    __slots__ = ("_pieces", "_skip", "_utf8")

    def __init__(self, pieces: _Pieces, skip: frozenset[int]) -> None:
        self._pieces = pieces
        self._skip = skip
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, tokens: Sequence[int]) -> str:
        pieces, skip = self._pieces, self._skip
        return self._utf8.decode(b"".join([pieces[t] for t in tokens if t not in skip]))

    def flush(self) -> str:
        return self._utf8.decode(b"", final=True)


# Any other tokenizer ------------------------------------------------------------------------------


class _WindowDecoder:
    """Decodes the last tokens with a few before them, and takes what comes after those' text."""

    def __init__(self, tokenizer: Any, prompt_ids: Sequence[int], skip: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._skip = skip
        last = prompt_ids[-_CONTEXT_TOKENS:]
        self._tokens = [token for token in last if token not in skip]
        self._told = len(self._tokens)  # tokens of the window whose text has been given
        self._text = self._decode(self._tokens)  # that text
        if self._text.endswith(_UNFINISHED):
            # The prompt ends within a character; the output cannot continue it as text.
            self._tokens, self._told, self._text = [], 0, ""

    def push(self, tokens: Sequence[int]) -> str:
        return "".join([self._push(token) for token in tokens if token not in self._skip])

    def flush(self) -> str:
        if self._told == len(self._tokens):
            return ""
        return self._take(len(self._tokens), self._decode(self._tokens))

    def _push(self, token: int) -> str:
        self._tokens.append(token)
        text = self._decode(self._tokens)
        if not text.endswith(_UNFINISHED):
            # Tokens that add nothing wait, as the next may need to know what was before them.
            return self._take(len(self._tokens), text) if text != self._text else ""
        if (len(self._tokens) - self._told) % _STUCK_TOKENS:
            return ""
        # Bytes that are no text. Cut where both sides read the same apart as together.
        for cut in range(len(self._tokens) - 1, len(self._tokens) - 5, -1):
            head = self._decode(self._tokens[:cut])
            if head + self._decode(self._tokens[cut:]) == text:
                return self._take(cut, head)
        return ""

    def _take(self, end: int, text: str) -> str:
        """Gives the text of tokens up to ``end``; those before what is new leave the window."""
        if text.startswith(self._text):
            new = text[len(self._text) :]
        else:  # the decoder has thought better of what was given, as of bytes that came out invalid
            new = self._decode(self._tokens[self._told : end])
        self._tokens = self._tokens[self._told :]
        self._told = end - self._told
        self._text = self._decode(self._tokens[: self._told])
        return new

    def _decode(self, tokens: list[int]) -> str:
        # Special tokens to skip are not in the window. Tidying spaces would change earlier text.
        return str(
            self._tokenizer.decode(
                tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False
            )
        )


# The text of a sequence --------------------------------------------------------------------------


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
