"""Requests for engines, and what transformers' own `generate` makes of them, once per session."""

from __future__ import annotations

import copy
import functools
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

import vattn
from tests.models import FAMILIES, one_thread, tiny_model
from vattn.outputs import RequestOutput
from vattn.sampling_params import SamplingParams

EMBEDDED = "embedded"
ALL_FAMILIES = (*FAMILIES, EMBEDDED)
EMBEDDED_PATH = Path(vattn.__file__).parent / "models" / "tiny"
PAGE = 4096

# Shapes of the 64 mixed requests: (prompt tokens, new tokens), eight requests of each.
SHAPES = ((1, 30), (5, 12), (17, 24), (33, 9), (40, 20), (64, 16), (70, 28), (90, 4))
SHARED_TOKENS = 30  # with which half of the longer prompts begin


@dataclass(frozen=True)
class Case:
    """One request."""

    prompt: tuple[int, ...]
    new_tokens: int


@functools.cache
def engine_model(family: str) -> Any:
    """A model whose text depends on every cached token; its attention is set to "sdpa"."""
    if family != EMBEDDED:
        return tiny_model(family)
    model: Any = AutoModelForCausalLM.from_pretrained(EMBEDDED_PATH, dtype=torch.float32)
    return model.eval()


def fresh_model(family: str) -> Any:
    """A model of its own for an engine, which changes how the model computes attention."""
    return copy.deepcopy(engine_model(family))


def mixed_cases(family: str) -> list[Case]:
    """64 requests of eight shapes, shuffled; some begin alike."""
    rng = random.Random(f"cases of {family}")
    vocabulary = engine_model(family).config.vocab_size
    shared = [rng.randrange(3, vocabulary) for _ in range(SHARED_TOKENS)]
    cases = []
    for tokens, new in SHAPES:
        for i in range(8):
            prompt = [rng.randrange(3, vocabulary) for _ in range(tokens)]
            if i % 2 and tokens > SHARED_TOKENS:
                prompt[:SHARED_TOKENS] = shared
            cases.append(Case(tuple(prompt), new))
    rng.shuffle(cases)
    return cases


@functools.cache
def reference(family: str) -> dict[Case, list[int]]:
    """What `generate` gives for the mixed cases: greedy, fp32, no end of sequence.

    Requests of one shape go together, so that nothing is padded.
    """
    model = engine_model(family)
    shapes: dict[tuple[int, int], list[Case]] = {}
    for case in mixed_cases(family):
        shapes.setdefault((len(case.prompt), case.new_tokens), []).append(case)
    found: dict[Case, list[int]] = {}
    with one_thread():
        for (tokens, new), cases in shapes.items():
            ids = torch.tensor([case.prompt for case in cases])
            out = generate(model, ids, new)
            found |= {case: row[tokens:].tolist() for case, row in zip(cases, out, strict=True)}
    return found


def generate(model: Any, ids: torch.Tensor, new_tokens: int) -> torch.Tensor:
    """Transformers' own text: greedy, exactly so many new tokens."""
    out: torch.Tensor = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return out


def greedy(new_tokens: int, **options: Any) -> SamplingParams:
    """Exactly so many of the likeliest tokens."""
    return SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True, **options)


def make_llm(family: str = "llama", **options: Any) -> vattn.LLM:
    """An engine on strict memory with small pages: what is not mapped faults."""
    options = {
        "dtype": "float32",
        "device": "cpu",
        "skip_tokenizer_init": True,
        "max_model_len": 256,
        "max_num_seqs": 64,
        "page_bytes": PAGE,
        "strict": True,
        "kv_cache_memory_bytes": "64MiB",
        **options,
    }
    return vattn.LLM(fresh_model(family), **options)


def run(llm: vattn.LLM, cases: list[Case], **options: Any) -> list[RequestOutput]:
    """All of the cases at once; the invariants hold after every step."""
    prompts = [{"prompt_token_ids": list(case.prompt)} for case in cases]
    params = [greedy(case.new_tokens, **options) for case in cases]
    with one_thread():
        outputs = llm.generate(prompts, params, use_tqdm=False)
    llm.engine.check()
    return outputs


def assert_equal(outputs: list[RequestOutput], cases: list[Case], family: str) -> None:
    """Every sample is what `generate` gives."""
    wanted = reference(family)
    for number, (output, case) in enumerate(zip(outputs, cases, strict=True)):
        for sample in output.outputs:
            assert sample.error is None, sample.error
            assert sample.token_ids == wanted[case], f"request {number}, {len(case.prompt)} tokens"
            assert sample.finish_reason == "length"


def assert_nothing_left(llm: vattn.LLM) -> None:
    """No request, no slot, and after a trim no page."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()  # copies of the last step may still use swap space
    llm.engine.check()
    stats = llm.stats()
    scratch = llm.engine.memory.scratch_slot is not None  # of graphs, for as long as they live
    assert (stats.num_running, stats.num_waiting) == (0, 0)
    assert stats.cache.open_slots == scratch
    assert stats.swap_used_bytes == 0
    llm.reset_prefix_cache()
    llm.engine.cache.trim()
    drafts = getattr(llm.engine.proposer, "cache", None)  # of a draft model
    if drafts is not None:
        drafts.trim()
    llm.engine.check()
    pool = llm.engine.cache.pool
    fixed = 0 if llm.engine.proposer is None else llm.engine.proposer.fixed_pages
    kept = (llm.engine.memory.scratch_pages + fixed) * pool.page_bytes
    assert pool.stats().created_bytes == kept
    assert pool.driver.physical_bytes() == kept
