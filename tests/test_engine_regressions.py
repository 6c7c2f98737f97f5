"""Mistakes of the engine that were made once: each test failed before its mistake was mended."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

import vattn
from tests.engine_cases import Case, assert_nothing_left, greedy, make_llm, mixed_cases, reference
from tests.stub_model import expected_tokens
from tests.test_engine_memory import drive, finish, make_engine, prompt, start
from vattn.sampling_params import SamplingParams


@pytest.mark.parametrize("seed", range(6))
def test_a_prefix_hit_that_needs_more_pages_than_there_are(seed: int) -> None:
    """A fork of a kept slot beside that slot did not fit, so the request waited for ever."""
    rng = random.Random(seed)
    engine = make_engine(pages=rng.randrange(14, 40), order="head", max_num_seqs=3)
    base = prompt(200, seed)
    for i in range(40):
        ids = [*base[: rng.randrange(1, 90)], *prompt(rng.randrange(1, 30), 50 + i)]
        request = start(engine, ids, rng.randrange(1, 8), f"r{i}")
        for _ in range(200):
            engine.step()
            if request.finished:
                break
        assert request.finished, "no progress"
        if request.finish_reason == "length":
            assert request.output_ids == expected_tokens(ids, len(request.output_ids))
        else:
            assert "pages" in str(request.error)
        engine.check()
    finish(engine)


@pytest.mark.parametrize("where", ["schedule", "run", "sample", "append"])
def test_an_interruption_leaves_nothing_that_was_not_computed(where: str) -> None:
    """Tokens whose step was interrupted counted as computed, and were found as a prefix."""
    llm = make_llm("llama")
    engine: Any = llm.engine
    case = next(c for c in mixed_cases("llama") if len(c.prompt) == 40)
    owner, name = {
        "schedule": (engine.memory, "grow"),
        "run": (engine.runner, "run"),
        "sample": (engine.sampler, "sample"),
        "append": (engine.outputs, "process"),
    }[where]
    real, calls = getattr(owner, name), iter(range(1000))

    def interrupted(*arguments: Any) -> Any:
        if next(calls) == 3:
            raise KeyboardInterrupt
        return real(*arguments)

    setattr(owner, name, interrupted)
    prompts: list[Any] = [{"prompt_token_ids": list(case.prompt)}, [5, 6, 7]]
    with pytest.raises(KeyboardInterrupt):
        llm.generate(prompts, greedy(case.new_tokens), use_tqdm=False)
    engine.check()
    for _ in range(2):
        outputs = llm.generate(prompts[:1], greedy(case.new_tokens), use_tqdm=False)
        assert outputs[0].outputs[0].token_ids == reference("llama")[case]
    assert_nothing_left(llm)
    llm.close()


def test_a_model_whose_attention_was_changed_is_noticed() -> None:
    """It computed without the cache, and gave other tokens without a word."""
    with make_llm("llama") as llm:
        llm.model.set_attn_implementation("sdpa")
        (output,) = llm.generate([[3, 4, 5]], greedy(3), use_tqdm=False)
        assert "make a new LLM" in str(output.outputs[0].error)


@pytest.mark.parametrize("kind", [vattn.DriverError, vattn.OutOfPages])
@pytest.mark.parametrize("call", ["save", "restore"])
def test_a_failed_swap_is_computed_again(call: str, kind: Any) -> None:
    """The request was lost, and its slot with it."""
    engine = make_engine(pages=40, swap_space=0.001, enable_prefix_caching=False)
    real = getattr(engine.cache, call)
    failed: list[str] = []

    def fail(*arguments: Any) -> None:
        if len(failed) < 2:
            failed.append(call)
            error = kind("copy failed")
            error.fatal = False
            raise error
        real(*arguments)

    setattr(engine.cache, call, fail)
    requests = [start(engine, prompt(60, seed), 120, f"r{seed}") for seed in range(6)]
    drive(engine, *requests)
    assert len(failed) == 2
    finish(engine)


def test_who_waits_for_a_prefix_preempts_nobody() -> None:
    engine = make_engine(scheduling_policy="priority", max_num_batched_tokens=64)
    running = [start(engine, prompt(20, s), 60, f"bg{s}", priority=5) for s in range(4)]
    for _ in range(3):
        engine.step()
    low = start(engine, prompt(190, 9), 10, "low", priority=4)
    engine.step()
    high = start(engine, [*prompt(190, 9), 1], 10, "high", priority=0)
    drive(engine, low, high, *running)
    assert engine.stats().num_preemptions == 0
    assert high.cached >= 190 - 64
    finish(engine)


def test_a_request_that_cannot_be_added_fails_alone() -> None:
    """Everything after it in the queue was lost."""
    engine = make_engine()
    first = start(engine, prompt(10), 5, "same")
    again = start(engine, prompt(10, 1), 5, "same")
    last = start(engine, prompt(10, 2), 5, "other")
    drive(engine, first, last)
    assert again.finish_reason == "error"
    assert "is in use" in str(again.error)
    finish(engine)


def test_a_tokenizer_that_cannot_decode_fails_its_request_alone() -> None:
    class Broken:
        """Knows the first hundred tokens."""

        is_fast = False
        all_special_ids: tuple[int, ...] = ()

        def encode(self, text: str) -> list[int]:
            return [3]

        def decode(self, ids: list[int], **options: Any) -> str:
            if any(token >= 50 for token in ids):
                raise IndexError("piece id is out of range")
            return "x" * len(ids)

        def convert_ids_to_tokens(self, ids: Any) -> Any:
            return ["x"] * len(ids)

    with make_llm("llama", skip_tokenizer_init=False, tokenizer=Broken()) as llm:
        cases = [Case((3, 4, 5), 20), Case((6, 7), 20)]
        params = [greedy(20, stop="never"), SamplingParams(max_tokens=5, detokenize=False)]
        outputs = llm.generate([list(c.prompt) for c in cases], params, use_tqdm=False)
        assert "cannot decode" in str(outputs[0].outputs[0].error)
        assert outputs[1].outputs[0].error is None
        assert len(outputs[1].outputs[0].token_ids) == 5


def test_other_users_of_a_pool_are_not_this_ones_fault() -> None:
    """A lowered budget failed the only request of one engine, though another held the pages."""
    ours = make_engine(pages=100, enable_prefix_caching=False)
    other = vattn.KVCache(
        ours.cache.specs, max_seqs=2, max_tokens=512, pool=ours.cache.pool, order="token"
    )
    request = start(ours, prompt(60), 100)
    for _ in range(3):
        ours.step()
    slot = other.open()
    other.ensure(slot, 500)
    ours.memory.set_budget(30 * 4096)
    for _ in range(200):
        ours.step()
    assert not request.finished
    other.release(slot)
    drive(ours, request)
    other.close()
    finish(ours)


def test_a_stop_string_at_the_last_token_is_counted_as_a_stop() -> None:
    from tests.engine_cases import EMBEDDED_PATH

    with vattn.LLM(str(EMBEDDED_PATH), dtype="float32", device="cpu", page_bytes=4096) as llm:
        text = "A transaction is a group of statements"
        whole = llm.generate(text, greedy(8), use_tqdm=False)[0].outputs[0]
        stop = whole.text[-3:]
        output = llm.generate(text, greedy(8, stop=stop), use_tqdm=False)[0].outputs[0]
        assert output.finish_reason == "stop"
        finished = llm.stats().finished
        assert (finished["length"], finished["stop"]) == (1, 1)


def test_the_samples_of_a_prompt_are_aborted_by_its_name() -> None:
    engine = make_engine()
    params = SamplingParams(n=3, temperature=0, max_tokens=50, detokenize=False)
    samples = engine.make_requests("z", prompt(30), params)
    for sample in samples:
        engine.add(sample)
    engine.step()
    engine.abort("z")
    engine.step()
    assert [sample.finish_reason for sample in samples] == ["abort"] * 3
    assert not engine._inbox._samples
    finish(engine)


@pytest.mark.parametrize("how", ["abort", "preempt"])
def test_a_prompt_without_numbers_that_ends_half_way_spoils_nobody(how: str) -> None:
    """What it had computed counted as numbers, and whoever took its pages failed."""
    llm = make_llm(
        max_num_seqs=2,
        kv_cache_memory_bytes="400KiB",
        strict=False,  # where memory that is not mapped faults, nobody reads beyond another's end
        max_num_batched_tokens=16,
        async_scheduling=False,
    )
    engine: Any = llm.engine
    with torch.no_grad():
        llm.model.get_input_embeddings().weight[95] = float("nan")
    bad = [7] * 100
    bad[5] = 95
    request = start(engine, bad, 4, "bad")
    for _ in range(3):
        engine.step()
    assert not request.output_ids
    if how == "abort":
        engine.abort("bad")
    else:
        engine.memory.preempt(request)  # gives its pages to others, and never gets to its end
        engine.memory.admit(request)
        engine.abort("bad")
    while engine.has_unfinished:
        engine.step()
    rng = random.Random(1)
    good = [[rng.randrange(3, 90) for _ in range(n)] for n in (9, 21, 40, 13, 55, 60, 35, 11)]
    outputs = llm.generate(
        [{"prompt_token_ids": ids} for ids in good], [greedy(12)] * len(good), use_tqdm=False
    )
    assert [output.outputs[0].error for output in outputs] == [None] * len(good)
    assert_nothing_left(llm)
    llm.close()
