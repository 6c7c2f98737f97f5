"""What the owner has been told of a sample, and what is new."""

from __future__ import annotations

from collections.abc import Mapping

from vattn.engine_process.messages import End, Progress
from vattn.outputs import Logprob
from vattn.request import Request


class Told:
    """How much of one sample the owner knows.

    Args:
        handle: the owner's, of the prompt.
        request: the sample; it has no output yet.
    """

    __slots__ = ("handle", "logprobs", "prompt", "tokens")

    def __init__(self, handle: int, request: Request) -> None:
        self.handle = handle
        self.tokens = len(request.tokens)
        self.logprobs = self.prompt = 0  # entries told

    def progress(self, request: Request) -> Progress:
        """What is new of it, which counts as told from now."""
        tokens = request.tokens[self.tokens :]
        self.tokens += len(tokens)
        logprobs = prompt_logprobs = None
        if request.logprobs is not None:
            logprobs = [_plain(each) for each in request.logprobs[self.logprobs :]]
            self.logprobs += len(logprobs)
        if request.prompt_logprobs is not None and self.prompt < len(request.prompt_logprobs):
            prompt_logprobs = [
                None if each is None else _plain(each)
                for each in request.prompt_logprobs[self.prompt :]
            ]
            self.prompt += len(prompt_logprobs)
        end = _end(request) if request.finished else None
        return Progress(
            self.handle, request.index, tokens, request.cached, logprobs, prompt_logprobs, end
        )


def _plain(logprobs: Mapping[int, Logprob]) -> dict[int, tuple[float, int]]:
    return {token: (each.logprob, each.rank) for token, each in logprobs.items()}


def _end(request: Request) -> End:
    assert request.finish_reason is not None, request
    return End(
        request.finish_reason.value,
        request.stop_reason,
        request.error,
        request.timings,
        request.kv,
        request.preemptions,
    )
