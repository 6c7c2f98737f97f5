"""How a request is decoded: what users may ask for, checked where it enters; no torch here."""

from __future__ import annotations

import enum
import json
import math
import numbers
import operator
import re
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vattn.structural_tag import tag_text

_LIMIT = 2**63
MAX_LOGPROBS = 1024
ALL_LOGPROBS = -1
MAX_LOGIT_BIAS = 100.0
# Logits of any model, times or divided by it and by a temperature, are finite in single precision.
MAX_FACTOR = 1e20
# Below it a distribution is a single token but for rounding; vLLM draws the line here, too.
GREEDY_TEMPERATURE = 1e-5


class RequestOutputKind(enum.Enum):
    """How much the outputs of a stream hold; after vLLM."""

    CUMULATIVE = 0  # each has everything so far
    DELTA = 1  # each has what is new since the last one
    FINAL_ONLY = 2  # there is one, at the end


@dataclass(frozen=True, kw_only=True)
class StructuredOutputsParams:
    """A language that an output must be in. Names are vLLM's; give exactly one.

    Args:
        json: a JSON schema, as text, as a mapping, or as a pydantic model class.
        regex: a regular expression that the whole output matches.
        choice: strings, one of which the output is.
        grammar: a context-free grammar, as Lark writes them (see the documentation of llguidance),
            or GBNF with a rule ``root``.
        json_object: any JSON object.
        structural_tag: free text with JSON in it, as text or as a mapping: ``{"type":
            "structural_tag", "triggers": [...], "structures": [{"begin", "schema", "end"}, ...]}``.
            From where a trigger appears the output goes on as one of the structures whose
            ``begin`` starts with it: ``begin``, JSON of ``schema``, ``end``.
        disable_any_whitespace: JSON without whitespace between its parts; with ``json``,
            ``json_object`` and ``structural_tag``.
        whitespace_pattern: JSON with whitespace between its parts that matches this regular
            expression; with the same.

    Raises:
        ValueError: none or several of them, or a value of the wrong type. Whether a schema or a
            grammar can be compiled shows when a request is made.
    """

    json: str | Mapping[str, Any] | type | None = None
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None
    json_object: bool = False
    structural_tag: str | Mapping[str, Any] | None = None
    disable_any_whitespace: bool = False
    whitespace_pattern: str | None = None

    def __post_init__(self) -> None:
        kinds = ("json", "regex", "choice", "grammar", "json_object", "structural_tag")
        given = [name for name in kinds if getattr(self, name) not in (None, False)]
        if len(given) != 1:
            raise ValueError(
                f"structured outputs need one of {', '.join(kinds)}, and were given "
                f"{', '.join(given) or 'none'}"
            )
        for name in ("regex", "grammar", "whitespace_pattern"):
            if getattr(self, name) is not None and not isinstance(getattr(self, name), str):
                raise ValueError(f"{name}={getattr(self, name)!r} must be text")
        for name in ("json_object", "disable_any_whitespace"):
            _check_boolean(self, name)
        if self.disable_any_whitespace and self.whitespace_pattern is not None:
            raise ValueError("give disable_any_whitespace or whitespace_pattern, not both")
        is_json = given[0] in ("json", "json_object", "structural_tag")
        if not is_json and (self.disable_any_whitespace or self.whitespace_pattern is not None):
            raise ValueError(
                "disable_any_whitespace and whitespace_pattern are of json and json_object, and of "
                f"structural_tag; put it into the {given[0]} itself"
            )
        self._normalize()

    def _normalize(self) -> None:
        """A schema and structural tags become text, choices a tuple."""
        if self.choice is not None:
            choice = None if isinstance(self.choice, str) else _list(self.choice)
            if not choice or not all(isinstance(text, str) and text for text in choice):
                raise ValueError(f"choice={self.choice!r} must be non-empty strings, one at least")
            object.__setattr__(self, "choice", tuple(choice))
        schema: Any = self.json
        if hasattr(schema, "model_json_schema"):
            schema = schema.model_json_schema()
        if isinstance(schema, Mapping):
            try:
                schema = json.dumps(schema)
            except (TypeError, ValueError) as error:
                raise ValueError(f"json={self.json!r} is no JSON schema: {error}") from error
        if schema is not None and not isinstance(schema, str):
            raise ValueError(
                f"json={self.json!r} must be a JSON schema: text, a mapping or a pydantic model"
            )
        object.__setattr__(self, "json", schema)
        if self.structural_tag is not None:
            object.__setattr__(self, "structural_tag", tag_text(self.structural_tag))


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How one request is sampled. Names and defaults are vLLM's; an unknown one is a TypeError.

    Args:
        n: samples per prompt; they share the pages of the prompt.
        presence_penalty: taken off the logits of tokens that the output has, -2 to 2.
        frequency_penalty: the same, once for each time that the output has it, -2 to 2.
        repetition_penalty: divides positive and multiplies negative logits of tokens that prompt
            or output have; above 1 against repetition, 1e-20 to 1e20.
        temperature: 0, or anything below 1e-5, takes the likeliest token.
        top_p: smallest set of tokens with this much probability, 0 < p <= 1.
        top_k: the k likeliest tokens; 0 or -1 for all.
        min_p: tokens at least this probable relative to the likeliest, 0 <= p <= 1.
        seed: of this request; the same seed gives the same tokens in any batch, but where the
            rounding of another batch's logits tips a draw or a tie, which is rare. None draws one.
        stop: strings that end the text; not part of it unless ``include_stop_str_in_output``.
        stop_token_ids: tokens that end it, beside the model's end-of-sequence tokens.
        bad_words: words that are not generated: of each, as the tokenizer writes it with and
            without a space before, the last token is ruled out where the output ends in those
            before it. Needs a tokenizer.
        ignore_eos: go on after the model's end-of-sequence tokens.
        max_tokens: most new tokens; None for as many as the model's length allows.
        min_tokens: no end-of-sequence or stop token and no stop string before so many new tokens.
        logprobs: the log probabilities of this many likeliest tokens and of the sampled one, at
            each position; -1 for the whole vocabulary, None for none.
        prompt_logprobs: the same for the tokens of the prompt; the first has none. Such a prompt
            is computed whole, whatever of it is in the prefix cache.
        detokenize: produce text; needs a tokenizer.
        skip_special_tokens: leave special tokens out of the text.
        include_stop_str_in_output: the stop string or token that ended it is part of the text.
        truncate_prompt_tokens: use only so many tokens of the prompt, its last ones; -1 for as
            many as the model can take.
        output_kind: what the outputs of a stream hold.
        logit_bias: added to the logits of these tokens, -100 to 100; beyond it is cut.
        allowed_token_ids: only these tokens are generated.
        structured_outputs: the language that the output must be in. Needs a tokenizer.

    Raises:
        ValueError: a value out of range; the message names it and what is allowed.
    """

    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    bad_words: Sequence[str] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    truncate_prompt_tokens: int | None = None
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE
    # Not hashed, for mappings are not.
    logit_bias: Mapping[int, float] | None = field(default=None, hash=False)
    allowed_token_ids: Sequence[int] | None = None
    structured_outputs: StructuredOutputsParams | None = None

    def __post_init__(self) -> None:
        self._check_numbers()
        for name in (
            "ignore_eos",
            "detokenize",
            "skip_special_tokens",
            "include_stop_str_in_output",
        ):
            _check_boolean(self, name)
        if not isinstance(self.output_kind, RequestOutputKind):
            raise ValueError(
                f"output_kind={self.output_kind!r} must be a RequestOutputKind: "
                f"{', '.join(kind.name for kind in RequestOutputKind)}"
            )
        for name in ("stop", "bad_words"):
            object.__setattr__(self, name, self._strings(name))
        object.__setattr__(self, "stop_token_ids", self._token_ids("stop_token_ids"))
        if self.stop and not self.detokenize:
            raise ValueError("stop strings need text; leave detokenize on, or use stop_token_ids")
        self._check_sets()
        structured: Any = self.structured_outputs
        if structured is not None and not isinstance(structured, StructuredOutputsParams):
            raise ValueError(
                f"structured_outputs={structured!r} must be a StructuredOutputsParams, such as "
                'StructuredOutputsParams(choice=["yes", "no"])'
            )

    def _check_numbers(self) -> None:
        _check_whole(self, "n", 1, 4096)
        for name in ("presence_penalty", "frequency_penalty"):
            _check_number(self, name, -2.0, 2.0)
        _check_number(self, "repetition_penalty", 0.0, MAX_FACTOR)
        if self.repetition_penalty == 0:
            raise ValueError("repetition_penalty=0 divides by nothing; 1 is none, above 1 against")
        _check_number(self, "repetition_penalty", 1 / MAX_FACTOR, MAX_FACTOR)
        _check_number(self, "temperature", 0.0, math.inf)
        _check_number(self, "top_p", 0.0, 1.0)
        if self.top_p == 0:
            raise ValueError("top_p=0 leaves no token; use a value above 0 and at most 1")
        _check_whole(self, "top_k", -1, _LIMIT)
        _check_number(self, "min_p", 0.0, 1.0)
        if self.seed is not None:
            _check_whole(self, "seed", 0, _LIMIT - 1)
        if self.max_tokens is not None:
            _check_whole(self, "max_tokens", 1, _LIMIT)
        _check_whole(self, "min_tokens", 0, _LIMIT)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(
                f"min_tokens={self.min_tokens} is more than max_tokens={self.max_tokens}; lower it"
            )
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                _check_whole(self, name, ALL_LOGPROBS, MAX_LOGPROBS)
        if self.truncate_prompt_tokens is not None:
            _check_whole(self, "truncate_prompt_tokens", -1, _LIMIT)
            if self.truncate_prompt_tokens == 0:
                raise ValueError(
                    "truncate_prompt_tokens=0 leaves no prompt; keep one token or more"
                )

    def _check_sets(self) -> None:
        """Bias and allowed tokens, and that they leave something to generate."""
        if self.logit_bias is not None:
            object.__setattr__(self, "logit_bias", _biases(self.logit_bias))
        if self.allowed_token_ids is None:
            return
        object.__setattr__(self, "allowed_token_ids", self._token_ids("allowed_token_ids"))
        if not self.allowed_token_ids:
            raise ValueError("allowed_token_ids is empty, which leaves no token; None allows all")
        if self.min_tokens and set(self.allowed_token_ids) <= set(self.stop_token_ids or ()):
            raise ValueError(
                f"all of allowed_token_ids={list(self.allowed_token_ids)!r} are stop_token_ids, "
                f"and min_tokens={self.min_tokens} rules these out at first; allow another token"
            )

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """The stop strings, none of them empty."""
        return tuple(self.stop or ())

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """The stop token ids."""
        return tuple(self.stop_token_ids or ())

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken always."""
        return self.temperature < GREEDY_TEMPERATURE or self.top_k == 1

    @property
    def has_penalties(self) -> bool:
        """Whether what is sampled depends on how often a token was there before."""
        return (
            self.presence_penalty != 0
            or self.frequency_penalty != 0
            or self.repetition_penalty != 1
        )

    def _strings(self, name: str) -> tuple[str, ...]:
        given: Any = getattr(self, name)
        texts = [given] if isinstance(given, str) else _list(given)
        if texts is None or not all(isinstance(text, str) and text for text in texts):
            raise ValueError(f"{name}={given!r} must be non-empty strings")
        return tuple(texts)

    def _token_ids(self, name: str) -> tuple[int, ...]:
        ids = _list(getattr(self, name))
        if ids is None or not all(_is_token_id(token) for token in ids):
            raise ValueError(f"{name}={getattr(self, name)!r} must be token ids, 0 or more")
        return tuple(operator.index(token) for token in ids)


@dataclass(frozen=True, kw_only=True)
class BeamSearchParams:
    """How one prompt is continued by beam search. Names are vLLM's where it has one.

    Scores and ends are those of transformers' ``generate(num_beams=beam_width)``.

    Args:
        beam_width: beams that are kept, and sequences that come out.
        max_tokens: most new tokens.
        ignore_eos: go on after the model's end-of-sequence tokens.
        temperature: the logits are divided by it before they are compared, 1e-20 to 1e20; 0 counts
            as 1.
        length_penalty: a sequence's score is its log probability over its number of new tokens to
            this power: above 0 favours long ones, below 0 short ones.
        early_stopping: True ends as soon as ``beam_width`` sequences are complete; False as well,
            unless the best beam could still beat the worst of them by its present length;
            ``"never"`` if it could not even at the greatest length.
        include_stop_str_in_output: the end-of-sequence token is part of the text.

    Raises:
        ValueError: a value out of range; the message names it and what is allowed.
    """

    beam_width: int
    max_tokens: int
    ignore_eos: bool = False
    temperature: float = 0.0
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    include_stop_str_in_output: bool = False

    def __post_init__(self) -> None:
        _check_whole(self, "beam_width", 1, 4096)
        _check_whole(self, "max_tokens", 1, _LIMIT)
        _check_number(self, "temperature", 0.0, MAX_FACTOR)
        if self.temperature:
            _check_number(self, "temperature", 1 / MAX_FACTOR, MAX_FACTOR)
        _check_number(self, "length_penalty", -math.inf, math.inf)
        for name in ("ignore_eos", "include_stop_str_in_output"):
            _check_boolean(self, name)
        if not isinstance(self.early_stopping, bool) and self.early_stopping != "never":
            raise ValueError(
                f'early_stopping={self.early_stopping!r} must be True, False or "never"'
            )


def _is_token_id(value: Any) -> bool:
    """Whether it is one that some vocabulary may have, and that fits in 64 bits."""
    return _is_whole(value) and 0 <= value < 1 << 63


def _biases(given: Any) -> dict[int, float]:
    """Token ids (JSON writes them as text) and what is added to their logits."""
    if not isinstance(given, Mapping):
        raise ValueError(f"logit_bias={given!r} must map token ids to numbers")
    biases: dict[int, float] = {}
    for token, bias in given.items():
        is_written = isinstance(token, str) and re.fullmatch("[0-9]{1,19}", token)
        number = int(token) if is_written else token
        if not _is_token_id(number):
            shown = reprlib.repr(token)
            raise ValueError(f"logit_bias has {shown}, which is no token id, 0 or more")
        if not _is_number(bias) or math.isnan(bias):
            raise ValueError(f"logit_bias of token {number} is {bias!r}, which is no number")
        if operator.index(number) in biases:
            raise ValueError(f"logit_bias has token {number} twice, as a number and as text")
        biases[operator.index(number)] = max(-MAX_LOGIT_BIAS, min(MAX_LOGIT_BIAS, float(bias)))
    return biases


def _check_boolean(params: Any, name: str) -> None:
    if not isinstance(getattr(params, name), bool):
        raise ValueError(f"{name}={getattr(params, name)!r} must be True or False")


def _check_whole(params: Any, name: str, low: int, high: int) -> None:
    value = getattr(params, name)
    if not _is_whole(value):
        raise ValueError(f"{name}={value!r} must be a whole number")
    if not low <= operator.index(value) <= high:
        raise ValueError(f"{name}={value!r} must be at least {low} and at most {high}")
    object.__setattr__(params, name, operator.index(value))


def _check_number(params: Any, name: str, low: float, high: float) -> None:
    value = getattr(params, name)
    if not _is_number(value):
        raise ValueError(f"{name}={value!r} must be a number")
    if not low <= value <= high or math.isinf(value):
        bounds = [] if math.isinf(low) else [f"at least {low:g}"]
        bounds.append("finite" if math.isinf(high) else f"at most {high:g}")
        raise ValueError(f"{name}={value!r} must be {' and '.join(bounds)}")
    object.__setattr__(params, name, float(value))


def _is_whole(value: Any) -> bool:
    """Whether it is an integer, numpy's included; True and False are not meant as numbers."""
    return not isinstance(value, bool) and hasattr(value, "__index__")


def _is_number(value: Any) -> bool:
    return not isinstance(value, bool) and isinstance(value, numbers.Real)


def _list(values: Any) -> list[Any] | None:
    """Any iterable as a list, None as an empty one; None if it is neither."""
    if values is None:
        return []
    try:
        return list(values)
    except TypeError:
        return None
