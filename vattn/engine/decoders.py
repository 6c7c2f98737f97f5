"""Tokens into text while they come, for tokenizers of every kind.

Tokenizers of Rust decode through the stream of ``tokenizers``. It gives text as soon as a decoding
of its last tokens is longer than the one before and does not end in U+FFFD, and what it must not
be left alone with is handled here:

- It gives nothing for as long as that does not happen, and decodes all that waits with each token.
  No character is of more than four tokens, so what waits is cut where two sides, both of them with
  text, read the same apart as together, and a stream begins anew behind the cut.
- A run of byte tokens that is not UTF-8 as a whole reads as U+FFFD for each byte, those included
  that have been given as characters; the stream then fails with "Invalid prefix". So a run goes in
  byte by byte, and the first of four bytes without a character is given as U+FFFD by itself.
- A stream that begins anew takes its first token for the first of a text, whose space is stripped;
  one that is made with tokens of a prompt gives their text as new if it ends within a character.
  So one that continues something is made with a token that is known to be text.
- It has no end: the tokens that gave nothing are kept here, and decoded then.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

UNFINISHED = "\ufffd"  # how decoders write a character whose rest may still come
_LONGEST_CHARACTER = 4  # bytes of UTF-8, and so tokens


class Decoder(Protocol):
    """Turns tokens into text that will not change any more."""

    def push(self, tokens: Sequence[int]) -> str:
        """The text that is certain now."""
        ...

    def flush(self) -> str:
        """The rest, as no more tokens will come."""
        ...


# Tokenizers of Rust -------------------------------------------------------------------------------


class Backend:
    """A tokenizer of Rust, and what its streams must know of it.

    Args:
        tokenizer: of the package ``tokenizers``.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        kinds = decoder_kinds(tokenizer)
        added = tokenizer.get_added_tokens_decoder()
        self.special = frozenset(token for token, content in added.items() if content.special)
        self.byte_tokens = _byte_tokens(tokenizer) if "ByteFallback" in kinds else frozenset()
        # The bytes of a token do not depend on what was before it; only other text may.
        self.context = [] if "ByteLevel" in kinds else _plain_token(tokenizer, self.byte_tokens)
        self._context_text = self.decode(self.context)

    def decoder(self, prompt_ids: Sequence[int], skip: frozenset[int]) -> Decoder:
        """A decoder for the continuation of a prompt, which leaves some tokens out."""
        begun = self.has_token(token for token in reversed(prompt_ids) if token not in skip)
        return (_RunDecoder if self.byte_tokens else _StreamDecoder)(self, skip, begun)

    def has_token(self, ids: Iterable[int]) -> bool:
        """Whether there is a token for one of some ids."""
        return any(self.tokenizer.id_to_token(token) is not None for token in ids)

    def stream(self, begun: bool) -> DecodeStream:
        """A stream, of a new text or of one that has begun."""
        return DecodeStream(ids=self.context if begun else [], skip_special_tokens=False)

    def decode(self, tokens: list[int]) -> str:
        """The text of tokens by themselves."""
        return self.tokenizer.decode(tokens, skip_special_tokens=False)

    def continuation(self, tokens: list[int], begun: bool) -> str:
        """The text of tokens, of a new text or of one that has begun."""
        if begun:
            text = self.decode(self.context + tokens)
            if text.startswith(self._context_text):
                return text[len(self._context_text) :]
        return self.decode(tokens)


def decoder_kinds(tokenizer: Tokenizer) -> set[str]:
    """Names of the decoders that a tokenizer's one is made of; none of one made in Python."""
    try:
        state = json.loads(tokenizer.decoder.__getstate__())
    except Exception:  # there is none, or it cannot be written down
        return set()
    kinds, todo = set(), [state]
    while todo:
        each = todo.pop()
        kinds.add(each["type"])
        todo += each.get("decoders", [])
    return kinds


def _byte_tokens(tokenizer: Tokenizer) -> frozenset[int]:
    """The tokens that stand for one byte, which ``ByteFallback`` knows by how they are written."""
    names = [f"<0x{byte:{style}}>" for style in ("02X", "02x") for byte in range(256)]
    found = map(tokenizer.token_to_id, names)
    return frozenset(token for token in found if token is not None)


def _plain_token(tokenizer: Tokenizer, byte_tokens: frozenset[int]) -> list[int]:
    """A token that is text by itself, in a list; none if there is no such token."""
    added = tokenizer.get_added_tokens_decoder()
    for token in range(tokenizer.get_vocab_size()):
        if token not in added and token not in byte_tokens:
            text = tokenizer.decode([token])
            if text.strip() and UNFINISHED not in text:
                return [token]
    return []


class _StreamDecoder:
    """A stream whose tokens wait no longer than a character may take."""

    __slots__ = ("_backend", "_begun", "_skip", "_stream", "_waiting")

    def __init__(self, backend: Backend, skip: frozenset[int], begun: bool) -> None:
        self._backend = backend
        self._skip = skip
        self._begun = begun  # there is text before the stream's first token
        self._stream = backend.stream(begun)
        self._waiting: list[int] = []  # tokens whose text has not been given

    def push(self, tokens: Sequence[int]) -> str:
        skip = self._skip
        return self._push([token for token in tokens if token not in skip])

    def flush(self) -> str:
        if not self._waiting:
            return ""
        return self._backend.continuation(self._waiting, self._begun) + self._restart([])

    def _push(self, tokens: list[int]) -> str:
        if not tokens:
            return ""
        try:
            text = self._stream.step(self._backend.tokenizer, tokens)
        except Exception as error:  # tokenizers has no type for it
            if not str(error).startswith("Invalid prefix"):
                raise
            # A decoder that changes earlier text. What was given stays; what is new is not lost.
            self._waiting += tokens
            return self.flush()
        if text is None:
            self._waiting += tokens
            if len(tokens) > 1 or len(self._waiting) > _LONGEST_CHARACTER:
                return self._settle()
            return ""
        self._begun = True
        if self._waiting:
            self._waiting = []
        return text

    def _settle(self) -> str:
        """Gives what is certain of the tokens that wait."""
        backend, waiting, begun = self._backend, self._waiting, self._begun
        self._waiting = known = [token for token in waiting if backend.has_token([token])]
        whole = backend.continuation(known, begun)
        if not whole.endswith(UNFINISHED):  # tokens without text
            return whole + self._restart([])
        for cut in range(len(known) - 1, max(0, len(known) - _LONGEST_CHARACTER - 1), -1):
            head = backend.continuation(known[:cut], begun)
            if head + backend.continuation(known[cut:], True) == whole:
                return head + self._restart(known[cut:])
        return self._restart(known) if len(known) < len(waiting) else ""

    def _restart(self, rest: list[int]) -> str:
        """Begins a stream with the last of the tokens that wait; the others have been given."""
        given = self._waiting[: len(self._waiting) - len(rest)]
        self._begun = self._begun or self._backend.has_token(given)
        self._stream, self._waiting = self._backend.stream(self._begun), []
        return "".join([self._push([token]) for token in rest])


class _RunDecoder(_StreamDecoder):
    """A stream into which runs of byte tokens go byte by byte.

    Bytes are read from the left: a character where one begins, else U+FFFD for the byte. A run that
    is UTF-8 as a whole reads as the tokenizer reads it.
    """

    __slots__ = ()

    def push(self, tokens: Sequence[int]) -> str:
        if not self._waiting and self._backend.byte_tokens.isdisjoint(tokens):
            return super().push(tokens)
        skip = self._skip
        return "".join([self._push_one(token) for token in tokens if token not in skip])

    def flush(self) -> str:
        return self._break(0)

    def _push_one(self, token: int) -> str:
        if token in self._backend.byte_tokens:
            return self._push([token]) + self._break(_LONGEST_CHARACTER - 1)
        if not self._waiting:
            return self._push([token])
        if not self._backend.has_token([token]):
            return ""  # it does not end a run
        return self._break(0) + self._push([token])

    def _break(self, most: int) -> str:
        """Lets the first of the tokens that wait go, for no character begins there."""
        text = ""
        while len(self._waiting) > most:
            first, *rest = self._waiting
            text += self._backend.continuation([first], self._begun) + self._restart(rest)
        return text


# Any other tokenizer ------------------------------------------------------------------------------

_CONTEXT_TOKENS = 6  # of the prompt; enough for a decoder to know what to put before the next
_STUCK_TOKENS = 16  # no character is that long: what waits is not going to become text


class WindowDecoder:
    """Decodes the last tokens with a few before them, and takes what comes after those' text.

    Args:
        tokenizer: anything with ``decode(ids, skip_special_tokens=...)``.
        prompt_ids: what the tokens continue.
        skip: tokens that are left out.
    """

    def __init__(self, tokenizer: Any, prompt_ids: Sequence[int], skip: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._skip = skip
        last = prompt_ids[-_CONTEXT_TOKENS:]
        self._tokens = [token for token in last if token not in skip]
        self._told = len(self._tokens)  # tokens of the window whose text has been given
        self._text = self._decode(self._tokens)  # that text
        if self._text.endswith(UNFINISHED):
            # The prompt ends within a character; the output cannot continue it as text.
            self._tokens, self._told, self._text = [], 0, ""

    def push(self, tokens: Sequence[int]) -> str:
        """As of :class:`Decoder`."""
        return "".join([self._push(token) for token in tokens if token not in self._skip])

    def flush(self) -> str:
        """As of :class:`Decoder`."""
        if self._told == len(self._tokens):
            return ""
        return self._take(len(self._tokens), self._decode(self._tokens))

    def _push(self, token: int) -> str:
        self._tokens.append(token)
        text = self._decode(self._tokens)
        if not text.endswith(UNFINISHED):
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
