"""Sampling parameters and requests: what is refused, with which words, and what is taken."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from vattn.request import FinishReason, Request, Status
from vattn.sampling_params import BeamSearchParams, SamplingParams, StructuredOutputsParams

BAD: list[tuple[dict[str, Any], str]] = [
    ({"n": 0}, "n=0 must be at least 1"),
    ({"n": 1.5}, "n=1.5 must be a whole number"),
    ({"n": True}, "n=True must be a whole number"),
    ({"n": 5000}, "at most 4096"),
    ({"n": None}, "n=None"),
    ({"temperature": -0.1}, "temperature=-0.1 must be at least 0"),
    ({"temperature": math.inf}, "temperature=inf"),
    ({"temperature": math.nan}, "temperature=nan"),
    ({"temperature": "1"}, "temperature='1' must be a number"),
    ({"temperature": True}, "temperature=True must be a number"),
    ({"temperature": None}, "temperature=None"),
    ({"top_p": 0}, "top_p=0"),
    ({"top_p": 1.01}, "top_p=1.01 must be at least 0 and at most 1"),
    ({"top_p": -0.2}, "top_p=-0.2"),
    ({"top_p": math.nan}, "top_p=nan"),
    ({"top_k": -2}, "top_k=-2 must be at least -1"),
    ({"top_k": 2.0}, "top_k=2.0 must be a whole number"),
    ({"min_p": -0.1}, "min_p=-0.1"),
    ({"min_p": 1.5}, "min_p=1.5"),
    ({"seed": -1}, "seed=-1 must be at least 0"),
    ({"seed": 2**63}, f"seed={2**63}"),
    ({"seed": 0.5}, "seed=0.5"),
    ({"stop": ""}, "stop='' must be non-empty strings"),
    ({"stop": ["a", ""]}, "non-empty strings"),
    ({"stop": ["a", 3]}, "non-empty strings"),
    ({"stop": 3}, "stop=3 must be"),
    ({"stop": "a", "detokenize": False}, "stop strings need text"),
    ({"stop_token_ids": [-1]}, r"stop_token_ids=\[-1\] must be token ids"),
    ({"stop_token_ids": [1.5]}, r"stop_token_ids=\[1.5\]"),
    ({"stop_token_ids": [True]}, r"stop_token_ids=\[True\]"),
    ({"stop_token_ids": ["a"]}, r"stop_token_ids=\['a'\]"),
    ({"stop_token_ids": 7}, "stop_token_ids=7 must be"),
    ({"max_tokens": 0}, "max_tokens=0 must be at least 1"),
    ({"max_tokens": 1.0}, "max_tokens=1.0"),
    ({"min_tokens": -1}, "min_tokens=-1"),
    ({"min_tokens": 5, "max_tokens": 4}, "min_tokens=5 is more than max_tokens=4"),
    ({"logprobs": -2}, "logprobs=-2 must be at least -1 and at most 1024"),
    ({"prompt_logprobs": 1025}, "prompt_logprobs=1025 must be at least -1 and at most 1024"),
    ({"prompt_logprobs": 0.5}, "prompt_logprobs=0.5"),
    ({"presence_penalty": 2.1}, "presence_penalty=2.1 must be at least -2 and at most 2"),
    ({"frequency_penalty": -2.1}, "frequency_penalty=-2.1 must be at least -2"),
    ({"frequency_penalty": math.nan}, "frequency_penalty=nan"),
    ({"repetition_penalty": 0}, "repetition_penalty=0 divides by nothing"),
    ({"repetition_penalty": -1}, "repetition_penalty=-1 must be at least 0 and at most 1e.20"),
    ({"repetition_penalty": 1e-46}, "repetition_penalty=1e-46 must be at least 1e-20"),
    ({"repetition_penalty": 1e39}, "repetition_penalty=1e.39 must be .* at most 1e.20"),
    ({"repetition_penalty": math.inf}, "repetition_penalty=inf"),
    ({"bad_words": ["a", ""]}, "bad_words=.* must be non-empty strings"),
    ({"bad_words": [7]}, "bad_words=.* must be non-empty strings"),
    ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens=0 leaves no prompt"),
    ({"truncate_prompt_tokens": -2}, "truncate_prompt_tokens=-2 must be at least -1"),
    ({"truncate_prompt_tokens": 2.0}, "truncate_prompt_tokens=2.0"),
    ({"output_kind": "delta"}, "output_kind='delta' must be a RequestOutputKind: CUMULATIVE"),
    ({"logit_bias": [3]}, "logit_bias=.* must map token ids to numbers"),
    ({"logit_bias": {-1: 1.0}}, "logit_bias has -1, which is no token id"),
    ({"logit_bias": {"a": 1.0}}, "logit_bias has 'a', which is no token id"),
    ({"logit_bias": {True: 1.0}}, "logit_bias has True, which is no token id"),
    ({"logit_bias": {3: "much"}}, "logit_bias of token 3 is 'much', which is no number"),
    ({"logit_bias": {3: math.nan}}, "logit_bias of token 3 is nan, which is no number"),
    ({"logit_bias": {3: 1.0, "3": 2.0}}, "logit_bias has token 3 twice"),
    ({"allowed_token_ids": []}, "allowed_token_ids is empty"),
    ({"allowed_token_ids": [-1]}, "allowed_token_ids=.* must be token ids"),
    (
        {"allowed_token_ids": [4], "stop_token_ids": [4, 5], "min_tokens": 1},
        "all of allowed_token_ids=.* are stop_token_ids",
    ),
    ({"structured_outputs": {"regex": "a"}}, "must be a StructuredOutputsParams"),
    ({"logprobs": 1025}, "at most 1024"),
    ({"logprobs": True}, "logprobs=True"),
    ({"ignore_eos": 1}, "ignore_eos=1 must be True or False"),
    ({"detokenize": None}, "detokenize=None"),
    ({"skip_special_tokens": "yes"}, "skip_special_tokens='yes'"),
    ({"include_stop_str_in_output": 0}, "include_stop_str_in_output=0"),
]


@pytest.mark.parametrize(("given", "message"), BAD, ids=[str(given) for given, _ in BAD])
def test_bad_values_are_named(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamplingParams(**given)


def test_unknown_options_and_positions_are_errors() -> None:
    with pytest.raises(TypeError, match="presence_penalti"):
        SamplingParams(presence_penalti=1.0)  # type: ignore[call-arg]
    with pytest.raises(TypeError):
        SamplingParams(2)  # type: ignore[call-arg]


def test_defaults_are_vllms() -> None:
    params = SamplingParams()
    assert (params.n, params.temperature, params.top_p, params.top_k) == (1, 1.0, 1.0, 0)
    assert (params.min_p, params.seed, params.max_tokens, params.min_tokens) == (0.0, None, 16, 0)
    assert (params.stop_strings, params.stop_ids, params.logprobs) == ((), (), None)
    assert not params.greedy


def test_numpy_numbers_are_numbers() -> None:
    params = SamplingParams(
        n=np.int64(2),  # type: ignore[arg-type]
        temperature=np.float32(0.5),  # type: ignore[arg-type]
        top_p=np.float64(0.25),
        top_k=np.int32(3),  # type: ignore[arg-type]
        min_p=np.int64(0),  # type: ignore[arg-type]
        seed=np.uint64(9),  # type: ignore[arg-type]
        max_tokens=np.int16(7),  # type: ignore[arg-type]
        min_tokens=np.int8(1),  # type: ignore[arg-type]
        logprobs=np.int64(4),  # type: ignore[arg-type]
        stop_token_ids=np.array([3, 4]),  # type: ignore[arg-type]
    )
    assert params == SamplingParams(
        n=2,
        temperature=0.5,
        top_p=0.25,
        top_k=3,
        seed=9,
        max_tokens=7,
        min_tokens=1,
        logprobs=4,
        stop_token_ids=[3, 4],
    )
    for name in ("n", "top_k", "seed", "max_tokens", "min_tokens", "logprobs"):
        assert type(getattr(params, name)) is int, name
    for name in ("temperature", "top_p", "min_p"):
        assert type(getattr(params, name)) is float, name
    assert all(type(token) is int for token in params.stop_ids)


def test_stop_may_be_one_or_many() -> None:
    assert SamplingParams(stop="ab").stop_strings == ("ab",)
    assert SamplingParams(stop=["a", "b"]).stop_strings == ("a", "b")
    assert SamplingParams(stop=[]).stop_strings == ()
    assert SamplingParams(stop_token_ids=(5, 6)).stop_ids == (5, 6)


def test_biases_are_numbers_by_token() -> None:
    biases: Any = {"7": 1, np.int64(3): np.float32(-0.5), 4: 1e9, 5: -math.inf}
    params = SamplingParams(logit_bias=biases)
    assert params.logit_bias is not None
    assert params.logit_bias == {7: 1.0, 3: -0.5, 4: 100.0, 5: -100.0}
    assert all(type(token) is int for token in params.logit_bias)
    assert hash(params) == hash(SamplingParams(logit_bias=params.logit_bias))
    assert params != SamplingParams(logit_bias={7: 1.0})


def test_what_penalties_are() -> None:
    assert SamplingParams(presence_penalty=1).has_penalties
    assert SamplingParams(frequency_penalty=-1).has_penalties
    assert SamplingParams(repetition_penalty=0.5).has_penalties
    assert not SamplingParams(repetition_penalty=1, presence_penalty=0).has_penalties


def test_limits_are_allowed() -> None:
    SamplingParams(n=4096, top_p=1, top_k=-1, min_p=1, seed=2**63 - 1, max_tokens=None, logprobs=0)
    SamplingParams(min_tokens=4, max_tokens=4, top_p=1e-9, temperature=1e6)
    SamplingParams(presence_penalty=-2, frequency_penalty=2, repetition_penalty=1e-6)
    SamplingParams(logprobs=-1, prompt_logprobs=-1, truncate_prompt_tokens=-1)
    SamplingParams(allowed_token_ids=[4, 5], stop_token_ids=[4], min_tokens=1)
    assert SamplingParams(min_tokens=100, max_tokens=None).min_tokens == 100


@pytest.mark.parametrize(
    ("given", "greedy"),
    [
        ({"temperature": 0}, True),
        ({"temperature": 1e-6}, True),
        ({"top_k": 1}, True),
        ({"temperature": 1e-3}, False),
        ({"top_k": 2}, False),
    ],
)
def test_greedy(given: dict[str, Any], greedy: bool) -> None:
    assert SamplingParams(**given).greedy is greedy


def test_params_do_not_change() -> None:
    params = SamplingParams(stop=["a"])
    with pytest.raises(AttributeError):
        params.n = 2  # type: ignore[misc]
    assert hash(params) == hash(SamplingParams(stop=["a"]))


# The others ---------------------------------------------------------------------------------------

BAD_BEAMS: list[tuple[dict[str, Any], str]] = [
    ({"beam_width": 0}, "beam_width=0 must be at least 1 and at most 4096"),
    ({"beam_width": 2.0}, "beam_width=2.0 must be a whole number"),
    ({"max_tokens": 0}, "max_tokens=0 must be at least 1"),
    ({"temperature": -1}, "temperature=-1 must be at least 0 and at most 1e.20"),
    ({"temperature": 1e46}, "temperature=1e.46 must be .* at most 1e.20"),
    ({"temperature": 1e-46}, "temperature=1e-46 must be at least 1e-20"),
    ({"length_penalty": math.inf}, "length_penalty=inf must be finite"),
    ({"length_penalty": "1"}, "length_penalty='1' must be a number"),
    ({"early_stopping": 1}, 'early_stopping=1 must be True, False or "never"'),
    ({"early_stopping": "always"}, "early_stopping='always'"),
    ({"ignore_eos": None}, "ignore_eos=None must be True or False"),
    ({"include_stop_str_in_output": 1}, "include_stop_str_in_output=1"),
]


@pytest.mark.parametrize(("given", "message"), BAD_BEAMS, ids=str)
def test_bad_values_of_beams(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BeamSearchParams(**({"beam_width": 2, "max_tokens": 3} | given))


def test_beams_have_defaults_and_no_unknown_options() -> None:
    params = BeamSearchParams(beam_width=4, max_tokens=7)
    assert (params.temperature, params.length_penalty, params.early_stopping) == (0.0, 1.0, False)
    BeamSearchParams(beam_width=4096, max_tokens=1, length_penalty=-2, early_stopping="never")
    for temperature in (0, 1e-20, 1e20):
        BeamSearchParams(beam_width=4, max_tokens=7, temperature=temperature)
    with pytest.raises(TypeError, match="num_beams"):
        BeamSearchParams(beam_width=4, max_tokens=7, num_beams=4)  # type: ignore[call-arg]


BAD_LANGUAGES: list[tuple[dict[str, Any], str]] = [
    ({}, "need one of json, .* and were given none"),
    ({"regex": "a", "choice": ["b"]}, "were given regex, choice"),
    ({"json_object": True, "json": {}}, "were given json, json_object"),
    ({"regex": 7}, "regex=7 must be text"),
    ({"grammar": ["a"]}, "grammar=.* must be text"),
    ({"json_object": 1}, "json_object=1 must be True or False"),
    ({"choice": "yes"}, "choice='yes' must be non-empty strings"),
    ({"choice": []}, "choice=.* must be non-empty strings"),
    ({"choice": ["a", ""]}, "choice=.* must be non-empty strings"),
    ({"json": 7}, "json=7 must be a JSON schema"),
    ({"json": {"a": {1, 2}}}, "is no JSON schema"),
    ({"structural_tag": 7}, "structural_tag must be an object"),
    ({"structural_tag": {1: {2}}}, "is no JSON"),
    ({"regex": "a", "disable_any_whitespace": True}, "are of json and json_object"),
    ({"choice": ["a"], "whitespace_pattern": " "}, "put it into the choice itself"),
    (
        {"json": {}, "disable_any_whitespace": True, "whitespace_pattern": " "},
        "give disable_any_whitespace or whitespace_pattern",
    ),
]


@pytest.mark.parametrize(("given", "message"), BAD_LANGUAGES, ids=str)
def test_bad_languages(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StructuredOutputsParams(**given)


def test_languages_are_made_alike() -> None:
    class Model:
        @staticmethod
        def model_json_schema() -> dict[str, Any]:
            return {"type": "object"}

    schemas: list[Any] = [{"type": "object"}, '{"type": "object"}', Model]
    assert len({StructuredOutputsParams(json=each) for each in schemas}) == 1
    assert StructuredOutputsParams(choice=["a", "b"]).choice == ("a", "b")
    assert SamplingParams(structured_outputs=StructuredOutputsParams(regex="a")).structured_outputs


# Requests -----------------------------------------------------------------------------------------


def test_a_request_derives_the_rest() -> None:
    request = Request("r", [1, 2, 3], SamplingParams(), 8)
    assert (request.tokens, request.uncomputed, request.output_ids) == ([1, 2, 3], 3, [])
    request.tokens += [4, 5]
    request.computed = 4
    assert (request.uncomputed, request.output_ids, request.prompt_ids) == (1, [4, 5], [1, 2, 3])
    assert not request.finished
    request.check()


def test_check_finds_what_is_out_of_order() -> None:
    def broken(**values: Any) -> Request:
        request = Request("r", [1, 2, 3], SamplingParams(), 4)
        for name, value in values.items():
            setattr(request, name, value)
        return request

    for values in (
        {"computed": 4},
        {"computed": -1},
        {"tokens": [1, 2, 3, 4, 5]},
        {"tokens": [1, 2, 4]},
        {"finish_reason": FinishReason.STOP},
        {"status": Status.FINISHED},
    ):
        with pytest.raises(AssertionError):
            broken(**values).check()
