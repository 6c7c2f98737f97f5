"""What a JSON schema costs: the same number of tokens with one and without, in turns.

A section of `bench.decoding`. The packaged tiny model continues prompts at temperature 1, all at
once; every other run has to write an array of objects that is longer than the run. Beside that what
the schema adds to a step, in the thread that runs the engine, and what is done beside the model:

begin    new tokens go into the matchers, and the thread that makes masks is told
masks    made by that thread, while the model runs
wait     for masks that were not ready when the model was
apply    of the masks to the logits
ended    looking for outputs that are complete
compile  once for each schema, and for each further request that has it
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import vattn
from bench.common import Json, Pairs, Target, measure_pairs, print_table
from vattn.engine import engine as engine_module
from vattn.models import tiny_path
from vattn.sampling_params import SamplingParams, StructuredOutputsParams

LIMIT = 0.10  # of throughput
SCHEMA: dict[str, Any] = {
    "type": "array",
    "minItems": 500,
    "items": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 24},
            "price": {"type": "integer", "minimum": 0, "maximum": 99999},
            "tags": {"type": "array", "items": {"enum": ["new", "sale", "old"]}, "maxItems": 3},
            "active": {"type": "boolean"},
        },
        "required": ["name", "price", "tags", "active"],
        "additionalProperties": False,
    },
}
PROMPT = "The list of things that the shop has, number {}:"


@dataclass(frozen=True)
class Settings:
    """How large it is."""

    sequences: int = 32
    new_tokens: int = 128
    pairs: int = 9


SMALL = Settings(sequences=4, new_tokens=12, pairs=2)


class Runs:
    """One engine, and runs of it with and without the schema."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.llm = vattn.LLM(
            tiny_path(), dtype="float32", device="cpu", max_num_seqs=settings.sequences
        )
        self.prompts = [PROMPT.format(number) for number in range(settings.sequences)]

    def plain(self) -> None:
        self._run(None)

    def structured(self) -> None:
        self._run(StructuredOutputsParams(json=SCHEMA, disable_any_whitespace=True))

    def _run(self, asked: StructuredOutputsParams | None) -> None:
        new = self.settings.new_tokens
        params = [
            SamplingParams(
                seed=seed, max_tokens=new, ignore_eos=asked is None, structured_outputs=asked
            )
            for seed in range(self.settings.sequences)
        ]
        for output in self.llm.generate(self.prompts, params, use_tqdm=False):
            (sample,) = output.outputs
            assert (sample.error, len(sample.token_ids)) == (None, new), sample.error
            assert asked is None or sample.text.startswith('[{"name":"')


class Parts:
    """Seconds spent in functions, by name."""

    def __init__(self) -> None:
        self.spent: dict[str, list[float]] = defaultdict(list)

    @contextmanager
    def of(self, **where: tuple[Any, str]) -> Iterator[None]:
        """Times functions or methods of objects, given by the name of the part."""
        kept = {name: getattr(owner, attribute) for name, (owner, attribute) in where.items()}
        for name, (owner, attribute) in where.items():
            setattr(owner, attribute, self._timed(name, kept[name]))
        try:
            yield
        finally:
            for name, (owner, attribute) in where.items():
                setattr(owner, attribute, kept[name])

    def _timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*arguments)
            finally:
                self.spent[name].append(time.perf_counter() - start)

        return timed

    def median_us(self, name: str) -> float:
        return statistics.median(self.spent[name]) * 1e6


def measure_parts(runs: Runs) -> dict[str, float]:
    """Medians in microseconds."""
    masks: Any = runs.llm.engine._masks
    parts = Parts()
    with parts.of(
        step=(runs.llm.engine, "step"),
        begin=(masks, "begin"),
        masks=(masks._masks, "fill"),
        wait=(masks, "_take"),
        apply_and_wait=(masks, "apply"),
        ended=(engine_module, "ended_by_grammar"),
    ):
        runs.structured()
    found = {name: parts.median_us(name) for name in parts.spent}
    found["apply"] = found.pop("apply_and_wait") - found["wait"]
    compiler: Any = runs.llm.engine._intake._grammars
    asked = StructuredOutputsParams(json=SCHEMA, disable_any_whitespace=True)
    for name in ("compile", "compile again"):
        if name == "compile":
            compiler._kept.clear()
        start = time.perf_counter()
        compiler.compile(asked)
        found[name] = (time.perf_counter() - start) * 1e6
    return found


# The section --------------------------------------------------------------------------------------


def run(small: bool) -> Json:
    """All measurements; ``small`` for CI."""
    settings = SMALL if small else Settings()
    runs = Runs(settings)
    with runs.llm:
        pairs = measure_pairs(runs.plain, runs.structured, pairs=settings.pairs)
        parts = measure_parts(runs)
    return {
        "settings": asdict(settings),
        "schema": SCHEMA,
        "runs": asdict(pairs),
        "cost": cost(pairs),
        "step_us": parts,
    }


def cost(pairs: Pairs) -> float:
    """The share of the throughput that the schema takes."""
    return 1 - pairs.ratio


def print_results(found: Json) -> None:
    settings, pairs = found["settings"], found["runs"]
    tokens = settings["sequences"] * settings["new_tokens"]
    print_table(
        f"{settings['sequences']} sequences of {settings['new_tokens']} tokens, with a JSON schema",
        ["plain tokens/s", "with it tokens/s", "cost", "quartiles"],
        [
            [
                tokens / pairs["base_us"] * 1e6,
                tokens / pairs["candidate_us"] * 1e6,
                f"{found['cost']:.1%}",
                f"{1 - pairs['ratio_high']:.1%} to {1 - pairs['ratio_low']:.1%}",
            ]
        ],
    )
    print_table(
        "what the schema does in a step",
        ["part", "us"],
        [[name, value] for name, value in found["step_us"].items()],
    )


def make_targets(found: Json) -> list[Target]:
    step = found["step_us"]
    return [
        Target(
            "throughput that a JSON schema costs, 32 sequences, tiny model",
            found["cost"] * 100,
            LIMIT * 100,
            "%",
            at_least=False,
            note=f"masks take {step['masks']:.0f} us beside the model, {step['wait']:.0f} us of it "
            "are waited for",
        )
    ]
