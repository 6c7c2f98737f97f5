"""Engines that take turns of a few steps, so that a machine whose speed drifts slows all alike.

Requests and schedulers are the same, so the steps of two engines compute the same tokens, and the
time of a turn may be compared with that of its neighbour. On a GPU a turn ends with a
synchronization: what an engine has launched is not left to the next one's time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from bench.common import Json, summarize_pairs
from bench.levels.repeat import Repeated, repeated
from bench.offline_sides import Work
from bench.served import greedy
from bench.waits import Watch
from vattn import LLM
from vattn.request import Request


@dataclass
class Contender:
    """One engine and the requests that it serves now."""

    name: str
    llm: LLM
    seconds: float = 0.0  # of all turns since :meth:`begin`
    _requests: list[Request] = field(default_factory=list)
    _round: int = 0

    def begin(self, work: Work) -> None:
        """Queues all requests."""
        engine = self.llm.engine
        self._requests, self.seconds = [], 0.0
        for i, (prompt, new) in enumerate(zip(work.prompts, work.new_tokens, strict=True)):
            (request,) = engine.make_requests(f"{self._round}/{i}", prompt, greedy(new))
            engine.add(request)
            self._requests.append(request)
        self._round += 1

    @property
    def done(self) -> bool:
        """Whether every request has ended."""
        return all(request.finished for request in self._requests)

    @property
    def decoding(self) -> bool:
        """Whether every request has a token, and none has ended."""
        return all(r.output_ids and not r.finished for r in self._requests)

    def turn(self, steps: int) -> float:
        """Some steps, or fewer if all requests end before; the seconds that they took."""
        device = self.llm.engine.loaded.device
        _synchronize(device)
        start = time.perf_counter()
        for _ in range(steps):
            if self.done:
                break
            self.llm.engine.step()
        _synchronize(device)
        spent = time.perf_counter() - start
        self.seconds += spent
        return spent

    def fill(self) -> None:
        """Steps until every prompt is computed.

        Raises:
            AssertionError: a request has ended before; it needs more new tokens, or has failed.
        """
        while not self.decoding:
            self._check()
            assert not any(r.finished for r in self._requests), "a request ended while others fill"
            self.turn(1)

    def texts(self) -> list[list[int]]:
        """The generated tokens, after steps until all requests have ended.

        Raises:
            AssertionError: a request failed.
        """
        while self.llm.engine.has_unfinished:
            self.llm.engine.step()
        self._check()
        return [request.output_ids for request in self._requests]

    def _check(self) -> None:
        failed = [request.error for request in self._requests if request.error]
        assert not failed, f"{self.name} failed {len(failed)} requests: {failed[0]}"


@dataclass(frozen=True)
class Rounds:
    """Whole rounds of work that several engines have done, by their names."""

    seconds: dict[str, list[float]]
    equal: int
    compared: int

    def ratio(self, base: str, candidate: str) -> Repeated:
        """Each round is a repeat: its turns have alternated."""
        pairs = zip(self.seconds[base], self.seconds[candidate], strict=True)
        return repeated([summarize_pairs([b], [c]) for b, c in pairs])


@dataclass(frozen=True)
class Decoded:
    """Decode turns of several engines over the same sequences, by their names."""

    seconds: dict[str, list[list[float]]]  # by repeat
    steps: int  # of a turn
    equal: int
    compared: int

    def ratio(self, base: str, candidate: str) -> Repeated:
        """Of neighbouring turns; a repeat has prompts of its own."""
        repeats = zip(self.seconds[base], self.seconds[candidate], strict=True)
        return repeated([summarize_pairs(b, c) for b, c in repeats])


def take_turns(contenders: Sequence[Contender], steps: int, turn: int) -> list[float]:
    """One turn of each, the first one changing with the number of the turn."""
    shift = turn % len(contenders)
    spent = {c.name: c.turn(steps) for c in [*contenders[shift:], *contenders[:shift]]}
    return [spent[c.name] for c in contenders]


def serve_rounds(
    contenders: Sequence[Contender],
    works: Sequence[Work],
    steps: int,
    look: Callable[[Contender], None] | None = None,
) -> Rounds:
    """Whole rounds, of which the first is for warming up.

    Args:
        contenders: take turns.
        works: of each round, with prompts of its own, so that nobody finds those of another.
        steps: of a turn.
        look: is called with each of them between turns.

    Raises:
        AssertionError: a request failed.
    """
    seconds: dict[str, list[float]] = {c.name: [] for c in contenders}
    equal = compared = 0
    for i, work in enumerate(works):
        for c in contenders:
            c.begin(work)
        turn = i
        while not all(c.done for c in contenders):
            take_turns(contenders, steps, turn)
            turn += 1
            if look is not None:
                for c in contenders:
                    look(c)
        if i:
            for c in contenders:
                seconds[c.name].append(c.seconds)
        same = equal_texts([c.texts() for c in contenders])
        equal, compared = equal + same, compared + len(work)
    return Rounds(seconds, equal, compared)


def decode_turns(
    contenders: Sequence[Contender], works: Sequence[Work], *, turns: int, warmup: int, steps: int
) -> Decoded:
    """Turns of decode steps, once all prompts are computed.

    Args:
        contenders: take turns.
        works: one for each repeat, whose requests all run at once; each has to have more new tokens
            than :func:`tokens_for` says.
        turns: that are timed, in each repeat.
        warmup: turns before them.
        steps: of a turn.

    Raises:
        AssertionError: a request failed, or has ended before the last turn.
    """
    seconds: dict[str, list[list[float]]] = {c.name: [] for c in contenders}
    equal = compared = 0
    for work in works:
        for c in contenders:
            c.begin(work)
            c.fill()
        spent = [take_turns(contenders, steps, turn) for turn in range(warmup + turns)][warmup:]
        assert all(c.decoding for c in contenders), "requests ended before the last turn"
        for c, of_turns in zip(contenders, zip(*spent, strict=True), strict=True):
            seconds[c.name].append(list(of_turns))
        same = equal_texts([c.texts() for c in contenders])
        equal, compared = equal + same, compared + len(work)
    return Decoded(seconds, steps, equal, compared)


def tokens_for(fill: int, turns: int, warmup: int, steps: int) -> int:
    """New tokens with which no request ends before the last of the decode turns.

    Args:
        fill: steps that all prompts may take: the first to be computed decodes meanwhile.
        turns: timed.
        warmup: turns before them.
        steps: of a turn.
    """
    return fill + (warmup + turns) * steps + 4


def equal_texts(sides: Sequence[Sequence[Sequence[int]]]) -> int:
    """How many requests have the same tokens on all sides."""
    return sum(all(list(t) == list(texts[0]) for t in texts) for texts in zip(*sides, strict=True))


def attention_share(contender: Contender, work: Work, steps: int) -> float | None:
    """Share of decode steps that is spent in the attention backend; None on a GPU.

    There the backend returns before its kernels have run.
    """
    if contender.llm.engine.loaded.device.type != "cpu":
        return None
    contender.begin(work)
    contender.fill()
    watch = Watch()
    backend: Any = contender.llm.engine.runner._backend
    watch.add(backend, "forward")
    try:
        spent = contender.turn(steps)
    finally:
        del backend.forward  # the method beneath shows again
    contender.texts()
    return watch.outer_s / spent


def throughput(seconds: float, work: Work) -> Json:
    """A round in the names of ``vllm bench serve``, and requests per minute."""
    inputs = sum(len(prompt) for prompt in work.prompts)
    return {
        "duration": seconds,
        "completed": len(work),
        "total_input_tokens": inputs,
        "total_output_tokens": work.generated,
        "request_throughput": len(work) / seconds,
        "output_throughput": work.generated / seconds,
        "total_token_throughput": (inputs + work.generated) / seconds,
        "requests_per_minute": 60 * len(work) / seconds,
    }


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
