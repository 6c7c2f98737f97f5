"""What is told of requests: text, log probabilities, stop strings, all or only what is new.

Text is made when somebody looks at it. Only requests with stop strings or log probabilities cost
anything per step.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from typing import Any

from vattn.engine.detokenizer import Detokenizer, TextSource
from vattn.engine.sampled import HostSampled
from vattn.outputs import CompletionOutput, Logprob, RequestOutput, Timings
from vattn.request import FinishReason, Request
from vattn.sampling_params import RequestOutputKind

__all__ = ["Detokenizer", "OutputProcessor"]


class _State:
    """What has been made and told of one request."""

    __slots__ = ("cumulative", "prompt", "read", "summed", "text", "told_end", "told_tokens")

    def __init__(self, text: Detokenizer | None, read: int) -> None:
        self.text = text
        self.read = read  # of request.tokens, by `text`
        self.summed = 0  # entries of request.logprobs that are named, and part of the sum
        self.cumulative = 0.0  # that sum, over the tokens of the output
        self.prompt = 0  # entries of request.prompt_logprobs that are named and told
        self.told_tokens = 0
        self.told_end = False


class OutputProcessor:
    """Makes the outputs of requests. The state of each is kept in its ``output``.

    Args:
        tokenizer: None for token ids only.
    """

    def __init__(self, tokenizer: Any = None) -> None:
        self.tokenizer = tokenizer
        self._source = None if tokenizer is None else TextSource(tokenizer)
        self._watched: set[Request] = set()  # those that need a look in each step

    def add(self, request: Request) -> None:
        """Before its first token.

        Raises:
            ValueError: stop strings without a tokenizer.
        """
        params = request.params
        text = None
        if params.stop_strings and self._source is None:
            raise ValueError(
                f"stop={list(params.stop_strings)!r}: stop strings need a tokenizer; use "
                "stop_token_ids"
            )
        if params.detokenize and self._source is not None:
            text = Detokenizer(self._source, params, request.prompt_ids)
        request.output = _State(text, len(request.prompt_ids))
        if params.logprobs is not None and request.logprobs is None:
            request.logprobs = []
        if params.stop_strings or request.logprobs is not None:
            self._watched.add(request)

    def ended(self, requests: Sequence[Request]) -> None:
        """They get no more tokens. What they have can still be asked for."""
        if self._watched:
            self._watched.difference_update(requests)

    def process(
        self, requests: Sequence[Request], sampled: HostSampled | None = None
    ) -> list[tuple[Request, str | Exception]]:
        """After a step's tokens have been appended.

        Args:
            requests: the rows of the step; some may have finished.
            sampled: of the same rows; for log probabilities.

        Returns:
            The requests whose text a stop string ends now, and which; one of them may have reached
            its length with the same token. Those that the tokenizer cannot turn into text have an
            ``Exception`` in its place.
        """
        stopped: list[tuple[Request, str | Exception]] = []
        if not self._watched:
            return stopped
        for row, request in enumerate(requests):
            if request not in self._watched:
                continue
            if request.logprobs is not None and sampled is not None:
                self._add_logprobs(request, sampled, row)
            state: _State = request.output
            if state.text is None or not request.params.stop_strings:
                continue
            if row + 1 < len(requests) and requests[row + 1] is request:
                continue  # of its rows, as many as it has drafts and one more, the last will do
            try:
                stop = state.text.stop or _read(request, state)
            except Exception as error:
                stopped.append((request, error))
                continue
            if stop is not None and (
                not request.finished or request.finish_reason is FinishReason.LENGTH
            ):
                stopped.append((request, stop))
        return stopped

    def end_of_text(self, request: Request) -> tuple[FinishReason, str] | None:
        """Looks at a token as soon as it was appended, where the next may follow in the same step.

        Returns:
            Why its text ends with it, and the stop string, or what is wrong with it; else None.
        """
        state: _State = request.output
        if state.text is None:
            return None
        try:
            stop = _read(request, state)
        except Exception as error:  # of the tokenizer, which may be anybody's
            return FinishReason.ERROR, f"the tokenizer cannot decode its tokens: {error}"
        return None if stop is None else (FinishReason.STOP, stop)

    def _add_logprobs(self, request: Request, sampled: HostSampled, row: int) -> None:
        """Unless the row's token was not appended, since its request had ended."""
        assert request.logprobs is not None
        if len(request.logprobs) < len(request.tokens) - len(request.prompt_ids):
            at = len(request.prompt_ids) + len(request.logprobs)
            entry = sampled.entry(row, request.tokens[at])
            if entry is not None:
                request.logprobs.append(entry)

    # Outputs --------------------------------------------------------------------------------------

    def completion(
        self, request: Request, kind: RequestOutputKind = RequestOutputKind.CUMULATIVE
    ) -> CompletionOutput:
        """What a request has so far, or what is new since it was last asked for.

        The token of ``stop_token_ids`` or of the end of the sequence that ended it is among its
        tokens, and its text is left out unless ``include_stop_str_in_output``, as in vLLM. Tokens
        of a stop string are kept whole, though the text may end within one.
        """
        state: _State = request.output
        first, start = state.told_tokens, len(request.prompt_ids)
        delta = kind is RequestOutputKind.DELTA
        logprobs = request.logprobs
        if logprobs is not None:
            self._sum(request, state, logprobs)
        state.told_tokens, state.told_end = len(request.tokens) - start, request.finished
        error = request.error
        try:
            text = self._text(request, state, delta)
        except Exception as problem:  # of the tokenizer, which may be anybody's
            text = ""
            error = error or f"the tokenizer cannot decode its tokens: {problem}"
        return CompletionOutput(
            index=request.index,
            text=text,
            token_ids=request.tokens[start + first * delta :],
            logprobs=None if logprobs is None else logprobs[first * delta :],
            finish_reason=None if request.finish_reason is None else request.finish_reason.value,
            stop_reason=request.stop_reason,
            error=error,
            cumulative_logprob=None if logprobs is None else state.cumulative,
            kv=request.kv if request.finished else None,
        )

    def request_output(
        self,
        request_id: str,
        prompt: str | None,
        prompt_token_ids: list[int],
        samples: Sequence[Request],
        kind: RequestOutputKind = RequestOutputKind.CUMULATIVE,
        error: str | None = None,
    ) -> RequestOutput:
        """One prompt's output.

        Args:
            request_id: of the prompt.
            prompt: its text, if it was given as text.
            prompt_token_ids: its tokens.
            samples: its requests, in the order of their indices.
            kind: everything of all samples, or only samples with something new, and only that. With
                FINAL_ONLY it is everything; it is on the caller to ask at the end.
            error: why the prompt never became requests; it is told as finished, then.
        """
        if error is not None:
            reason = FinishReason.ERROR.value
            failed = CompletionOutput(0, "", [], None, reason, None, error)
            return RequestOutput(request_id, prompt, prompt_token_ids, [failed], True, 0, Timings())
        told = samples
        if kind is RequestOutputKind.DELTA:
            told = [request for request in samples if _has_news(request)]
        return RequestOutput(
            request_id=request_id,
            prompt=prompt,
            prompt_token_ids=prompt_token_ids,
            outputs=[self.completion(request, kind) for request in told],
            finished=all(request.finished for request in samples),
            num_cached_tokens=samples[0].cached,
            metrics=samples[0].timings.copy(),
            prompt_logprobs=self._prompt_logprobs(samples[0], kind),
        )

    def _text(self, request: Request, state: _State, delta: bool) -> str:
        """All text of a request that may be seen, or what is new of it."""
        if state.text is None:
            return ""
        if state.text.stop is None:
            _read(request, state)
        if request.finished:
            state.text.finish()
        new = state.text.take()
        return new if delta else state.text.text

    def _sum(self, request: Request, state: _State, logprobs: list[dict[int, Logprob]]) -> None:
        """Adds up the log probabilities that have come, and names their tokens."""
        new = logprobs[state.summed :]
        if not new:
            return
        self._name(request, new)
        first = len(request.prompt_ids) + state.summed
        tokens = request.tokens[first : first + len(new)]
        state.cumulative += sum(
            entry[token].logprob for token, entry in zip(tokens, new, strict=True)
        )
        state.summed += len(new)

    def _prompt_logprobs(
        self, request: Request, kind: RequestOutputKind
    ) -> list[dict[int, Logprob] | None] | None:
        """Those of the prompt that are known; with DELTA those that were not told before."""
        known, state = request.prompt_logprobs, request.output
        if known is None:
            return None
        first, state.prompt = state.prompt, len(known)
        self._name(request, [entry for entry in known[first:] if entry is not None])
        return known[first:] if kind is RequestOutputKind.DELTA else list(known)

    def _name(self, request: Request, entries: Iterable[dict[int, Logprob]]) -> None:
        """Gives the tokens of log probabilities their text."""
        if self._source is None or not request.params.detokenize:
            return
        name = self._source.name
        for entry in entries:
            for token, logprob in entry.items():
                # Of a token without a text: there may be more logits than the tokenizer has tokens.
                with contextlib.suppress(Exception):
                    logprob.decoded_token = name(token)

    def check(self) -> None:
        """Verifies that what was told is no more than there is."""
        for request in self._watched:
            state: _State = request.output
            outputs = len(request.tokens) - len(request.prompt_ids)
            assert state.told_tokens <= outputs, request.id
            assert len(request.prompt_ids) <= state.read <= len(request.tokens), request.id
            assert request.logprobs is None or len(request.logprobs) <= outputs, request.id
            assert state.summed <= len(request.logprobs or ()), request.id
            assert state.prompt <= len(request.prompt_logprobs or ()), request.id
            assert request.params.stop_strings or request.logprobs is not None, request.id
            if state.text is not None:
                state.text.check()


def _read(request: Request, state: _State) -> str | None:
    """Turns tokens that have come into text; the stop string that ended it, if one did."""
    assert state.text is not None
    tokens, first = request.tokens, state.read
    state.read = end = len(tokens)
    if (
        first < end
        and request.finish_reason is FinishReason.STOP
        and not request.params.include_stop_str_in_output
        and (request.grammar is None or tokens[-1] in request.stop_ids)
    ):
        # By a stop token, for a stop string would have been seen, and a structured output that is
        # complete by itself was excepted.
        end -= 1
    return state.text.append(tokens[first:end])[1] if first < end else None


def _has_news(request: Request) -> bool:
    """Whether there is something that has not been told."""
    state: _State = request.output
    outputs = len(request.tokens) - len(request.prompt_ids)
    return outputs > state.told_tokens or request.finished > state.told_end
