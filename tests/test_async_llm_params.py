"""Parameters that go to another process and come out as they were."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from vattn.engine_process.params import from_wire, to_wire
from vattn.sampling_params import RequestOutputKind, SamplingParams, StructuredOutputsParams

TOKENS = st.integers(0, 2**31)
WORDS = st.text(min_size=1, max_size=5).filter(lambda text: text.isprintable())
STRUCTURED = st.one_of(
    st.builds(StructuredOutputsParams, choice=st.lists(WORDS, min_size=1, max_size=3)),
    st.builds(StructuredOutputsParams, regex=WORDS),
    st.builds(StructuredOutputsParams, grammar=WORDS),
    st.builds(
        StructuredOutputsParams,
        json=st.fixed_dictionaries({"type": st.sampled_from(["object", "array"])}),
        whitespace_pattern=st.none() | WORDS,
    ),
    st.builds(
        StructuredOutputsParams, json_object=st.just(True), disable_any_whitespace=st.booleans()
    ),
    st.builds(
        lambda word: StructuredOutputsParams(
            structural_tag={
                "type": "structural_tag",
                "triggers": [word],
                "structures": [{"begin": f"{word}:", "schema": {}, "end": ""}],
            }
        ),
        WORDS,
    ),
)
FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "n": st.integers(1, 4096),
    "presence_penalty": st.floats(-2, 2),
    "frequency_penalty": st.floats(-2, 2),
    "repetition_penalty": st.floats(1e-20, 1e20),
    "temperature": st.floats(0, 1e9),
    "top_p": st.floats(0, 1, exclude_min=True),
    "top_k": st.integers(-1, 2**63),
    "min_p": st.floats(0, 1),
    "seed": st.none() | st.integers(0, 2**63 - 1),
    "stop": WORDS | st.lists(WORDS),
    "stop_token_ids": st.lists(TOKENS),
    "bad_words": st.lists(WORDS),
    "ignore_eos": st.booleans(),
    "max_tokens": st.none() | st.integers(100, 2**63),
    "min_tokens": st.integers(0, 16),
    "logprobs": st.none() | st.integers(-1, 1024),
    "prompt_logprobs": st.none() | st.integers(-1, 1024),
    "detokenize": st.just(True),
    "skip_special_tokens": st.booleans(),
    "include_stop_str_in_output": st.booleans(),
    "truncate_prompt_tokens": st.none() | st.just(-1) | st.integers(1, 2**63),
    "output_kind": st.sampled_from(RequestOutputKind),
    "logit_bias": st.none() | st.dictionaries(TOKENS, st.floats(-100, 100)),
    "allowed_token_ids": st.none() | st.lists(st.integers(2**32, 2**40), min_size=1),
    "structured_outputs": st.none() | STRUCTURED,
}


def _sent(params: SamplingParams) -> SamplingParams:
    return from_wire(msgspec.msgpack.decode(msgspec.msgpack.encode(to_wire(params))))


@given(st.fixed_dictionaries({}, optional=FIELDS))
def test_every_field_travels(given_fields: dict[str, Any]) -> None:
    params = SamplingParams(**given_fields)
    assert _sent(params) == replace(params, output_kind=RequestOutputKind.CUMULATIVE)


def test_defaults_need_nothing_and_no_field_is_forgotten() -> None:
    assert to_wire(SamplingParams()) == {}
    assert {field.name for field in fields(SamplingParams)} == set(FIELDS)
    assert not _sent(SamplingParams(detokenize=False)).detokenize
