"""Engines on a GPU, with a model of which few tokens fill a page."""

from __future__ import annotations

import copy
import functools
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

import vattn
from tests.engine_cases import Case, assert_nothing_left, greedy
from tests.models import VOCABULARY, make_model, one_thread
from vattn.attention.base import UnsupportedAttention

PAGE = 2 << 20
TOKENS_PER_PAGE = 128  # of all layers of the model together
CAPTURED = (1, 2, 4, 8, 16, 32)
# bf16 itself moves log probabilities of such sharp random models by a few tenths.
CLOSE = 0.25


@functools.cache
def _wide_model() -> Any:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=1024,
        bos_token_id=1,
        eos_token_id=None,
        pad_token_id=0,
        tie_word_embeddings=False,
    )
    return make_model(config)


def wide_model() -> Any:
    """16 KiB of K and V per token in bf16; a model of its own for an engine."""
    return copy.deepcopy(_wide_model())


def cases(n: int, *, tokens: int = 90, new: int = 60, seed: int = 0) -> list[Case]:
    """Requests of which every other one begins like the first, over the edges of a page."""
    rng = random.Random(seed)
    made: list[Case] = []
    for i in range(n):
        prompt = [rng.randrange(3, VOCABULARY) for _ in range(tokens + i % 7)]
        if i % 2 and made:
            prompt[: tokens * 2 // 3] = made[0].prompt[: tokens * 2 // 3]
        made.append(Case(tuple(prompt), new))
    return made


@contextmanager
def engine(device: str, **options: Any) -> Iterator[vattn.LLM]:
    """An engine for the wide model in bf16; a skip where its backend cannot run.

    Without a GPU it has no graphs. Nothing may be left in it at the end.
    """
    settings: dict[str, Any] = {
        "device": device,
        "dtype": "bfloat16",
        "skip_tokenizer_init": True,
        "max_model_len": 256,
        "max_num_seqs": 32,
        "kv_cache_memory_bytes": "512MiB",
        "page_bytes": PAGE,
        "layers_per_region": 4,
        "order": "token",
        **options,
    }
    if device == "cuda" and not settings.get("enforce_eager"):
        settings.setdefault("cudagraph_capture_sizes", CAPTURED)
    elif device != "cuda":
        settings.pop("cudagraph_capture_sizes", None)
    try:
        llm = vattn.LLM(wide_model(), **settings)
    except UnsupportedAttention as error:
        pytest.skip(str(error))
    with llm:
        yield llm
        assert_nothing_left(llm)


def generate(llm: vattn.LLM, requests: list[Case]) -> list[Any]:
    """The likeliest sample of each, with log probabilities; the invariants hold afterwards."""
    prompts: Any = [{"prompt_token_ids": list(case.prompt)} for case in requests]
    params = [greedy(case.new_tokens, logprobs=1) for case in requests]
    with one_thread():  # on a CPU
        samples = [out.outputs[0] for out in llm.generate(prompts, params, use_tqdm=False)]
    assert [sample.error for sample in samples] == [None] * len(requests)
    llm.engine.check()
    return samples


def tokens_of(samples: list[Any]) -> list[list[int]]:
    return [list(sample.token_ids) for sample in samples]


def logprobs_of(sample: Any) -> torch.Tensor:
    """Of the tokens that were sampled."""
    pairs = zip(sample.logprobs, sample.token_ids, strict=True)
    return torch.tensor([entry[token].logprob for entry, token in pairs])


def assert_close_to_model(samples: list[Any], requests: list[Case], device: str) -> None:
    """Log probabilities against the plain model in bf16, over the text that was sampled."""
    plain = wide_model().to(device, torch.bfloat16)
    for sample, case in zip(samples, requests, strict=True):
        ids = torch.tensor([[*case.prompt, *sample.token_ids]], device=device)
        with torch.inference_mode():
            rows = plain(ids).logits[0, len(case.prompt) - 1 : -1].float().log_softmax(-1)
        wanted = rows.gather(1, ids[0, len(case.prompt) :, None])[:, 0].cpu()
        seen = logprobs_of(sample)
        assert (seen - wanted).abs().median() < CLOSE, (seen, wanted)


def assert_graphed(llm: vattn.LLM, device: str) -> None:
    """Decode steps were launched as graphs, where there are any."""
    assert (llm.stats().steps_by_graph > 0) == (device == "cuda")
