"""Prompts for beam search in engines, and what transformers makes of them, once per session."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch

import vattn
from tests.engine_cases import PAGE, engine_model, fresh_model
from tests.models import VOCABULARY, one_thread
from vattn.outputs import BeamSearchOutput
from vattn.sampling_params import BeamSearchParams

WIDTH = 4
NEW_TOKENS = 20
LENGTHS = (5, 17, 33, 40, 64, 9, 1, 80)
EOS = (5, 17, 40, 63, 41, 87)  # chosen so that some beams of every family end by them
FILL = VOCABULARY - 1  # in place of a token, where transformers' sequences have ended; no prompt's


@dataclass(frozen=True)
class Found:
    """One sequence as transformers found it."""

    token_ids: tuple[int, ...]
    score: float


def prompts() -> list[list[int]]:
    """One of each of the LENGTHS."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(2, VOCABULARY - 1, (n,), generator=generator).tolist() for n in LENGTHS]


def search(width: int = WIDTH, new: int = NEW_TOKENS, **options: Any) -> BeamSearchParams:
    return BeamSearchParams(beam_width=width, max_tokens=new, **options)


@functools.cache
def reference(
    family: str, params: BeamSearchParams, lengths: tuple[int, ...] = LENGTHS
) -> list[list[Found]]:
    """What `generate` finds for the prompts of these lengths, each alone: nothing is padded."""
    model = engine_model(family)
    chosen = [prompt for prompt in prompts() if len(prompt) in lengths]
    with one_thread():
        return [_generate(model, prompt, params) for prompt in chosen]


def _generate(model: Any, prompt: Sequence[int], params: BeamSearchParams) -> list[Found]:
    ids = torch.tensor([prompt])
    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        num_beams=params.beam_width,
        num_return_sequences=params.beam_width,
        max_new_tokens=params.max_tokens,
        eos_token_id=None if params.ignore_eos else list(EOS),
        pad_token_id=FILL,
        length_penalty=params.length_penalty,
        early_stopping=params.early_stopping,
        do_sample=False,
        return_dict_in_generate=True,
        output_scores=True,
    )
    rows = out.sequences[:, len(prompt) :].tolist()
    return [
        Found(tuple(ended(row, params)), score)
        for row, score in zip(rows, out.sequences_scores.tolist(), strict=True)
    ]


def ended(row: list[int], params: BeamSearchParams) -> list[int]:
    """A sequence without what fills it up."""
    if params.ignore_eos:
        return row
    ends = [place for place, token in enumerate(row) if token in EOS]
    return row[: ends[0] + 1] if ends else row


def beam_llm(family: str = "llama", **options: Any) -> vattn.LLM:
    """An engine on strict memory with small pages, that checks everything after each step."""
    model = fresh_model(family)
    model.generation_config.eos_token_id = list(EOS)
    options = {
        "dtype": "float32",
        "device": "cpu",
        "skip_tokenizer_init": True,
        "max_model_len": 256,
        "max_num_seqs": 32,
        "page_bytes": PAGE,
        "strict": True,
        "kv_cache_memory_bytes": "64MiB",
        **options,
    }
    llm = vattn.LLM(model, **options)
    step = llm.engine.step

    def checked() -> list[Any]:
        news = step()
        llm.engine.check()
        return news

    llm.engine.step = checked  # type: ignore[method-assign]
    return llm


def ids(prompts: Sequence[Sequence[int]]) -> list[Any]:
    return [{"prompt_token_ids": list(prompt)} for prompt in prompts]


def run(
    llm: vattn.LLM, params: BeamSearchParams, lengths: tuple[int, ...] = LENGTHS, **options: Any
) -> list[BeamSearchOutput]:
    """All prompts of these lengths at once."""
    chosen = [prompt for prompt in prompts() if len(prompt) in lengths]
    with one_thread():
        return llm.beam_search(ids(chosen), params, **options)


def assert_equal(
    outputs: Sequence[BeamSearchOutput],
    family: str,
    params: BeamSearchParams,
    lengths: tuple[int, ...] = LENGTHS,
) -> None:
    """Every sequence and every score is that of `generate`."""
    expected = reference(family, params, lengths)
    assert len(outputs) == len(expected)
    for number, (output, wanted) in enumerate(zip(outputs, expected, strict=True)):
        assert output.error is None, output.error
        found = [tuple(each.token_ids) for each in output.sequences]
        assert found == [each.token_ids for each in wanted], f"prompt {number}"
        for each, known in zip(output.sequences, wanted, strict=True):
            assert each.score == pytest.approx(known.score, abs=1e-4, rel=1e-5)
            stopped = not params.ignore_eos and each.token_ids[-1] in EOS
            assert each.finish_reason == ("stop" if stopped else "length")
