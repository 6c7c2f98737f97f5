"""The choices of a chat completion: messages, or deltas of them, made of the engine's outputs."""

from __future__ import annotations

import secrets
from collections.abc import Iterable
from typing import Any

from vattn.outputs import CompletionOutput
from vattn.server.openai.logprobs import chat_logprobs
from vattn.server.openai.run import finish_reason, stop_reason
from vattn.server.tools.base import (
    CallBegins,
    CallEnds,
    CallGoesOn,
    FunctionCall,
    Piece,
    Said,
    ToolParser,
    gather,
)


class ChatChoice:
    """One sample: give it all outputs by :meth:`deltas`, or by :meth:`add` and then :meth:`whole`.

    Args:
        index: of the sample.
        parser: of tool calls; None if the text is all content.
        parallel: tell more calls than the first.
        echo: text to begin with.
        top_logprobs: likeliest tokens to tell at each position; None for no log probabilities.
        tokens_as_ids: they are named ``token_id:N``.
        token_ids: tell the token ids.
    """

    def __init__(
        self,
        index: int,
        *,
        parser: ToolParser | None = None,
        parallel: bool = True,
        echo: str = "",
        top_logprobs: int | None = None,
        tokens_as_ids: bool = False,
        token_ids: bool = False,
    ) -> None:
        self._index = index
        self._parser = parser
        self._parallel = parallel
        self._echo = echo
        self._top_logprobs = top_logprobs
        self._tokens_as_ids = tokens_as_ids
        self._token_ids = token_ids
        self._pieces: list[Piece] = []
        self._calls = 0  # that have begun
        self._complete = 0
        self._end: dict[str, Any] = {"logprobs": None, "finish_reason": None}

    # Whole ----------------------------------------------------------------------------------------

    def add(self, sample: CompletionOutput) -> None:
        """All of the sample."""
        self._pieces += self._parsed(sample)
        self._end = self._rest(sample)

    def whole(self) -> dict[str, Any]:
        """The choice with its message."""
        found = gather(self._pieces)
        calls = found.calls if self._parallel else found.calls[:1]
        end = self._end
        if calls and end["finish_reason"] == "stop":
            end["finish_reason"] = "tool_calls"
        content = self._echo + found.content
        message: dict[str, Any] = {
            "role": "assistant",
            "content": None if calls and not content else content,
            "refusal": None,
        }
        if calls:
            message["tool_calls"] = [_told(call) for call in calls]
        return {"index": self._index, "message": message, **end}

    # In parts -------------------------------------------------------------------------------------

    def begin(self) -> dict[str, Any]:
        """The first delta, with the role."""
        delta = {"role": "assistant", "content": self._echo}
        return {"index": self._index, "delta": delta, "logprobs": None, "finish_reason": None}

    def deltas(self, sample: CompletionOutput) -> list[dict[str, Any]]:
        """What a further output adds; the last delta has what is known of all its tokens."""
        deltas = list(self._deltas(self._parsed(sample)))
        rest = self._rest(sample)
        if self._complete and rest["finish_reason"] == "stop":
            rest["finish_reason"] = "tool_calls"
        tells = rest["finish_reason"] or rest["logprobs"] or rest.get("token_ids")
        if not deltas and not tells:
            return []
        deltas = deltas or [{}]
        plain = {"logprobs": None, "finish_reason": None}
        return [
            {"index": self._index, "delta": delta, **(rest if n == len(deltas) else plain)}
            for n, delta in enumerate(deltas, 1)
        ]

    def _deltas(self, pieces: Iterable[Piece]) -> Iterable[dict[str, Any]]:
        for piece in pieces:
            if isinstance(piece, CallBegins):
                self._calls += 1
            told = self._parallel or self._calls <= 1
            match piece:
                case Said(text):
                    yield {"content": text}
                case CallBegins(name) if told:
                    yield self._call_delta(
                        id=_call_id(),
                        type="function",
                        function={"name": name, "arguments": ""},
                    )
                case CallGoesOn(arguments) if told:
                    yield self._call_delta(function={"arguments": arguments})
                case CallEnds(complete=True) if told:
                    self._complete += 1
                case CallEnds(complete=False, rest=rest) if rest:
                    yield {"content": rest}

    def _call_delta(self, **fields: Any) -> dict[str, Any]:
        return {"tool_calls": [{"index": self._calls - 1, **fields}]}

    # Both -----------------------------------------------------------------------------------------

    def _parsed(self, sample: CompletionOutput) -> list[Piece]:
        if self._parser is None:
            return [Said(sample.text)] if sample.text else []
        pieces = self._parser.feed(sample.text)
        return pieces + self._parser.finish() if sample.finish_reason else pieces

    def _rest(self, sample: CompletionOutput) -> dict[str, Any]:
        logprobs = None
        if self._top_logprobs is not None and sample.token_ids:
            content = chat_logprobs(
                sample.token_ids,
                sample.logprobs or [],
                self._top_logprobs,
                as_ids=self._tokens_as_ids,
            )
            logprobs = {"content": content, "refusal": None}
        rest: dict[str, Any] = {
            "logprobs": logprobs,
            "finish_reason": finish_reason(sample.finish_reason),
            "stop_reason": stop_reason(sample.finish_reason, sample.stop_reason),
        }
        if self._token_ids:
            rest["token_ids"] = sample.token_ids
        return rest


def _call_id() -> str:
    return f"call_{secrets.token_hex(12)}"


def _told(call: FunctionCall) -> dict[str, Any]:
    return {
        "id": _call_id(),
        "type": "function",
        "function": {"name": call.name, "arguments": call.arguments},
    }
