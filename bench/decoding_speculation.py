"""Speculative decoding: steps and time against decoding token by token, where it wins and loses.

A section of `bench.decoding`. The embedded model, deepened by layers that add nothing so that a
step costs something, continues two sets of prompts: texts that say the same again and again, by
the likeliest tokens, which copy, and random tokens, by tokens that are drawn, which do not. Two
engines, one of them speculating, generate the same set in turns, few sequences at once and many.
Drafts are looked up in the text, or come from the embedded model as it is, whose likeliest tokens
are those of the deepened one: the best that a draft model can do, at its share of the cost. Beside
that prompt lookup alone, for many long texts.
"""

from __future__ import annotations

import copy
import random
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import vattn
from bench.common import Json, Target, measure_pairs, print_table, quartiles
from vattn.engine.speculation.ngram import NgramProposer
from vattn.request import Request
from vattn.sampling_params import SamplingParams

STEPS_LIMIT = 1.5  # times fewer
EMBEDDED = Path(vattn.__file__).parent / "models" / "tiny"
TEXTS = (
    "The page table maps each virtual page to a physical page. ",
    "def add(a, b):\n    return a + b\n\n",
    "Every request has a slot, and every slot has pages. ",
    "one two three four five six seven eight nine ten ",
    "The cache keeps the keys. The cache keeps the values. ",
    "x = 1\ny = 2\n",
    "A kernel reads memory, and memory is mapped. ",
    "Name: Ada; Name: Alan; Name: Grace; ",
)
LOOKUP = {"method": "ngram", "prompt_lookup_max": 4, "prompt_lookup_min": 2}


@dataclass(frozen=True)
class Settings:
    """How large it is."""

    layers: int = 12  # of the deepened model
    new_tokens: int = 128
    pairs: int = 5
    at_once: tuple[int, ...] = (1, 4)
    drafts: int = 5
    texts: int = 256  # of prompt lookup alone
    text_tokens: int = 2048
    lookups: int = 50


SMALL = Settings(
    layers=6, new_tokens=12, pairs=1, at_once=(2,), drafts=3, texts=4, text_tokens=96, lookups=3
)


# Generating ---------------------------------------------------------------------------------------


def load_embedded() -> Any:
    model: Any = AutoModelForCausalLM.from_pretrained(EMBEDDED, dtype=torch.float32)
    return model.eval()


def deepen(model: Any, layers: int) -> Any:
    """The same model with copies of its layers behind them whose outputs are zero."""
    deep = copy.deepcopy(model)
    blocks = deep.model.layers
    while len(blocks) < layers:
        block = copy.deepcopy(blocks[0])
        block.self_attn.layer_idx = len(blocks)
        torch.nn.init.zeros_(block.self_attn.o_proj.weight)
        torch.nn.init.zeros_(block.mlp.down_proj.weight)
        blocks.append(block)
    deep.config.num_hidden_layers = layers
    if getattr(deep.config, "layer_types", None):
        deep.config.layer_types = [deep.config.layer_types[0]] * layers
    return deep


def prompt_sets() -> dict[str, list[list[int]]]:
    """Token ids: of texts to copy, and of as many random ones."""
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED)
    copying = [tokenizer.encode(text * 6) for text in TEXTS]
    rng = random.Random(0)
    other = [[rng.randrange(3, len(tokenizer)) for _ in ids] for ids in copying]
    return {"copying": copying, "drawn": other}


class Side:
    """An engine and what it generates; each call all prompts, so many at once."""

    def __init__(
        self,
        model: Any,
        prompts: list[list[int]],
        seqs: int,
        config: Json | None,
        temperature: float = 0.0,
    ) -> None:
        self.temperature = temperature
        self.prompts = [{"prompt_token_ids": ids} for ids in prompts]
        self.tokens: list[list[int]] = []
        self.llm = vattn.LLM(
            copy.deepcopy(model),
            dtype="float32",
            device="cpu",
            skip_tokenizer_init=True,
            max_model_len=512,
            max_num_seqs=seqs,
            enable_prefix_caching=False,
            speculative_config=config,
        )

    def run(self, new_tokens: int) -> None:
        params = [
            SamplingParams(
                temperature=self.temperature, seed=seed, max_tokens=new_tokens, ignore_eos=True
            )
            for seed in range(len(self.prompts))
        ]
        outputs = self.llm.generate(self.prompts, params, use_tqdm=False)
        self.tokens = [output.outputs[0].token_ids for output in outputs]


def measure_case(
    models: dict[str, Any],
    method: str,
    prompts: list[list[int]],
    seqs: int,
    settings: Settings,
    temperature: float,
) -> Json:
    """One set of prompts by one method, against no drafts; at most four rounds of prompts."""
    prompts = prompts[: 4 * seqs]
    config: Json = {"num_speculative_tokens": settings.drafts}
    config |= LOOKUP if method == "ngram" else {"model": copy.deepcopy(models["draft"])}
    plain = Side(models["deep"], prompts, seqs, None, temperature)
    speculative = Side(models["deep"], prompts, seqs, config, temperature)
    pairs = measure_pairs(
        lambda: plain.run(settings.new_tokens),
        lambda: speculative.run(settings.new_tokens),
        pairs=settings.pairs,
        warmup=1,
    )
    before, after = plain.llm.stats(), speculative.llm.stats()
    equal = plain.tokens == speculative.tokens
    plain.llm.close()
    speculative.llm.close()
    runs = settings.pairs + 1
    return {
        "method": method,
        "at_once": seqs,
        "steps": before.num_steps / runs,
        "speculative_steps": after.num_steps / runs,
        "steps_ratio": before.num_steps / after.num_steps,
        "accepted": after.spec_decode_num_accepted_tokens
        / max(1, after.spec_decode_num_draft_tokens),
        "accepted_per_pos": list(after.spec_decode_num_accepted_tokens_per_pos),
        "time": asdict(pairs),
        "tokens_equal": equal,
    }


# Prompt lookup alone ------------------------------------------------------------------------------


def measure_lookup(settings: Settings) -> Json:
    """Seconds of one step's lookups for all texts, and of reading them at first."""
    rng = random.Random(1)
    requests = []
    for number in range(settings.texts):
        ids = [rng.randrange(32_000) for _ in range(settings.text_tokens)]
        requests.append(Request(str(number), ids, SamplingParams(), 10**6))
    proposer = NgramProposer(settings.drafts, 2, 4)
    start = time.perf_counter()
    proposer.propose(requests)
    first_s = time.perf_counter() - start
    times = []
    for _ in range(settings.lookups):
        for request in requests:
            # Half of them go on with what they have said before.
            at = rng.randrange(len(request.tokens))
            request.tokens += request.tokens[at : at + 3] if rng.random() < 0.5 else [7]
        start = time.perf_counter()
        proposer.propose(requests)
        times.append(time.perf_counter() - start)
    times.sort()
    low, high = quartiles(times)
    return {
        "first_us_per_text": first_s / settings.texts * 1e6,
        "step_us": times[len(times) // 2] * 1e6,
        "step_us_low": low * 1e6,
        "step_us_high": high * 1e6,
    }


# The section --------------------------------------------------------------------------------------


def run(small: bool) -> Json:
    """All measurements; ``small`` for CI."""
    settings = SMALL if small else Settings()
    draft = load_embedded()
    models = {"draft": draft, "deep": deepen(draft, settings.layers)}
    cases = [
        {"prompts": name}
        | measure_case(models, method, prompts, seqs, settings, float(name == "drawn"))
        for name, prompts in prompt_sets().items()
        for method in ("ngram", "draft_model")
        for seqs in settings.at_once
    ]
    return {
        "settings": asdict(settings),
        "draft_layers": draft.config.num_hidden_layers,
        "cases": cases,
        "lookup": measure_lookup(settings),
    }


def print_results(found: Json) -> None:
    settings = found["settings"]
    print_table(
        f"{settings['drafts']} drafts against none: {settings['new_tokens']} tokens of each, "
        f"{settings['layers']} layers, a draft model of {found['draft_layers']}",
        ["prompts", "drafts", "at once", "steps", "with drafts", "accepted", "time", "quartiles"],
        [
            [
                case["prompts"],
                case["method"],
                case["at_once"],
                f"{case['steps']:.0f}",
                f"{case['speculative_steps']:.0f}",
                f"{case['accepted']:.0%}",
                f"{case['time']['ratio']:.2f}x",
                f"{case['time']['ratio_low']:.2f}-{case['time']['ratio_high']:.2f}",
            ]
            for case in found["cases"]
        ],
    )
    lookup = found["lookup"]
    print_table(
        f"prompt lookup alone, {settings['texts']} texts of {settings['text_tokens']} tokens",
        ["what", "us"],
        [
            ["reading a text at first", lookup["first_us_per_text"]],
            ["a step of all texts", lookup["step_us"]],
        ],
    )


def make_targets(found: Json) -> list[Target]:
    copied = [c for c in found["cases"] if (c["prompts"], c["method"]) == ("copying", "ngram")]
    slowest = min(found["cases"], key=lambda case: case["time"]["ratio"])
    return [
        Target(
            "prompt lookup: times fewer steps on text that copies",
            min(case["steps_ratio"] for case in copied),
            STEPS_LIMIT,
            "x",
            at_least=True,
            note=f"time {min(c['time']['ratio'] for c in copied):.2f}x; at worst "
            f"{slowest['time']['ratio']:.2f}x ({slowest['prompts']} prompts, {slowest['method']}, "
            f"{slowest['at_once']} at once)",
        ),
        Target(
            "tokens equal with and without drafts",
            float(all(case["tokens_equal"] for case in found["cases"])),
            1,
            "",
            at_least=True,
        ),
    ]
