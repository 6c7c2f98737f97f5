"""Sampling parameters and requests: what is refused, with which words, and what is taken."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from vattn.request import FinishReason, Request, Status
from vattn.sampling_params import SamplingParams

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
    ({"logprobs": -1}, "logprobs=-1"),
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


def test_limits_are_allowed() -> None:
    SamplingParams(n=4096, top_p=1, top_k=-1, min_p=1, seed=2**63 - 1, max_tokens=None, logprobs=0)
    SamplingParams(min_tokens=4, max_tokens=4, top_p=1e-9, temperature=1e6)
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
