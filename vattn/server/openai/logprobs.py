"""Log probabilities as completions and as chat tell them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from vattn.outputs import Logprob
from vattn.server.openai.token_bytes import TokenBytes

# JSON has no infinity; vLLM has the same number for it.
LEAST = -9999.0

Entry = Mapping[int, Logprob]


def finite(logprob: float) -> float:
    """A log probability that JSON can write."""
    return max(logprob, LEAST)


def token_text(token: int, logprob: Logprob | None, *, as_ids: bool = False) -> str:
    """A token as responses name it: its text, or ``token_id:N`` if asked for or if it has none."""
    if as_ids or logprob is None or logprob.decoded_token is None:
        return f"token_id:{token}"
    return logprob.decoded_token


class CompletionLogprobs:
    """Makes ``logprobs`` of a choice of ``/v1/completions``, delta by delta.

    Args:
        decode: token ids to text, for the first token of a prompt: it has no log probability.
        as_ids: tokens are named ``token_id:N``.

    ``text_offset`` counts characters from the beginning of the choice's text.
    """

    def __init__(self, decode: Callable[[list[int]], str], *, as_ids: bool = False) -> None:
        self._decode = decode
        self._as_ids = as_ids
        self._offset = 0

    def add(
        self, token_ids: Sequence[int], entries: Sequence[Entry | None], top: int
    ) -> dict[str, Any]:
        """Of some tokens: ``tokens``, ``token_logprobs``, ``top_logprobs``, ``text_offset``.

        Args:
            token_ids: the next ones.
            entries: one for each; None for the first token of a prompt, which has none.
            top: likeliest tokens that were asked for; the chosen one is there beside them.
        """
        tokens: list[str] = []
        chosen: list[float | None] = []
        tops: list[dict[str, float] | None] = []
        offsets: list[int] = []
        for token, entry in zip(token_ids, entries, strict=True):
            own = None if entry is None else entry.get(token)
            if own is None and not self._as_ids:
                text = self._decode([token])
            else:
                text = token_text(token, own, as_ids=self._as_ids)
            tokens.append(text)
            offsets.append(self._offset)
            self._offset += len(text)
            chosen.append(None if own is None else finite(own.logprob))
            tops.append(None if entry is None else self._likeliest(token, entry, top))
        return {
            "tokens": tokens,
            "token_logprobs": chosen,
            "top_logprobs": tops,
            "text_offset": offsets,
        }

    def _likeliest(self, token: int, entry: Entry, top: int) -> dict[str, float]:
        found: dict[str, float] = {}
        for other, logprob in _top(entry, top):
            # Tokens that are parts of characters may look alike; the likelier one is told.
            found.setdefault(
                token_text(other, logprob, as_ids=self._as_ids), finite(logprob.logprob)
            )
        own = entry[token]
        found.setdefault(token_text(token, own, as_ids=self._as_ids), finite(own.logprob))
        return found


class ChatLogprobs:
    """Makes ``logprobs.content`` of a chat's choices: of each token its logprob and bytes.

    Args:
        token_bytes: of the model's tokens.
        top: ``top_logprobs`` of the request; 0 for none.
        as_ids: tokens are named ``token_id:N``.
    """

    def __init__(self, token_bytes: TokenBytes, top: int, *, as_ids: bool = False) -> None:
        self._token_bytes = token_bytes
        self._top = top
        self._as_ids = as_ids

    def of(self, token_ids: Sequence[int], entries: Sequence[Entry]) -> list[dict[str, Any]]:
        """Of some tokens, with an entry for each."""
        return [
            {
                **self._told(token, entry[token]),
                "top_logprobs": [self._told(*each) for each in _top(entry, self._top)],
            }
            for token, entry in zip(token_ids, entries, strict=True)
        ]

    def _told(self, token: int, logprob: Logprob) -> dict[str, Any]:
        octets = self._token_bytes.of(token, logprob.decoded_token)
        return {
            "token": token_text(token, logprob, as_ids=self._as_ids),
            "logprob": finite(logprob.logprob),
            "bytes": None if octets is None else list(octets),
        }


def prompt_logprobs_body(
    entries: Sequence[Entry | None] | None,
) -> list[dict[str, dict[str, Any]] | None] | None:
    """``prompt_logprobs``, a field of vLLM: for each token, chosen and likeliest ones."""
    if entries is None:
        return None
    return [
        None
        if entry is None
        else {
            str(token): {
                "logprob": finite(logprob.logprob),
                "rank": logprob.rank,
                "decoded_token": logprob.decoded_token,
            }
            for token, logprob in entry.items()
        }
        for entry in entries
    ]


def _top(entry: Entry, top: int) -> list[tuple[int, Logprob]]:
    """The likeliest tokens, likeliest first."""
    ranked = sorted(entry.items(), key=lambda item: (item[1].rank, -item[1].logprob))
    return ranked[:top]
