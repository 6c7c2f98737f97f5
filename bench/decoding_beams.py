"""Beam search: the memory that beams take, what a step copies, and time against transformers.

A section of `bench.decoding`. A tiny Llama with random weights continues a long prompt with beams
of `vattn.LLM.beam_search` and of `generate(num_beams=...)`, taking turns, on new prompts each time.
Pages and copied bytes are counted after every step:

one       what one sequence of that length has
tails     pages of a sequence that the prompt does not fill: each beam has its own
received  copied into the beams' slots in one step, per beam and run, in pages
staged    copied besides: slots that a reorder both reads and overwrites
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch

import vattn
from bench.common import Json, Target, print_table, summarize_pairs
from bench.offline_sides import PAD, make_llama, make_work
from vattn.engine.engine import Engine
from vattn.sampling_params import BeamSearchParams

MEMORY_LIMIT = 1.15  # times one sequence, beside the tails


@dataclass(frozen=True)
class Settings:
    """How large it is."""

    width: int = 8
    prompt_tokens: int = 2048
    new_tokens: int = 64
    rounds: int = 5
    layers: int = 2
    hidden: int = 256
    vocabulary: int = 4096


SMALL = Settings(width=3, prompt_tokens=100, new_tokens=8, rounds=1, hidden=64, vocabulary=256)


class Steps:
    """What the cache held and copied, after each step of one search."""

    def __init__(self, engine: Engine, settings: Settings) -> None:
        self.engine = engine
        self.settings = settings
        self.runs = sum(region.runs for region in engine.cache.layout.regions)
        self.physical: list[float] = []  # times one sequence
        self.beside_tails: list[float] = []
        self.received: list[float] = []
        self.staged: list[float] = []
        self._copied = engine.cache.stats().copied_bytes
        self._received = 0

    def pages(self, tokens: int, *, full: bool = False) -> int:
        """Pages of a sequence, or those of them that its tokens fill."""
        page, found = self.engine.cache.pool.page_bytes, 0
        for region in self.engine.cache.layout.regions:
            held = tokens * region.token_bytes
            found += region.runs * (held // page if full else -(-held // page))
        return found

    def look(self) -> None:
        """After a step: of all beams at once, so that it is one moment."""
        cache, width = self.engine.cache, self.settings.width
        beams = [slot for slot in range(cache.max_seqs) if cache.is_open(slot)]
        beams = [slot for slot in beams if slot != self.engine.memory.scratch_slot]
        if len(beams) < width:
            return  # the prompt, or the end
        stats, page = cache.stats(), cache.pool.page_bytes
        tokens = cache.tokens(beams[0])
        one = self.pages(tokens)
        tails = one - self.pages(self.settings.prompt_tokens, full=True)
        physical = stats.live_bytes // page
        self.physical.append(physical / one)
        self.beside_tails.append((physical - (width - 1) * tails) / one)
        received = sum(usage.copied_bytes for usage in cache.usage_many(beams))
        self._add(self.received, received - self._received)
        self._add(self.staged, stats.copied_bytes - self._copied - (received - self._received))
        self._copied, self._received = stats.copied_bytes, received

    def _add(self, counts: list[float], copied_bytes: int) -> None:
        """Per beam and run, in pages."""
        shares = self.settings.width * self.runs * self.engine.cache.pool.page_bytes
        counts.append(copied_bytes / shares)

    def as_json(self) -> Json:
        return {
            "steps": len(self.physical),
            "pages_of_one": self.pages(self.settings.prompt_tokens + self.settings.new_tokens),
            "runs": self.runs,
            "physical_most": max(self.physical),
            "beside_tails_most": max(self.beside_tails),
            "received_most": max(self.received),
            "received_mean": statistics.mean(self.received),
            "staged_most": max(self.staged),
            "staged_mean": statistics.mean(self.staged),
        }


@contextmanager
def after_each_step(engine: Engine, look: Callable[[], None]) -> Iterator[None]:
    """Calls ``look`` after the steps of an engine that somebody else drives."""
    step = engine.step

    def watched() -> Any:
        news = step()
        look()
        return news

    engine.step = watched  # type: ignore[method-assign]
    try:
        yield
    finally:
        engine.step = step  # type: ignore[method-assign]


def search(llm: vattn.LLM, ids: list[int], settings: Settings) -> list[list[int]]:
    """The sequences that vattn finds, best first.

    Raises:
        RuntimeError: it failed.
    """
    params = BeamSearchParams(
        beam_width=settings.width, max_tokens=settings.new_tokens, ignore_eos=True
    )
    (found,) = llm.beam_search([{"prompt_token_ids": ids}], params)
    if found.error is not None:
        raise RuntimeError(f"beam search failed: {found.error}")
    return [sequence.token_ids for sequence in found.sequences]


def generate(model: Any, ids: list[int], settings: Settings) -> list[list[int]]:
    """Those that transformers finds."""
    texts = model.generate(
        torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.int64),
        max_new_tokens=settings.new_tokens,
        num_beams=settings.width,
        num_return_sequences=settings.width,
        do_sample=False,
        pad_token_id=PAD,
    )
    return [row[len(ids) :].tolist() for row in texts]


def run(small: bool) -> Json:
    """All measurements; ``small`` for CI."""
    settings = SMALL if small else Settings()
    longest = settings.prompt_tokens + settings.new_tokens
    heads = max(1, settings.hidden // 64)
    model: Any = make_llama(
        settings.layers, settings.hidden, settings.hidden // heads, settings.vocabulary, longest
    )
    lengths = [settings.prompt_tokens] * (settings.rounds + 1)
    prompts = make_work(lengths, [], settings.vocabulary, seed=2).prompts
    llm = vattn.LLM(
        model=copy.deepcopy(model),
        dtype="float32",
        skip_tokenizer_init=True,
        max_model_len=longest,
        max_num_seqs=settings.width,
        enable_prefix_caching=False,
    )
    steps = Steps(llm.engine, settings)
    with after_each_step(llm.engine, steps.look), torch.inference_mode():
        counted = search(llm, prompts[0], settings)
        equal = [counted == generate(model, prompts[0], settings)]
    sides: dict[str, Callable[[list[int]], list[list[int]]]] = {
        "transformers": lambda ids: generate(model, ids, settings),
        "vattn": lambda ids: search(llm, ids, settings),
    }
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for round_, ids in enumerate(prompts[1:]):
        found = {}
        for name in sorted(sides, reverse=bool(round_ % 2)):
            start = time.perf_counter()
            with torch.inference_mode():
                found[name] = sides[name](ids)
            seconds[name].append(time.perf_counter() - start)
        equal.append(found["vattn"] == found["transformers"])
    llm.close()
    return {
        "settings": asdict(settings),
        "counts": steps.as_json(),
        "equal": sum(equal),
        "compared": len(equal),
        "tokens_per_s": {
            name: settings.new_tokens / statistics.median(spent) for name, spent in seconds.items()
        },
        "speed": asdict(summarize_pairs(seconds["transformers"], seconds["vattn"])),
    }


def print_results(found: Json) -> None:
    settings, counts = found["settings"], found["counts"]
    print_table(
        f"beam search, width {settings['width']}, prompt of {settings['prompt_tokens']} tokens",
        ["what", "most", "mean"],
        [
            ["physical / one sequence", counts["physical_most"], None],
            ["the same without the tails of the others", counts["beside_tails_most"], None],
            [
                "received per step, beam and run, pages",
                counts["received_most"],
                counts["received_mean"],
            ],
            ["staged besides, pages", counts["staged_most"], counts["staged_mean"]],
        ],
    )
    speed = found["speed"]
    print_table(
        f"new tokens per second of each beam; equal: {found['equal']} of {found['compared']}",
        ["side", "tokens/s", "vattn is x", "quartiles"],
        [
            ["vattn", found["tokens_per_s"]["vattn"], None, None],
            [
                "generate",
                found["tokens_per_s"]["transformers"],
                speed["ratio"],
                f"{speed['ratio_low']:.2f}-{speed['ratio_high']:.2f}",
            ],
        ],
    )


def make_targets(found: Json) -> list[Target]:
    counts = found["counts"]
    return [
        Target(
            "memory of beams beside the tails of all but one, of one sequence",
            counts["beside_tails_most"],
            MEMORY_LIMIT,
            "x",
            at_least=False,
            note=f"{counts['physical_most']:.2f}x with them",
        ),
        Target(
            "copied per step, beam and run",
            counts["received_most"] + counts["staged_most"],
            1,
            "pages",
            at_least=False,
            note=f"{counts['staged_most']:.2f} of it staged; on average "
            f"{counts['received_mean'] + counts['staged_mean']:.2f}",
        ),
        Target(
            "searches that find what generate finds",
            found["equal"] / found["compared"],
            1,
            "",
            at_least=True,
        ),
    ]
