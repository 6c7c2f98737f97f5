"""The engine on a real GPU: the tokens of `generate` in float32, bf16 close by every backend."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.engine_cases import (
    Case,
    assert_equal,
    assert_nothing_left,
    fresh_model,
    greedy,
    mixed_cases,
)
from tests.models import FAMILIES
from vattn.attention.base import UnsupportedAttention


def make(family: str, device: str, **options: Any) -> Any:
    import vattn

    return vattn.LLM(
        fresh_model(family),
        **{
            "device": device,
            "skip_tokenizer_init": True,
            "max_model_len": 256,
            "max_num_seqs": 64,
            "kv_cache_memory_bytes": "4GiB",
            **options,
        },
    )


def generate(llm: Any, cases: list[Case]) -> Any:
    prompts = [{"prompt_token_ids": list(case.prompt)} for case in cases]
    return llm.generate(prompts, [greedy(case.new_tokens) for case in cases], use_tqdm=False)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("tight", "ahead"),
    [(False, True), (True, False), (True, True)],
    ids=["async", "tight-sync", "tight-async"],
)
def test_float32_gives_the_tokens_of_generate(
    family: str, tight: bool, ahead: bool, device: str
) -> None:
    cases = mixed_cases(family)
    options: dict[str, Any] = {"dtype": "float32", "async_scheduling": ahead}
    if tight:  # preempted, swapped through pinned memory, chunked
        options |= {"kv_cache_memory_bytes": "96MiB", "swap_space": 0.25, "max_num_seqs": 24}
        options |= {"max_num_batched_tokens": 32}
    with make(family, device, **options) as llm:
        for _ in range(2):  # the second time with prefix hits
            assert_equal(generate(llm, cases), cases, family)
        assert_nothing_left(llm)


@pytest.mark.parametrize(
    "backend",
    [
        "flash_attn_3",
        "vllm_flash_attn_3",
        "flash_attn_2",
        "vllm_flash_attn_2",
        "torch",
        "sdpa",
    ],
)
def test_bfloat16_is_close_to_the_model(backend: str, device: str) -> None:
    """Log probabilities of the sampled tokens, against the plain model over the same text."""
    cases = mixed_cases("llama")[:32]
    try:
        llm = make("llama", device, dtype="bfloat16", attention_backend=backend)
    except UnsupportedAttention as error:
        pytest.skip(str(error))
    with llm:
        prompts = [{"prompt_token_ids": list(case.prompt)} for case in cases]
        params = [greedy(case.new_tokens, logprobs=1) for case in cases]
        outputs = llm.generate(prompts, params, use_tqdm=False)
        plain = fresh_model("llama").to(device, torch.bfloat16)
        for output, case in zip(outputs, cases, strict=True):
            sample = output.outputs[0]
            assert sample.error is None, sample.error
            ids = torch.tensor([[*case.prompt, *sample.token_ids]], device=device)
            with torch.inference_mode():
                rows = plain(ids).logits[0, len(case.prompt) - 1 : -1].float().log_softmax(-1)
            wanted = rows.gather(1, ids[0, len(case.prompt) :, None])[:, 0].cpu()
            seen = torch.tensor(
                [e[t].logprob for e, t in zip(sample.logprobs, sample.token_ids, strict=True)]
            )
            # Sharp random weights: bf16 itself moves these by a few tenths.
            assert (seen - wanted).abs().median() < 0.25, (seen, wanted)
        assert_nothing_left(llm)
