"""Plain greedy sampling against penalties, biases and log probabilities for every sequence.

A section of `bench.decoding`. Two engines of one tiny Llama with random weights take turns: whole
steps that decode one token of all sequences, prompts computed before. Beside that the sampler
alone: from logits on the device to tokens and log probabilities on the host, part by part.
"""

from __future__ import annotations

import copy
import gc
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch

import vattn
from bench.common import Json, Pairs, Target, measure_pairs, print_table
from bench.offline_sides import make_llama, make_work
from vattn.engine.engine import Engine
from vattn.engine.sampler import Sampler
from vattn.request import Request
from vattn.sampling_params import SamplingParams

LIMIT = 1.3  # times plain greedy
WARMUP = 3

# What each part of the table asks for; logit_bias stands for so many tokens.
BIASED_TOKENS = 20
PARTS: dict[str, dict[str, Any]] = {
    "presence and frequency": {"presence_penalty": 0.4, "frequency_penalty": 0.3},
    "repetition": {"repetition_penalty": 1.2},
    f"bias of {BIASED_TOKENS} tokens": {"logit_bias": BIASED_TOKENS},
    "5 log probabilities": {"logprobs": 5},
}
EVERYTHING = {name: value for part in PARTS.values() for name, value in part.items()}


@dataclass(frozen=True)
class Settings:
    """How large it is."""

    sequences: int = 256
    vocabulary: int = 32_000
    prompt_tokens: int = 32
    pairs: int = 40
    layers: int = 2
    width: int = 256


SMALL = Settings(sequences=4, vocabulary=256, prompt_tokens=8, pairs=3, width=64)


def make_params(asked: dict[str, Any], number: int, settings: Settings, new: int) -> SamplingParams:
    """Greedy, with what is asked for; each request has biases of its own."""
    options = dict(asked)
    if "logit_bias" in options:
        random = np.random.default_rng(number)
        tokens = random.choice(settings.vocabulary, options["logit_bias"], replace=False)
        options["logit_bias"] = dict(
            zip(tokens.tolist(), random.uniform(-2, 2, len(tokens)).tolist(), strict=True)
        )
    return SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, **options)


# Whole steps --------------------------------------------------------------------------------------


class Decoding:
    """An engine with all sequences past their prompts; :meth:`step` decodes a token of each."""

    def __init__(self, model: Any, settings: Settings, asked: dict[str, Any]) -> None:
        work = make_work(
            [settings.prompt_tokens] * settings.sequences, [], settings.vocabulary, seed=1
        )
        self.sequences = settings.sequences
        new = settings.pairs + 2 * WARMUP
        self.llm = vattn.LLM(
            model=copy.deepcopy(model),
            dtype="float32",
            skip_tokenizer_init=True,
            max_model_len=settings.prompt_tokens + new,
            max_num_seqs=settings.sequences,
            max_num_batched_tokens=settings.sequences * settings.prompt_tokens,
        )
        self.engine: Engine = self.llm.engine
        self.requests: list[Request] = []
        for number, ids in enumerate(work.prompts):
            params = make_params(asked, number, settings, new)
            self.requests += self.engine.make_requests(str(number), ids, params)
        for request in self.requests:
            self.engine.add(request)
        self.engine.step()
        assert all(len(request.output_ids) == 1 for request in self.requests)

    def step(self) -> None:
        """Raises AssertionError if a sequence got no token."""
        news = self.engine.step()
        assert len(news) == self.sequences, f"{len(news)} of {self.sequences} sequences decoded"

    def close(self) -> None:
        """Raises AssertionError if a request failed."""
        errors = [request.error for request in self.requests if request.error]
        assert not errors, errors[0]
        self.llm.close()


def measure_steps(settings: Settings) -> Pairs:
    """Steps of both engines in turns."""
    tokens = settings.prompt_tokens + settings.pairs + 2 * WARMUP
    heads = max(1, settings.width // 64)
    model = make_llama(
        settings.layers, settings.width, settings.width // heads, settings.vocabulary, tokens
    )
    plain = Decoding(model, settings, {})
    changed = Decoding(model, settings, EVERYTHING)
    gc.collect()
    pairs = measure_pairs(plain.step, changed.step, pairs=settings.pairs, warmup=WARMUP)
    assert all(len(request.logprobs or ()) > settings.pairs for request in changed.requests)
    plain.close()
    changed.close()
    return pairs


# The sampler alone --------------------------------------------------------------------------------


class Sampling:
    """A sampler and its rows; each call samples once and appends the tokens."""

    def __init__(self, settings: Settings, asked: dict[str, Any], logits: torch.Tensor) -> None:
        work = make_work(
            [settings.prompt_tokens] * settings.sequences, [], settings.vocabulary, seed=1
        )
        self.sampler = Sampler(settings.vocabulary, "cpu")
        self.requests = [
            Request(str(number), ids, make_params(asked, number, settings, 10**6), 10**7)
            for number, ids in enumerate(work.prompts)
        ]
        self.given = logits
        self.logits = logits.clone()
        self.chosen: list[int] = []

    def prepare(self) -> None:
        """What a step does before and after: new logits, and the last tokens are known."""
        self.logits.copy_(self.given)
        for request, token in zip(self.requests, self.chosen, strict=False):
            request.tokens.append(token)

    def sample(self) -> None:
        sampled = self.sampler.sample(self.logits, self.requests).to_host()
        self.chosen = sampled.token_ids
        if self.requests[0].params.logprobs is not None:
            for row, token in enumerate(self.chosen):
                sampled.entry(row, token)


def _sampling_clock(function: Callable[[], object]) -> float:
    """Seconds of :meth:`Sampling.sample`, given as a bound method, without its preparation."""
    owner: Sampling = function.__self__  # type: ignore[attr-defined]
    owner.prepare()
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def measure_parts(settings: Settings) -> dict[str, Pairs]:
    """The sampler with one thing asked for, and with everything, against plain greedy."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(settings.sequences, settings.vocabulary, generator=generator)
    found = {}
    for name, asked in (PARTS | {"everything": EVERYTHING}).items():
        plain = Sampling(settings, {}, logits)
        changed = Sampling(settings, asked, logits)
        found[name] = measure_pairs(
            plain.sample, changed.sample, pairs=settings.pairs, clock=_sampling_clock
        )
    return found


# The section --------------------------------------------------------------------------------------


def run(small: bool) -> Json:
    """All measurements; ``small`` for CI."""
    settings = SMALL if small else Settings()
    with torch.inference_mode():
        steps = measure_steps(settings)
        parts = measure_parts(replace(settings, pairs=max(3, settings.pairs // 2)))
    return {
        "settings": asdict(settings),
        "asked": EVERYTHING,
        "steps": asdict(steps),
        "sampler": {name: asdict(pairs) for name, pairs in parts.items()},
    }


def _times_plain(pairs: Json) -> float:
    """How many times as long as plain greedy, of a dictionary of :class:`Pairs`."""
    return float(1 / pairs["ratio"])


def print_results(found: Json) -> None:
    named = {"engine step, everything": found["steps"]} | {
        f"sampler alone, {name}": pairs for name, pairs in found["sampler"].items()
    }
    print_table(
        f"{found['settings']['sequences']} sequences, vocabulary "
        f"{found['settings']['vocabulary']}: against plain greedy",
        ["what", "plain us", "with it us", "times plain", "quartiles"],
        [
            [
                name,
                pairs["base_us"],
                pairs["candidate_us"],
                _times_plain(pairs),
                f"{1 / pairs['ratio_high']:.2f}-{1 / pairs['ratio_low']:.2f}",
            ]
            for name, pairs in named.items()
        ],
    )


def make_targets(found: Json) -> list[Target]:
    alone = _times_plain(found["sampler"]["everything"])
    return [
        Target(
            "penalties, biases and log probabilities for all sequences, engine steps",
            _times_plain(found["steps"]),
            LIMIT,
            "x",
            at_least=False,
            note=f"the sampler alone takes {alone:.1f}x",
        )
    ]
