"""What callers of `vattn.LLM` may do and get wrong: nesting, types, failures, time, closing."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GenerationConfig

import vattn
from tests.engine_cases import EMBEDDED_PATH, assert_nothing_left, fresh_model, greedy, make_llm
from vattn.engine.config import EngineConfig
from vattn.hf.model import load_model
from vattn.outputs import RequestOutput
from vattn.sampling_params import SamplingParams

A, B, C = [5, 6, 7], [9, 8], [11, 12, 13, 14]


@pytest.fixture(scope="module")
def llm() -> Iterator[vattn.LLM]:
    """Shared by tests that leave nothing running on it."""
    with make_llm(max_model_len=128, max_num_seqs=8) as llm:
        yield llm
        assert_nothing_left(llm)


def tokens_of(llm: vattn.LLM, prompt: list[int], new: int) -> list[int]:
    (output,) = llm.generate(prompt, greedy(new), use_tqdm=False)
    return output.outputs[0].token_ids


def error_of(llm: vattn.LLM, prompt: Any, params: Any = None) -> str:
    """Of a prompt between two good ones, which are not affected."""
    each = [greedy(2), greedy(2) if params is None else params, greedy(2)]
    prompts: list[Any] = [A, prompt, A]
    outputs = llm.generate(prompts, each, use_tqdm=False)
    assert [o.outputs[0].finish_reason for o in outputs] == ["length", "error", "length"]
    return str(outputs[1].outputs[0].error)


def in_time(stream: Iterator[RequestOutput], most: int = 200) -> Iterator[RequestOutput]:
    """Outputs of a stream that must end."""
    for count, output in enumerate(stream):
        assert count < most
        yield output


# Calls inside of others ---------------------------------------------------------------------------


def test_generate_inside_a_stream(llm: vattn.LLM) -> None:
    whole = [tokens_of(llm, prompt, 12) for prompt in (A, B)]
    inner = tokens_of(llm, C, 30)
    last: dict[str, RequestOutput] = {}
    seen: list[int] = []
    for output in in_time(llm.stream([A, B], greedy(12))):
        if not last:
            assert tokens_of(llm, C, 30) == inner  # the requests of the stream end meanwhile
        last[output.request_id] = output
        seen.append(len(output.outputs[0].token_ids))
    assert [output.outputs[0].token_ids for output in last.values()] == whole
    assert all(output.finished for output in last.values())
    assert sorted(seen) == [1, 12, 12]


@pytest.mark.parametrize("kind", list(vattn.RequestOutputKind))
def test_streams_side_by_side(llm: vattn.LLM, kind: vattn.RequestOutputKind) -> None:
    wanted = [tokens_of(llm, prompt, 9) for prompt in (A, B)]
    streams = [llm.stream(prompt, greedy(9, output_kind=kind)) for prompt in (A, B)]
    got: list[list[int]] = [[], []]
    for pair in zip(*map(in_time, streams), strict=False):
        for tokens, output in zip(got, pair, strict=True):
            new = output.outputs[0].token_ids
            assert new
            tokens[:] = tokens + new if kind is vattn.RequestOutputKind.DELTA else new
    for tokens, stream in zip(got, streams, strict=True):  # zip leaves the longer one unread
        for output in in_time(stream):
            new = output.outputs[0].token_ids
            tokens[:] = tokens + new if kind is vattn.RequestOutputKind.DELTA else new
    assert got == wanted


def test_a_stream_tells_what_another_brought_before_it_makes_a_step(llm: vattn.LLM) -> None:
    one, other = llm.stream(A, greedy(9)), llm.stream(B, greedy(9))
    next(one)
    next(other)
    steps = llm.stats().num_steps
    assert len(next(one).outputs[0].token_ids) == 2
    assert llm.stats().num_steps == steps
    assert len(next(one).outputs[0].token_ids) == 3
    assert llm.stats().num_steps == steps + 1
    assert len(list(in_time(one))) == 6
    assert [len(output.outputs[0].token_ids) for output in in_time(other)] == [8, 9]


def test_a_stream_tells_what_steps_of_the_engine_did(llm: vattn.LLM) -> None:
    stream = llm.stream([A, B], greedy(10))
    next(stream)
    while llm.engine.has_unfinished:
        llm.engine.step()
    rest = list(in_time(stream))
    assert {output.request_id for output in rest if output.finished} == {
        output.request_id for output in rest
    }
    assert all(len(output.outputs[0].token_ids) == 10 for output in rest)


def test_samples_of_one_prompt_are_told_once_each(llm: vattn.LLM) -> None:
    delta = vattn.RequestOutputKind.DELTA
    params = SamplingParams(n=3, seed=1, max_tokens=6, ignore_eos=True, output_kind=delta)
    (whole,) = llm.generate(A, params, use_tqdm=False)
    got: dict[int, list[int]] = {0: [], 1: [], 2: []}
    for output in in_time(llm.stream(A, params)):
        for sample in output.outputs:
            got[sample.index] += sample.token_ids
        tokens_of(llm, B, 2)
    assert list(got.values()) == [sample.token_ids for sample in whole.outputs]


# Prompts ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompts", "wanted"),
    [
        ([torch.tensor([4]), torch.tensor([5])], [[4], [5]]),
        ([np.array([4]), np.array([5, 6])], [[4], [5, 6]]),
        (torch.tensor([[4, 5], [6, 7]]), [[4, 5], [6, 7]]),
        (np.array([[4], [6]]), [[4], [6]]),
        (torch.tensor([4, 5]), [[4, 5]]),
        (np.array([4, 5], np.int32), [[4, 5]]),
        ([torch.tensor(4), torch.tensor(5)], [[4, 5]]),
        (list(np.array([4, 5])), [[4, 5]]),
        ([{"prompt_token_ids": np.array([4, 5])}], [[4, 5]]),
        ({"prompt": None, "prompt_token_ids": [4], "cache_salt": None}, [[4]]),
        ({"prompt": None, "prompt_token_ids": (4,), "priority": None}, [[4]]),
    ],
)
def test_arrays_are_prompts_of_plain_integers(
    llm: vattn.LLM, prompts: Any, wanted: list[list[int]]
) -> None:
    outputs = llm.generate(prompts, greedy(2), use_tqdm=False)
    assert [output.outputs[0].error for output in outputs] == [None] * len(wanted)
    assert [output.prompt_token_ids for output in outputs] == wanted
    assert {type(t) for output in outputs for t in output.prompt_token_ids} == {int}
    json.dumps([output.prompt_token_ids for output in outputs])


@pytest.mark.parametrize(
    ("prompt", "reason"),
    [
        (b"text", "b'text' is no prompt"),
        ({"prompt_token_ids": b"text"}, "b'text' is no prompt"),
        ({"prompt_token_ids": "45"}, "prompt_token_ids='45' is text; give it as prompt"),
        ({"prompt": [4, 5]}, "give token ids as prompt_token_ids"),
        ({"prompt": None}, "one of prompt and prompt_token_ids"),
        ({"prompt_token_ids": [4], "cache_salt": 0}, "cache_salt=0"),
        ({"prompt_token_ids": [4], "priority": "high"}, "priority='high' must be a whole number"),
        ({3: [4]}, "a prompt has no ['3']"),
        ([4.0, 5.0], "4.0 is no token id"),
        ([4, math.inf], "inf is no token id"),
        ([4, "5"], "'5' is no token id"),
        ([True, False], "True is no token id"),
        (torch.tensor([4.0]), "4.0 is no token id"),
        (torch.tensor([[4, 5]]), "shape (1, 2)"),
        (torch.tensor(4), "shape ()"),
        (np.array([], np.int64), "empty"),
    ],
)
def test_what_is_no_prompt_is_told(llm: vattn.LLM, prompt: Any, reason: str) -> None:
    assert reason in error_of(llm, prompt)
    assert error_of(llm, prompt).startswith("prompt 1: ")


@pytest.mark.parametrize("prompts", [None, 7, np.array(7)])
def test_what_is_no_list_of_prompts(llm: vattn.LLM, prompts: Any) -> None:
    with pytest.raises(ValueError, match="must be a prompt, or many"):
        llm.generate(prompts)


@pytest.mark.parametrize("params", [{}, 0, "greedy", {"temperature": 0}])
def test_wrong_parameters_are_not_the_defaults(llm: vattn.LLM, params: Any) -> None:
    assert "is not a vattn.SamplingParams" in error_of(llm, B, params)
    (output,) = llm.generate(A, params, use_tqdm=False)
    assert "is not a vattn.SamplingParams" in str(output.outputs[0].error)


def test_a_failing_tokenizer_is_an_error_of_its_prompt(llm: vattn.LLM) -> None:
    class Tokenizer:
        def encode(self, text: str) -> list[int]:
            raise {"bad": OverflowError, "stop": KeyboardInterrupt}[text](f"in {text}")

    stopped: list[Any] = [A, "stop", A]
    llm.tokenizer = Tokenizer()
    try:
        assert error_of(llm, "bad") == "prompt 1: OverflowError: in bad"
        with pytest.raises(KeyboardInterrupt):
            llm.generate(stopped, greedy(50), use_tqdm=False)
    finally:
        llm.tokenizer = None
    assert not llm.engine.has_unfinished


# Settings -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"enable_prefix_caching": "no"}, "enable_prefix_caching='no' must be True or False"),
        ({"enable_chunked_prefill": None}, "enable_chunked_prefill=None must be True or False"),
        ({"prepare_ahead": "off"}, "prepare_ahead='off' must be True or False"),
        ({"strict": 1}, "strict=1 must be True or False"),
        ({"seed": 1.5}, "seed=1.5 must be a whole number"),
        ({"seed": True}, "seed=True must be a whole number"),
        ({"seed": -1}, "seed=-1 must be at least 0"),
        ({"max_logprobs": -2}, "max_logprobs=-2 must be a whole number, 0 or more, or -1"),
        ({"max_logprobs": True}, "max_logprobs=True"),
        ({"max_logprobs": "20"}, "max_logprobs='20'"),
        ({"max_logprobs": 1.5}, "max_logprobs=1.5"),
        ({"swap_space": True}, "swap_space=True must be a number of GiB"),
        ({"swap_space": "4GiB"}, "swap_space='4GiB' must be a number of GiB without a unit"),
        ({"swap_space": math.nan}, "swap_space=nan must be"),
        ({"gpu_memory_utilization": "0.9"}, "gpu_memory_utilization='0.9' must be a number"),
        ({"gpu_memory_utilization": True}, "gpu_memory_utilization=True must be a number"),
        ({"gpu_memory_utilization": 1.1}, "at most 1"),
        ({"attention_backend": 3}, "attention_backend=3 must be the name"),
        ({"scheduling_policy": []}, "scheduling_policy="),
    ],
)
def test_settings_of_another_type(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        EngineConfig(**options)


def test_settings_in_other_forms() -> None:
    numpy: Any = np
    config = EngineConfig(seed=None, max_num_seqs=numpy.int64(3), swap_space=numpy.float32(0.5))
    assert (config.seed, config.max_num_seqs, config.swap_space) == (0, 3, 0.5)
    assert type(config.max_num_seqs) is int
    assert EngineConfig(seed=numpy.int64(5)).seed == 5


def test_a_pool_has_its_own_budget() -> None:
    with pytest.raises(ValueError, match=r"gpu_memory_utilization=0.5 .* pool"):
        vattn.LLM(str(EMBEDDED_PATH), pool=vattn.PagePool("cpu"), gpu_memory_utilization=0.5)


# Models -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"skip_tokenizer_init": False}, "tokenizer"),
        ({"max_model_len": 10**6}, "max_model_len=1000000"),
        ({"attention_backend": "no-such"}, "no-such"),
    ],
)
def test_a_failed_engine_gives_the_model_back(options: dict[str, Any], match: str) -> None:
    model = fresh_model("llama")
    model.config._name_or_path = ""
    before = model.config._attn_implementation
    ids = torch.tensor([A])
    wanted = model(ids).logits
    with pytest.raises(ValueError, match=match):
        vattn.LLM(model, **{"device": "cpu", "skip_tokenizer_init": True, **options})
    assert model.config._attn_implementation == before
    torch.testing.assert_close(model(ids).logits, wanted)


def test_what_a_generation_config_asks_for_in_vain_is_told() -> None:
    model = fresh_model("llama")
    generation: Any = GenerationConfig
    model.generation_config = generation(no_repeat_ngram_size=3, typical_p=0.9, top_k=7)
    loaded = load_model(model, device="cpu")
    assert loaded.generation_ignored == ("no_repeat_ngram_size=3", "typical_p=0.9")
    with make_llm(max_model_len=64) as llm:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            llm.get_default_sampling_params()
        object.__setattr__(llm.engine.loaded, "generation_ignored", loaded.generation_ignored)
        with pytest.warns(UserWarning, match=r"asks for no_repeat_ngram_size=3, typical_p=0.9"):
            llm.generate([A], use_tqdm=False)
        llm.generate([A], greedy(1), use_tqdm=False)  # an error if it warned


def test_what_asks_for_nothing_is_not_told() -> None:
    model = fresh_model("llama")
    generation: Any = GenerationConfig
    model.generation_config = generation(
        repetition_penalty=1.0, no_repeat_ngram_size=0, num_beams=1, do_sample=False
    )
    model.generation_config.typical_p = 0.9  # of no use to greedy text
    assert load_model(model, device="cpu").generation_ignored == ()


# Time ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("timeout_s", [0, -1, math.inf, math.nan, "1", True])
def test_a_timeout_is_a_finite_positive_number(llm: vattn.LLM, timeout_s: Any) -> None:
    with pytest.raises(ValueError, match="timeout_s="):
        llm.generate(A, greedy(1), timeout_s=timeout_s)
    with pytest.raises(ValueError, match="timeout_s="):
        list(llm.stream(A, greedy(1), timeout_s=timeout_s))
    assert not llm.engine.has_unfinished


def test_a_timeout_ends_requests_with_what_they_have(llm: vattn.LLM) -> None:
    outputs = llm.generate([A, B], greedy(100), use_tqdm=False, timeout_s=0.01)
    assert [o.outputs[0].finish_reason for o in outputs] == ["deadline"] * 2
    *_, last = in_time(llm.stream(A, greedy(100), timeout_s=0.01))
    assert last.finished
    assert last.outputs[0].finish_reason == "deadline"
    assert len(last.outputs[0].token_ids) < 100
    (output,) = llm.generate(A, greedy(3), use_tqdm=False, timeout_s=100)
    assert output.outputs[0].finish_reason == "length"


def test_a_closed_one_says_so() -> None:
    llm = make_llm(max_model_len=64)
    stream = llm.stream(A, greedy(20))
    next(stream)
    llm.close()
    llm.close()
    calls: list[Any] = [
        lambda: next(stream),
        lambda: llm.generate(A),
        lambda: llm.stream(A),
        lambda: llm.chat([{"role": "user", "content": "a"}]),
        llm.stats,
        llm.memory_map,
        llm.reset_prefix_cache,
        lambda: llm.set_budget("1MiB"),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="this LLM was closed"):
            call()
