"""The choices of a chat completion: messages, or deltas of them, made of the engine's outputs."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Sequence
from typing import Any

from vattn.outputs import CompletionOutput
from vattn.server.openai.logprobs import ChatLogprobs
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
        logprobs: tells the log probabilities; None for none.
        token_ids: tell the token ids.
    """

    def __init__(
        self,
        index: int,
        *,
        parser: ToolParser | None = None,
        parallel: bool = True,
        echo: str = "",
        logprobs: ChatLogprobs | None = None,
        token_ids: bool = False,
    ) -> None:
        self._index = index
        self._parser = parser
        self._parallel = parallel
        self._echo = echo
        self._logprobs = logprobs
        self._token_ids = token_ids
        self.finish_reason: str | None = None  # as it was told
        self._pieces: list[Piece] = []
        self._calls = 0  # that have begun
        self._complete = 0
        self._is_cut = False  # a call was told, and the end of the text is within it
        self._held: list[CompletionOutput] = []  # no text came of these yet
        self._end = self._rest([])

    # Whole ----------------------------------------------------------------------------------------

    def add(self, sample: CompletionOutput) -> None:
        """All of the sample."""
        self._pieces += self._parsed(sample)
        self._end = self._rest([sample])

    def whole(self) -> dict[str, Any]:
        """The choice with its message."""
        found = gather(self._pieces)
        calls = found.calls if self._parallel else found.calls[:1]
        end = self._end
        if calls and not calls[-1].is_cut and end["finish_reason"] == "stop":
            end["finish_reason"] = "tool_calls"
        self.finish_reason = end["finish_reason"]
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
        return self.part({"role": "assistant", "content": self._echo})

    def part(self, delta: dict[str, Any]) -> dict[str, Any]:
        """A delta that is not the last one of an output."""
        return {"index": self._index, "delta": delta, **self._rest([])}

    def deltas(self, sample: CompletionOutput) -> list[dict[str, Any]]:
        """What a further output adds, maybe nothing yet.

        The last delta has what is known of all tokens since the delta before.
        """
        deltas = list(self._deltas(self._parsed(sample)))
        self._held.append(sample)
        if not deltas and not sample.finish_reason:
            return []
        rest = self._rest(self._held)
        self._held = []
        if self._complete and not self._is_cut and rest["finish_reason"] == "stop":
            rest["finish_reason"] = "tool_calls"
        self.finish_reason = rest["finish_reason"]
        *before, last = deltas or [{}]
        return [*map(self.part, before), {"index": self._index, "delta": last, **rest}]

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
                case CallEnds(is_cut=True):
                    self._is_cut |= told
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

    def _rest(self, samples: Sequence[CompletionOutput]) -> dict[str, Any]:
        """What is told of outputs beside their text."""
        content: list[dict[str, Any]] = []
        if self._logprobs is not None:
            for sample in samples:
                content += self._logprobs.of(sample.token_ids, sample.logprobs or [])
        ended = samples[-1] if samples else None
        reason = ended.finish_reason if ended else None
        rest: dict[str, Any] = {
            "logprobs": {"content": content, "refusal": None} if content else None,
            "finish_reason": finish_reason(reason),
            "stop_reason": stop_reason(reason, ended.stop_reason if ended else None),
        }
        if self._token_ids:
            rest["token_ids"] = [token for sample in samples for token in sample.token_ids]
        return rest


def _call_id() -> str:
    return f"call_{secrets.token_hex(12)}"


def _told(call: FunctionCall) -> dict[str, Any]:
    return {
        "id": _call_id(),
        "type": "function",
        "function": {"name": call.name, "arguments": call.arguments},
    }
