"""What the model thinks of the prompt, against one plain forward pass of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import vattn
from tests.engine_cases import assert_nothing_left, engine_model, make_llm
from tests.models import one_thread
from vattn.engine import score_room
from vattn.outputs import RequestOutput
from vattn.sampling_params import SamplingParams

PROMPT = [(7 * i * i + 3 * i) % 90 + 3 for i in range(70)]
CLOSE = 1e-4


def scored(prompt_logprobs: int = 2, **options: Any) -> SamplingParams:
    options = {"temperature": 0, "max_tokens": 4, "ignore_eos": True, **options}
    return SamplingParams(prompt_logprobs=prompt_logprobs, **options)


def ask(llm: vattn.LLM, *prompts: list[int], params: Any) -> list[RequestOutput]:
    with one_thread():
        return llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)


@torch.inference_mode()
def reference(prompt: list[int], family: str) -> torch.Tensor:
    """Log probabilities ``[len - 1, V]`` of what follows each token of the prompt."""
    with one_thread():
        logits = engine_model(family)(input_ids=torch.tensor([prompt])).logits[0, :-1]
    found: torch.Tensor = logits.float().log_softmax(1)
    return found


def assert_scores(output: RequestOutput, prompt: list[int], family: str, count: int) -> None:
    entries = output.prompt_logprobs
    assert entries is not None
    assert len(entries) == len(prompt)
    assert entries[0] is None
    for token, entry, wanted in zip(
        prompt[1:], entries[1:], reference(prompt, family), strict=True
    ):
        assert entry is not None
        assert entry[token].logprob == pytest.approx(float(wanted[token]), abs=CLOSE)
        likelier = int((wanted > wanted[token] + CLOSE).sum())
        ties = int(((wanted - wanted[token]).abs() <= CLOSE).sum())
        assert likelier < entry[token].rank <= likelier + ties
        best = wanted.topk(count).values.tolist()
        ranked = sorted(each.logprob for each in entry.values())[::-1]
        assert ranked[:count] == pytest.approx(best, abs=CLOSE)
        assert len(entry) in (count, count + 1)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("is_async", [False, True])
def test_scores_are_those_of_a_plain_forward_pass(family: str, is_async: bool) -> None:
    prompts = [PROMPT, PROMPT[:1], PROMPT[5:7], PROMPT[:40]]
    with make_llm(family, async_scheduling=is_async) as llm:
        plain = [o.outputs[0].token_ids for o in ask(llm, *prompts, params=scored(2))]
        llm.reset_prefix_cache()
        outputs = ask(llm, *prompts, params=scored(2))
        for output, prompt in zip(outputs, prompts, strict=True):
            assert_scores(output, prompt, family, 2)
        assert [o.outputs[0].token_ids for o in outputs] == plain
        assert_nothing_left(llm)


@pytest.mark.parametrize("step_tokens", [9, 33])
def test_prompts_in_chunks(step_tokens: int) -> None:
    with make_llm(max_num_seqs=4, max_num_batched_tokens=step_tokens) as llm:
        prompts = [PROMPT, PROMPT[3:50]]
        for output, prompt in zip(ask(llm, *prompts, params=scored(1)), prompts, strict=True):
            assert_scores(output, prompt, "llama", 1)
        assert_nothing_left(llm)


def test_what_is_cached_is_scored_all_the_same() -> None:
    with make_llm() as llm:
        ask(llm, PROMPT, params=scored(0))
        output = ask(llm, PROMPT, params=scored(1))[0]
        assert output.num_cached_tokens == 0
        assert_scores(output, PROMPT, "llama", 1)
        assert ask(llm, PROMPT, params=SamplingParams(max_tokens=1))[0].num_cached_tokens > 0
        assert_nothing_left(llm)


def test_the_whole_vocabulary() -> None:
    with make_llm(max_logprobs=-1) as llm:
        output = ask(llm, PROMPT[:5], params=scored(-1))[0]
        assert output.prompt_logprobs is not None
        for entry, wanted in zip(
            output.prompt_logprobs[1:], reference(PROMPT[:5], "llama"), strict=True
        ):
            assert entry is not None
            found = [entry[token].logprob for token in range(len(wanted))]
            assert found == pytest.approx(wanted.tolist(), abs=CLOSE)


def test_samples_share_the_scores_of_their_prompt() -> None:
    with make_llm() as llm:
        output = ask(llm, PROMPT, params=scored(1, n=3, temperature=1.0, seed=3))[0]
        assert len(output.outputs) == 3
        assert_scores(output, PROMPT, "llama", 1)
        assert_nothing_left(llm)


def test_a_step_scores_no_more_than_its_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(score_room, "MAX_SCORED_TOKENS", 16)
    with make_llm() as llm:
        most = 0
        score = llm.engine.sampler.score

        def watch(logits: torch.Tensor, *rest: Any) -> Any:
            nonlocal most
            most = max(most, len(logits))
            return score(logits, *rest)

        monkeypatch.setattr(llm.engine.sampler, "score", watch)
        prompts = [PROMPT, PROMPT[2:], PROMPT[4:]]
        for output, prompt in zip(ask(llm, *prompts, params=scored(1)), prompts, strict=True):
            assert_scores(output, prompt, "llama", 1)
        assert 0 < most <= 16
        assert_nothing_left(llm)


def test_others_go_on_beside_prompts_that_wait_for_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(score_room, "MAX_SCORED_TOKENS", 4)
    with make_llm(max_num_batched_tokens=64) as llm:
        engine = llm.engine
        requests = [
            request
            for i, params in enumerate([scored(1), scored(1), SamplingParams(max_tokens=2)])
            for request in engine.make_requests(f"r{i}", PROMPT[i:50], params)
        ]
        for request in requests:
            engine.add(request)
        with one_thread():
            while not requests[2].finished:
                engine.step()
            assert not requests[0].output_ids
            while engine.has_unfinished:
                engine.step()
        for request in requests[:2]:
            output = engine.outputs.request_output("r", None, request.prompt_ids, [request])
            assert_scores(output, request.prompt_ids, "llama", 1)
        assert_nothing_left(llm)


@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize("steps", [0, 1, 2, 3, 5])
def test_samples_have_the_scores_that_the_first_did_not_live_to_see(
    steps: int, is_async: bool
) -> None:
    with make_llm(max_num_batched_tokens=16, max_num_seqs=8, async_scheduling=is_async) as llm:
        engine = llm.engine
        samples = engine.make_requests("r", PROMPT, scored(1, n=3))
        with one_thread():
            for sample in samples:
                engine.add(sample)
            for _ in range(steps):
                engine.step()
            engine.abort("r.0")
            while engine.has_unfinished:
                engine.step()
        output = engine.outputs.request_output("r", None, PROMPT, samples)
        assert [each.finish_reason for each in output.outputs] == ["abort", "length", "length"]
        assert_scores(output, PROMPT, "llama", 1)
        assert_nothing_left(llm)


@pytest.mark.parametrize("swap_gib", [0.0, 0.01])
def test_preempted_requests_are_scored_once(swap_gib: float) -> None:
    with make_llm(
        kv_cache_memory_bytes="400KiB", max_num_batched_tokens=64, swap_space=swap_gib
    ) as llm:
        prompts = [PROMPT[i:] for i in range(8)]
        outputs = ask(llm, *prompts, params=scored(1, max_tokens=60))
        assert llm.stats().num_preemptions > 0
        for output, prompt in zip(outputs, prompts, strict=True):
            assert output.outputs[0].error is None
            assert_scores(output, prompt, "llama", 1)
        assert_nothing_left(llm)
