"""Speculation on a GPU: verified by the kernels for chunks, drafted by graphs, in one pool."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.gpu.engine_runs import cases, engine, wide_model
from tests.speculation_cases import NGRAM, Oracle, generate, whole_texts
from vattn.sampling_params import SamplingParams

CLOSE = 0.25  # of log probabilities in bf16, see engine_runs


def params(count: int, new: int) -> list[SamplingParams]:
    return [SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, logprobs=1)] * count


def likely(model: Any, prompt: list[int], tokens: list[int], device: str) -> torch.Tensor:
    """How far below the likeliest each token is, by the plain model over the whole text."""
    ids = torch.tensor([[*prompt, *tokens]], device=device)
    with torch.inference_mode():
        rows = model(ids).logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
    below: torch.Tensor = rows.amax(1) - rows.gather(1, ids[0, len(prompt) :, None])[:, 0]
    return below.cpu()


@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize("method", ["ngram", "draft_model", "oracle"])
def test_text_is_the_models_own(method: str, eager: bool, device: str) -> None:
    """Each token is one of the likeliest after those before it, whatever was guessed.

    In bf16 steps of other shapes round otherwise, so texts may part where two tokens are as likely.
    """
    config: dict[str, Any] = NGRAM
    if method == "draft_model":
        config = {"model": wide_model(), "num_speculative_tokens": 3}
    wanted = cases(12)
    prompts = [list(case.prompt) for case in wanted]
    with engine(device, enforce_eager=eager) as plain:
        known = whole_texts(generate(plain, prompts, params(12, 60)))
    with engine(device, enforce_eager=eager, speculative_config=config) as llm:
        assert not llm.engine.is_async
        if method == "oracle":
            Oracle(llm, known, luck=0.8)
        outputs = generate(llm, prompts, params(12, 60))
        stats = llm.stats()
        if method != "ngram":  # random text repeats itself by chance only
            assert stats.spec_decode_num_accepted_tokens > 0.2 * stats.spec_decode_num_draft_tokens
        assert stats.spec_decode_num_draft_tokens > 0
        model = wide_model().to(device, torch.bfloat16)
        for output, prompt in zip(outputs, prompts, strict=True):
            sample = output.outputs[0]
            assert sample.error is None, sample.error
            assert len(sample.token_ids) == 60
            assert likely(model, prompt, sample.token_ids, device).median() < CLOSE


def test_drafts_of_a_draft_model_run_as_graphs(device: str) -> None:
    config = {"model": wide_model(), "num_speculative_tokens": 4}
    with engine(device, speculative_config=config) as llm:
        draft: Any = llm.engine.proposer
        if draft.runner.graph_stats.captured == 0:
            pytest.skip("no backend whose decodes can be captured")
        generate(llm, [list(case.prompt) for case in cases(4)], params(4, 40))
        assert draft.runner.graph_stats.replayed > 10


def test_few_pages(device: str) -> None:
    """Drafts give their pages up, requests are preempted, and nothing is lost."""
    wanted = cases(10, new=120)
    prompts = [list(case.prompt) for case in wanted]
    config = {"model": wide_model(), "num_speculative_tokens": 3}
    pages = 16 << 20
    with engine(device, speculative_config=config, kv_cache_memory_bytes=pages) as llm:
        outputs = generate(llm, prompts, params(10, 120))
        assert all(len(output.outputs[0].token_ids) == 120 for output in outputs)
        model = wide_model().to(device, torch.bfloat16)
        for output, prompt in zip(outputs, prompts, strict=True):
            tokens = output.outputs[0].token_ids
            assert likely(model, prompt, tokens, device).median() < CLOSE
