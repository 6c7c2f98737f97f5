"""Requests served by an engine: all at once, or so many at a time; what each of them waited for."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

import numpy as np

from bench.common import Json
from bench.model_args import quantiles
from bench.offline_sides import Work, make_work
from vattn import LLM, SamplingParams
from vattn.engine.engine import Engine
from vattn.outputs import Timings
from vattn.request import Request


@dataclass
class Served:
    """What was generated, in how long, and the moments of the requests that were served whole."""

    concurrency: int
    seconds: float = 0.0
    prompt_tokens: int = 0  # of the requests that were begun
    generated_tokens: int = 0
    begun: int = 0
    timings: list[tuple[Timings, int]] = field(default_factory=list)  # and new tokens

    def as_json(self) -> Json:
        """Rates per second; times in ms; see :func:`bench.model_args.quantiles`."""
        ttft = [t.first_token_s - t.arrival_s for t, _ in self.timings]
        tpot = [(t.last_token_s - t.first_token_s) / (n - 1) for t, n in self.timings if n > 1]
        return {
            "concurrency": self.concurrency,
            "requests_begun": self.begun,
            "requests_ended": len(self.timings),
            "seconds": self.seconds,
            "generated_tokens": self.generated_tokens,
            "prompt_tokens": self.prompt_tokens,
            "tokens_per_s": self.generated_tokens / self.seconds,
            "total_tokens_per_s": (self.generated_tokens + self.prompt_tokens) / self.seconds,
            "ttft_ms": quantiles(ttft, 1e-3),
            "tpot_ms": quantiles(tpot, 1e-3),
        }


def uniform_work(requests: int, lengths: Sequence[int], vocabulary: int, seed: int) -> Work:
    """Prompts and answers whose lengths are drawn evenly from the first to the second length."""
    random = np.random.default_rng(seed)
    low, high = lengths
    prompts, answers = random.integers(low, high + 1, (2, requests)).tolist()
    return make_work(prompts, answers, vocabulary, seed)


def greedy(new_tokens: int) -> SamplingParams:
    """Exactly so many tokens, the likeliest."""
    return SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True)


def serve_all(llm: LLM, work: Work) -> Served:
    """All requests given to :meth:`vattn.LLM.generate` at once; their wait for a place counts.

    Raises:
        AssertionError: a request failed.
    """
    start = time.perf_counter()
    outputs = llm.generate(
        [{"prompt_token_ids": ids} for ids in work.prompts],
        [greedy(n) for n in work.new_tokens],
        use_tqdm=False,
    )
    served = Served(len(work), time.perf_counter() - start, begun=len(work))
    for output, ids, new in zip(outputs, work.prompts, work.new_tokens, strict=True):
        answer = output.outputs[0]
        assert answer.error is None, answer.error
        assert len(answer.token_ids) == new, f"{len(answer.token_ids)} tokens instead of {new}"
        served.timings.append((output.metrics, new))
        served.prompt_tokens += len(ids)
        served.generated_tokens += new
    return served


def serve_closed(engine: Engine, work: Work, concurrency: int, limit_s: float | None) -> Served:
    """So many requests at a time: who ends is replaced by the next, until none is left.

    Args:
        engine: that nobody else uses meanwhile.
        work: in order.
        concurrency: requests at a time.
        limit_s: seconds after which what runs is aborted; its tokens count, its moments do not.

    Raises:
        AssertionError: a request failed, or the engine has no place for so many.
    """
    assert concurrency <= engine.config.max_num_seqs, f"no place for {concurrency} sequences"
    served = Served(concurrency)
    coming = list(zip(work.prompts, work.new_tokens, strict=True))[::-1]
    running: set[Request] = set()
    start = time.perf_counter()

    def begin() -> None:
        prompt, new = coming.pop()
        (request,) = engine.make_requests(f"{concurrency}/{served.begun}", prompt, greedy(new))
        engine.add(request)
        running.add(request)
        served.begun += 1
        served.prompt_tokens += len(prompt)

    while running or coming:
        if limit_s is not None and time.perf_counter() - start > limit_s:
            break
        while coming and len(running) < concurrency:
            begin()
        for request in engine.step():
            if request.finished:
                running.remove(request)
                _count(served, request)
    served.seconds = time.perf_counter() - start
    served.generated_tokens += sum(len(request.output_ids) for request in running)
    _abort(engine, list(running))
    return served


def _count(served: Served, request: Request) -> None:
    assert request.error is None, request.error
    new = len(request.output_ids)
    served.generated_tokens += new
    served.timings.append((request.timings, new))


def _abort(engine: Engine, requests: Sequence[Request]) -> None:
    engine.abort([request.id for request in requests])
    while engine.has_unfinished:
        engine.step()


def how_it_ran(engine: Engine) -> Json:
    """What an engine has decided for itself."""
    return {
        "attention": engine.runner._backend.name,
        "graphs": asdict(engine.runner.graph_stats),
        "asynchronous": engine.is_async,
        "preemptions": engine.stats().num_preemptions,
    }
