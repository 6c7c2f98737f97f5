"""A draft model: what it guesses, how it follows requests, and that it gives its pages up first."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import pytest
import torch

import vattn
from tests.engine_cases import (
    EMBEDDED,
    EMBEDDED_PATH,
    assert_equal,
    assert_nothing_left,
    fresh_model,
    greedy,
    make_llm,
    mixed_cases,
    run,
)
from tests.models import CONFIGS, make_model, one_thread
from tests.models import engine_model as graph_model
from tests.recorded_graph import RecordedGraph, flash2
from tests.speculation_cases import assert_same, generate, llm_with
from vattn.engine import buckets, graphs, setup
from vattn.engine.speculation import make
from vattn.engine.speculation.draft_model import DraftModel
from vattn.request import Request
from vattn.sampling_params import SamplingParams

PAGE = 4096


def blurred(family: str) -> Any:
    """A model that says mostly what the family's says."""
    model = fresh_model(family)
    torch.manual_seed(3)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.03 * weight.std() * torch.randn_like(weight) if weight.dim() > 1 else 0
    return model


def drafting(family: str, model: Any, count: int = 3, **options: Any) -> vattn.LLM:
    return llm_with(family, {"model": model, "num_speculative_tokens": count}, **options)


def draft_of(llm: vattn.LLM) -> DraftModel:
    proposer = llm.engine.proposer
    assert isinstance(proposer, DraftModel)
    return proposer


def likeliest(model: Any, tokens: list[int], count: int) -> list[int]:
    """What a model goes on with, computed anew for each token."""
    text = list(tokens)
    with one_thread(), torch.inference_mode():
        for _ in range(count):
            logits = model(input_ids=torch.tensor([text]), use_cache=False).logits
            text.append(int(logits[0, -1].argmax()))
    return text[len(tokens) :]


class Watched:
    """Stands before a draft model and looks at what it proposes."""

    def __init__(self, llm: vattn.LLM) -> None:
        self.seen: list[tuple[list[int], list[int]]] = []
        self._draft = draft_of(llm)
        self._propose = self._draft.propose
        self._draft.propose = self.propose  # type: ignore[method-assign]

    def propose(self, requests: Sequence[Request]) -> None:
        self._propose(requests)
        self._draft.check()
        self.seen += [(list(r.tokens), list(r.drafts)) for r in requests]


@pytest.mark.parametrize("family", ["llama", "gemma3", "mistral", "gpt2"])
def test_it_proposes_what_it_would_say_itself(family: str) -> None:
    """Whatever was accepted before, and whatever else is in the batch."""
    draft = blurred(family)
    llm = drafting(family, draft)
    watched = Watched(llm)
    cases = [case for case in mixed_cases(family) if len(case.prompt) < 45][:5]
    assert_equal(run(llm, cases), cases, family)
    alone = blurred(family)
    for tokens, drafts in watched.seen:
        assert drafts == likeliest(alone, tokens, len(drafts))
    stats = llm.stats()
    # Both ways of going on have been there.
    assert 0 < stats.spec_decode_num_accepted_tokens < stats.spec_decode_num_draft_tokens
    assert stats.spec_decode_num_accepted_tokens_per_pos[2] > 0
    assert_nothing_left(llm)


def test_long_prompts_are_caught_up_with_in_chunks() -> None:
    llm = drafting("llama", fresh_model("llama"), max_num_batched_tokens=16, max_num_seqs=4)
    draft = draft_of(llm)
    sizes: list[int] = []
    good = draft.runner.run

    def counted(batch: Any) -> torch.Tensor:
        sizes.append(len(batch.input_ids))
        out: torch.Tensor = good(batch)
        return out

    draft.runner.run = counted  # type: ignore[method-assign]
    watched = Watched(llm)
    cases = [case for case in mixed_cases("llama") if len(case.prompt) == 40][:2]
    assert_equal(run(llm, cases), cases, "llama")
    assert max(sizes) == 16
    assert [drafts for tokens, drafts in watched.seen][:2] == [[], []]
    assert llm.stats().spec_decode_num_accepted_tokens > 10
    assert_nothing_left(llm)


def test_samples_share_the_pages_of_their_prompt() -> None:
    prompts = [list(range(5, 95)) * 2]
    params = [SamplingParams(n=4, max_tokens=20, seed=3, ignore_eos=True)]
    wanted = generate(make_llm("llama"), prompts, params)
    llm = drafting("llama", fresh_model("llama"))
    assert_same(generate(llm, prompts, params), wanted)
    assert draft_of(llm).cache.stats().pages_aliased > 0
    assert_nothing_left(llm)


def test_a_draft_of_another_family_and_a_shorter_length() -> None:
    """Beyond its own length it proposes nothing; the text goes on."""
    config = CONFIGS["gpt2"]()
    config.n_positions = 48
    llm = drafting("qwen3", make_model(config))
    watched = Watched(llm)
    cases = mixed_cases("qwen3")
    assert_equal(run(llm, cases), cases, "qwen3")
    assert all(len(tokens) + len(drafts) <= 48 for tokens, drafts in watched.seen if drafts)
    assert any(len(tokens) > 48 for tokens, _ in watched.seen)
    assert any(drafts for _, drafts in watched.seen)
    assert_nothing_left(llm)


def test_a_draft_from_a_directory() -> None:
    cases = mixed_cases(EMBEDDED)[:12]
    llm = drafting(EMBEDDED, EMBEDDED_PATH)
    assert_equal(run(llm, cases), cases, EMBEDDED)
    stats = llm.stats()
    assert stats.spec_decode_num_accepted_tokens == stats.spec_decode_num_draft_tokens > 0
    llm.close()


def test_the_model_itself_as_its_draft() -> None:
    model = fresh_model("llama")
    cases = mixed_cases("llama")[:12]
    llm = vattn.LLM(
        model,
        skip_tokenizer_init=True,
        max_model_len=256,
        page_bytes=PAGE,
        strict=True,
        speculative_config={"model": model, "num_speculative_tokens": 3},
    )
    assert_equal(run(llm, cases), cases, "llama")
    assert_nothing_left(llm)


def test_another_vocabulary_is_refused() -> None:
    config = CONFIGS["llama"]()
    config.vocab_size = 80
    model = make_model(config)
    with pytest.raises(ValueError, match=r"a vocabulary of 80 tokens, and the model .* 96"):
        drafting("llama", model)
    assert model.config._attn_implementation == "sdpa"  # it has its attention back
    model = fresh_model("llama")
    with pytest.raises(ValueError, match="page_bytes, kv_cache_memory_bytes"):
        drafting("llama", model, pool=vattn.PagePool(page_bytes=PAGE))
    assert model.config._attn_implementation == "sdpa"


def test_its_steps_run_as_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buckets, "_SHORTEST", 32)
    monkeypatch.setattr(graphs, "graph_maker", lambda device: RecordedGraph)
    for module in (setup, make):
        monkeypatch.setattr(module, "choose", lambda specs, *_, **__: flash2(specs))

    def texts(**options: Any) -> tuple[vattn.LLM, list[list[int]]]:
        llm = vattn.LLM(
            graph_model("llama"),
            max_model_len=128,
            max_num_seqs=4,
            page_bytes=PAGE,
            skip_tokenizer_init=True,
            speculative_config={"model": graph_model("llama"), "num_speculative_tokens": 3},
            **options,
        )
        prompts = [[5, 6, 7, 8 + i] * (i + 1) for i in range(7)]
        return llm, [o.outputs[0].token_ids for o in generate(llm, prompts, [greedy(24)] * 7)]

    wanted = texts(enforce_eager=True)[1]
    monkeypatch.setattr(setup, "can_capture", lambda device: True)
    llm, found = texts(cudagraph_capture_sizes=[1, 4])
    assert found == wanted
    stats = draft_of(llm).runner.graph_stats
    assert stats.captured == 4
    assert stats.replayed > 10
    assert draft_of(llm).fixed_pages > 0
    assert_nothing_left(llm)
    llm.close()


# Memory ------------------------------------------------------------------------------------------


def prompts_of(count: int, tokens: int) -> list[list[int]]:
    return [[3 + (7 * i + 11 * at) % 90 for at in range(tokens)] for i in range(count)]


def test_requests_go_before_drafts() -> None:
    """With just the pages that a run without drafts needs nobody is preempted, or put off."""
    prompts, params = prompts_of(6, 40), [greedy(60)] * 6
    options: dict[str, Any] = {"enable_prefix_caching": False, "prepare_ahead": False}
    enough = 151 * PAGE
    plain = make_llm("llama", kv_cache_memory_bytes=enough, **options)
    wanted = generate(plain, prompts, params)
    assert plain.stats().num_preemptions == 0
    scarce = make_llm("llama", kv_cache_memory_bytes=enough - 12 * PAGE, **options)
    generate(scarce, prompts, params)
    assert scarce.stats().num_preemptions > 0  # or this test would show nothing
    llm = drafting("llama", blurred("llama"), kv_cache_memory_bytes=enough, **options)
    assert_same(generate(llm, prompts, params), wanted)
    stats = llm.stats()
    assert stats.num_preemptions == 0
    assert stats.spec_decode_num_accepted_tokens > 0
    assert_nothing_left(llm)


def test_admission_takes_pages_from_drafts() -> None:
    llm = drafting(
        "llama",
        fresh_model("llama"),
        kv_cache_memory_bytes=150 * PAGE,
        enable_prefix_caching=False,
        prepare_ahead=False,
    )
    first, second = prompts_of(2, 200)
    (one,) = llm.engine.make_requests("a", first, greedy(50))
    (two,) = llm.engine.make_requests("b", second, greedy(4))
    llm.engine.add(one)
    with one_thread():
        for _ in range(3):
            llm.engine.step()
        draft = draft_of(llm)
        assert draft.live_pages() >= 40
        assert llm.engine.cache.pool.core.available_pages() < 60
        # Without its prefix it needs 48 and the watermark.
        (third,) = llm.engine.make_requests("c", prompts_of(3, 200)[2], greedy(4))
        for request in (two, third):
            llm.engine.add(request)
            llm.engine.step()
            llm.engine.check()
            assert request.slot >= 0
        while llm.engine.has_unfinished:
            llm.engine.step()
            llm.engine.check()
    assert llm.stats().num_preemptions == 0
    assert_nothing_left(llm)


def test_a_lowered_budget_takes_from_drafts_first() -> None:
    prompts, params = prompts_of(3, 60), [greedy(40)] * 3
    wanted = generate(make_llm("llama"), prompts, params)
    llm = drafting("llama", blurred("llama"), enable_prefix_caching=False)
    requests = [llm.engine.make_requests(str(i), p, greedy(40))[0] for i, p in enumerate(prompts)]
    for request in requests:
        llm.engine.add(request)
    with one_thread():
        for _ in range(4):
            llm.engine.step()
        draft = draft_of(llm)
        assert draft.live_pages() > 50
        llm.set_budget(3 * 24 * PAGE)  # what the requests themselves will need
        while llm.engine.has_unfinished:
            llm.engine.step()
            llm.engine.check()
            pool = llm.engine.cache.pool.stats()
            assert pool.created_bytes <= pool.budget_bytes
    assert [r.output_ids for r in requests] == [o.outputs[0].token_ids for o in wanted]
    assert llm.stats().num_preemptions == 0
    assert_nothing_left(llm)


def test_its_pages_are_nobody_elses() -> None:
    """A request that is too large fails, instead of waiting for pages that drafts have."""
    llm = drafting(
        "llama", fresh_model("llama"), kv_cache_memory_bytes=30 * PAGE, enable_prefix_caching=False
    )
    outputs = generate(llm, prompts_of(2, 20), [greedy(150)] * 2)
    assert all("out of pages" in str(output.outputs[0].error) for output in outputs)
    stats = llm.stats()
    assert stats.finished["error"] == 2
    assert_nothing_left(llm)


def test_closing_gives_everything_back() -> None:
    llm = drafting("llama", blurred("llama"))
    for number, prompt in enumerate(prompts_of(4, 50)):
        llm.engine.add(llm.engine.make_requests(str(number), prompt, greedy(30))[0])
    with one_thread():
        for _ in range(4):
            llm.engine.step()
    pool = llm.engine.cache.pool
    assert draft_of(llm).held_bytes() > 0
    llm.close()
    pool.trim()
    pool.check()
    assert pool.stats().created_bytes == 0


# What goes wrong ---------------------------------------------------------------------------------


def test_a_draft_model_without_numbers_is_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    draft = fresh_model("llama")
    with torch.no_grad():
        # A text with this token has no numbers from there on: others have drafts, it has none.
        draft.model.embed_tokens.weight[90] = torch.nan
    cases = [case for case in mixed_cases("llama") if len(case.prompt) in (5, 17)]
    llm = drafting("llama", draft)
    with caplog.at_level(logging.WARNING):
        assert_equal(run(llm, cases), cases, "llama")
    assert "are not finite" in caplog.text
    # Each is tried once, and the pages are zeroed for whoever is next.
    warned = [record.getMessage() for record in caplog.records if "not finite" in record.msg]
    assert len(warned) == len(set(warned))
    assert_equal(run(llm, cases), cases, "llama")
    assert_nothing_left(llm)


def test_a_failed_step_ends_its_drafts() -> None:
    llm = drafting("llama", fresh_model("llama"))
    good, calls = llm.engine.runner.run, []

    def fail(batch: Any) -> torch.Tensor:
        calls.append(batch)
        if len(calls) == 3:
            raise RuntimeError("made to fail")
        return good(batch)

    llm.engine.runner.run = fail  # type: ignore[method-assign]
    outputs = generate(llm, prompts_of(3, 30), [greedy(20)] * 3)
    assert all("made to fail" in str(output.outputs[0].error) for output in outputs)
    assert draft_of(llm).cache.stats().open_slots == 0
    assert_nothing_left(llm)
