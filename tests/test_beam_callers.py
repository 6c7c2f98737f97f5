"""What callers of ``LLM.beam_search`` may get wrong, ends from outside, failures, and text."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import vattn
from tests.beam_cases import assert_equal, beam_llm, ids, prompts, run, search
from tests.engine_cases import EMBEDDED_PATH, assert_nothing_left
from tests.models import one_thread
from vattn.sampling_params import SamplingParams

FEW = (33, 9, 80)  # lengths of prompts, where all would only take longer

# Bad input, and searches that are cut short -------------------------------------------------------


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (search(width=33), "beam_width=33 is more than max_num_seqs=32"),
        (search(length_penalty=500.0), "length_penalty=500 makes scores of 20 tokens too large"),
        (SamplingParams(), "is not a vattn.BeamSearchParams"),
        ({"beam_width": 2}, "is not a vattn.BeamSearchParams"),
    ],
)
def test_bad_parameters_are_told_of_that_prompt_alone(params: Any, message: str) -> None:
    llm = beam_llm()
    chosen: list[Any] = ids([prompt for prompt in prompts() if len(prompt) in FEW])
    with one_thread():
        outputs = llm.beam_search(chosen, [search(), params, search()])
    assert_equal(outputs[:1], "llama", search(), (33,))
    assert_equal(outputs[2:], "llama", search(), (80,))
    assert (outputs[1].finish_reason, outputs[1].sequences) == ("error", [])
    assert outputs[1].error is not None
    assert message in outputs[1].error
    assert_nothing_left(llm)


def test_a_width_beyond_the_vocabulary_is_refused() -> None:
    llm = beam_llm(max_num_seqs=96)
    with one_thread():
        wide, widest = llm.beam_search(ids([[3], [3]]), [search(91), search(90, 2)])
    assert wide.error == (
        "prompt 0: beam_width=91 is more than the 90 tokens that a sequence of this model can "
        "begin with; lower it"
    )
    assert len(widest.sequences) == 90
    assert_nothing_left(llm)


def test_bad_prompts_are_told_of_that_prompt_alone() -> None:
    llm = beam_llm()
    bad: list[Any] = [[], list(range(3, 36)), "text", [5, 1000]]
    with one_thread():
        outputs = llm.beam_search(bad, search(2, 3))
    errors = [output.error for output in outputs]
    assert [error is None for error in errors] == [False, True, False, False]
    for error, text in zip(errors, ("empty", "", "needs a tokenizer", "1000"), strict=True):
        assert error is None or text in error
    with pytest.raises(ValueError, match="2 params for 1 prompts"):
        llm.beam_search([[3]], [search(), search()])
    with pytest.raises(ValueError, match="timeout_s=-1"):
        llm.beam_search([[3]], search(), timeout_s=-1)
    llm.close()
    with pytest.raises(ValueError, match="was closed"):
        llm.beam_search([[3]], search())


def test_a_search_that_never_fits_fails_as_a_whole() -> None:
    """The prompt fits, and so do some beams: the others follow it, and it takes none with it."""
    llm = beam_llm(kv_cache_memory_bytes="240KiB", max_model_len=200)
    chosen = [prompt for prompt in prompts() if len(prompt) in (33, 9)]
    with one_thread():
        outputs = llm.beam_search(
            ids([chosen[0], list(range(2, 82)), chosen[1]]), [search(), search(24, 60), search()]
        )
    assert_equal([outputs[0], outputs[2]], "llama", search(), (33, 9))
    assert outputs[1].error is not None
    assert "out of pages: 24 beams of" in outputs[1].error
    assert "lower beam_width or max_tokens" in outputs[1].error
    assert outputs[1].sequences == []
    assert_nothing_left(llm)


def interfere(llm: Any, steps: int, action: Any) -> None:
    """Does something before a step."""
    step, made = llm.engine.step, 0

    def stepping() -> list[Any]:
        nonlocal made
        made += 1
        if made == steps:
            action()
        found: list[Any] = step()
        return found

    llm.engine.step = stepping


@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize("reason", ["abort", "deadline"])
def test_a_search_that_is_cut_short_tells_what_it_has(reason: str, is_async: bool) -> None:
    llm = beam_llm(async_scheduling=is_async)
    if reason == "abort":
        interfere(llm, 11, lambda: llm.engine.abort("0-1"))
    else:
        late = [0.0]
        llm.engine.scheduler._clock = lambda: late[0]
        interfere(llm, 11, lambda: late.__setitem__(0, float("inf")))
    first, second = run(llm, search(ignore_eos=True), (33, 40), timeout_s=1e9)
    assert second.finish_reason == reason
    assert len(second.sequences) == 4
    lengths = {len(each.token_ids) for each in second.sequences}
    assert lengths == {5 if is_async else 10}
    assert {each.finish_reason for each in second.sequences} == {reason}
    if reason == "abort":
        assert_equal([first], "llama", search(ignore_eos=True), (33,))
    assert_nothing_left(llm)


@pytest.mark.parametrize("is_async", [False, True])
def test_an_interrupted_search_leaves_nothing(is_async: bool) -> None:
    llm = beam_llm(async_scheduling=is_async)
    interfere(llm, 5, lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run(llm, search())
    assert llm.engine.has_unfinished
    assert_equal(run(llm, search(), FEW), "llama", search(), FEW)
    assert_nothing_left(llm)


def test_a_beam_without_a_distribution_ends_its_search_alone() -> None:
    llm = beam_llm()
    broken: list[int] = []
    forward = llm.engine.runner.run

    def spoiled(batch: Any) -> Any:
        logits = forward(batch)
        beams = [r for r in llm.engine.scheduler._running if r.id.startswith("0-1")]
        if len(beams) == 4 and beams[2].slot in batch.sample_slots.tolist():
            broken.append(beams[2].slot)
            with torch.inference_mode():
                logits[batch.sample_slots.tolist().index(beams[2].slot)] = float("nan")
        return logits

    llm.engine.runner.run = spoiled  # type: ignore[method-assign]
    outputs = run(llm, search(), FEW)
    assert len(broken) == 1
    assert outputs[1].finish_reason == "error"
    assert "logits are not finite" in (outputs[1].error or "")
    assert_equal([outputs[0], outputs[2]], "llama", search(), (33, 80))
    assert_nothing_left(llm)


# Text ---------------------------------------------------------------------------------------------


def test_text_is_that_of_the_tokens() -> None:
    with vattn.LLM(str(EMBEDDED_PATH), dtype="float32", device="cpu") as llm:
        tokenizer = llm.get_tokenizer()
        text = "The memory of a sequence"
        params = vattn.BeamSearchParams(beam_width=3, max_tokens=12)
        both: list[Any] = [text, {"prompt_token_ids": tokenizer.encode(text)}]
        shown, whole = llm.beam_search(both, params, use_tqdm=True)
        assert (shown.prompt, whole.prompt) == (text, None)
        assert shown.prompt_token_ids == whole.prompt_token_ids == tokenizer.encode(text)
        assert [s.token_ids for s in shown.sequences] == [s.token_ids for s in whole.sequences]
        for each in shown.sequences:
            assert each.text == tokenizer.decode(each.token_ids, skip_special_tokens=True)
            assert each.text


def test_an_end_is_part_of_the_text_if_it_is_wanted() -> None:
    with vattn.LLM(str(EMBEDDED_PATH), dtype="float32", device="cpu") as llm:
        tokenizer = llm.get_tokenizer()
        params = vattn.BeamSearchParams(beam_width=3, max_tokens=12, ignore_eos=True)
        (first,) = llm.beam_search("The memory", params)
        ends = frozenset(token for found in first.sequences for token in found.token_ids[4:])
        object.__setattr__(llm.engine.loaded, "eos_token_ids", ends)
        without, included = llm.beam_search(
            ["The memory", "The memory"],
            [
                vattn.BeamSearchParams(
                    beam_width=3, max_tokens=12, include_stop_str_in_output=included
                )
                for included in (False, True)
            ],
        )
        ended = 0
        for bare, full in zip(without.sequences, included.sequences, strict=True):
            assert bare.token_ids == full.token_ids
            is_end = bare.finish_reason == "stop"
            assert full.text == bare.text + is_end * tokenizer.decode(bare.token_ids[-1:])
            ended += is_end
        assert ended > 0
