"""What options of ``vattn generate`` say on how tokens are chosen.

They are read here, and checked by what they are for: :class:`vattn.SamplingParams` and its like
know what is allowed, and their errors are told with the names of the options.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vattn.cli.console import BadInput, one_line
from vattn.sampling_params import StructuredOutputsParams


@dataclass(frozen=True)
class Decoding:
    """What the user asked for beyond the common parameters of sampling.

    Args:
        choice: arguments of SamplingParams, those that were given.
        structured: the language that the text must be in.
        beam_width: None for sampling.
        length_penalty: of beam search.
        speculative: None for no speculation.
    """

    choice: dict[str, Any] = field(default_factory=dict)
    structured: StructuredOutputsParams | None = None
    beam_width: int | None = None
    length_penalty: float | None = None
    speculative: dict[str, Any] | None = None


def read_structured(
    json_schema: str | None, regex: str | None, choice: list[str] | None, grammar: str | None
) -> StructuredOutputsParams | None:
    """The language that the text must be in, if one was given.

    Raises:
        BadInput: given in two ways, empty, or a file that cannot be read.
    """
    options = ("--json-schema", "--regex", "--choice", "--grammar")
    given = dict(zip(options, (json_schema, regex, choice or None, grammar), strict=True))
    names = [name for name, value in given.items() if value is not None]
    if not names:
        return None
    if len(names) > 1:
        raise BadInput(f"give one of {', '.join(options)}, and not {' and '.join(names)}")
    (name,) = names
    if "" in (given[name], *(choice or ())):
        raise BadInput(f"{name} '' is empty; give what the text must be")
    if json_schema is not None:
        return StructuredOutputsParams(json=_read_schema(json_schema))
    if grammar is not None:
        is_text = "\n" in grammar or ":" in grammar
        return StructuredOutputsParams(
            grammar=grammar if is_text else _read_file("--grammar", grammar)
        )
    return StructuredOutputsParams(regex=regex, choice=choice)


def _read_schema(given: str) -> str:
    is_text = given.lstrip()[:1] in ("{", "[") or given.strip() in ("true", "false")
    text = given if is_text else _read_file("--json-schema", given)
    name = "--json-schema" if is_text else f"--json-schema {given}"
    try:
        json.loads(text)
    except ValueError as error:
        raise BadInput(f"{name} is no JSON: {error}; give a schema, or a file of one") from error
    return text


def _read_file(name: str, path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise BadInput(
            f"{name} {path}: there is no such file to read ({error.strerror}); give one, or the "
            "text itself"
        ) from error
    except UnicodeDecodeError as error:
        raise BadInput(f"{name} {path} is not UTF-8 text (byte {error.start})") from error


def read_bias(given: list[str] | None) -> dict[int, float] | None:
    """``ID=VALUE`` as a mapping.

    Raises:
        BadInput: something else, or a token that is given twice.
    """
    if not given:
        return None
    biases: dict[int, float] = {}
    for text in given:
        match = re.fullmatch(r"\s*(\d+)\s*=\s*(\S+)\s*", text)
        try:
            token, bias = int(match[1] if match else ""), float(match[2] if match else "")
        except ValueError as error:
            raise BadInput(
                f"--logit-bias {text} must be a token id and a number, such as 42=-5"
            ) from error
        if token in biases:
            raise BadInput(f"--logit-bias is given twice for token {token}; give one of them")
        biases[token] = bias
    return biases


def read_ids(given: list[str] | None) -> list[int] | None:
    """Lists of token ids as one.

    Raises:
        BadInput: something else.
    """
    if not given:
        return None
    ids: list[int] = []
    for text in given:
        try:
            ids += [int(part) for part in text.split(",")]
        except ValueError as error:
            raise BadInput(
                f"--allowed-token-ids {text} must be token ids, such as 5,6,7"
            ) from error
    return ids


def read_speculative(given: str | None) -> dict[str, Any] | None:
    """The settings of speculation.

    Raises:
        BadInput: they are no JSON, or the engine would not accept them.
    """
    if given is None:
        return None
    from vattn.engine.speculation.config import parse_speculative

    try:
        settings = json.loads(given)
    except ValueError as error:
        raise BadInput(
            f"--speculative-config {given} is no JSON: {error}; give an object such as "
            '{"method": "ngram", "num_speculative_tokens": 5, "prompt_lookup_max": 4}'
        ) from error
    if settings is None:
        raise BadInput("--speculative-config null asks for nothing; leave it out")
    with named():
        parse_speculative(settings)
    return dict(settings)


def without_beams(given: dict[str, Any]) -> None:
    """Refuses options that beam search does not have.

    Raises:
        BadInput: one of ``given``, by parameter, is neither None nor empty.
    """
    for name, value in given.items():
        if value:
            raise BadInput(
                f"{option_name(name)} is of sampling, and --beam-width asks for beam search; drop "
                "one of them"
            )


@contextmanager
def named() -> Iterator[None]:
    """Tells a ValueError as bad input, with the options in place of the parameters."""
    try:
        yield
    except ValueError as error:
        raise BadInput(with_option_names(one_line(error))) from error


# Names of parameters that are no words of English, and those that only a value tells from one.
_NAMES = (
    "presence_penalty|frequency_penalty|repetition_penalty|length_penalty|logit_bias|bad_words|"
    "allowed_token_ids|prompt_logprobs|logprobs|truncate_prompt_tokens|beam_width|max_num_seqs|"
    "speculative_config|max_model_len|min_tokens|max_tokens|top_p|top_k|min_p"
)
_WORDS = "temperature|stop|seed|n"
_STRUCTURED = {
    "json": "--json-schema",
    "regex": "--regex",
    "choice": "--choice",
    "grammar": "--grammar",
}


def with_option_names(text: str) -> str:
    """A message about parameters of Python as one about options.

    From the first quotation mark on it stays as it is, for that is the user's own text, and what
    others say to it may repeat parts of that.
    """
    quoted = re.search(r"(?<!\w)['\"]", text)
    end = quoted.start() if quoted else len(text)
    text, rest = text[:end], text[end:]
    text = re.sub(
        rf"^structured_outputs cannot be compiled: ({'|'.join(_STRUCTURED)})=$",
        lambda match: f"the structured output cannot be compiled: {_STRUCTURED[match[1]]} ",
        text,
    )
    text = re.sub(rf"\b({_NAMES}|{_WORDS})=", lambda match: f"{option_name(match[1])} ", text)
    return re.sub(rf"(?<!-)\b({_NAMES})\b", lambda match: option_name(match[1]), text) + rest


def option_name(parameter: str) -> str:
    """How an option is called."""
    return f"--{parameter.replace('_', '-')}"
