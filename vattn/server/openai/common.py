"""What the bodies of OpenAI's and vLLM's API have in common, and how they are refused."""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, ClassVar, Literal

from fastapi import Request
from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from vattn.sampling_params import MAX_LOGIT_BIAS
from vattn.server.errors import ApiError
from vattn.server.observe import note
from vattn.server.openai.off import COMMON_OFF, Off
from vattn.server.state import ServerState

INT64 = 1 << 63
MOST_SAMPLES = 128  # of a prompt, as OpenAI has it
_MAX_ID = 128
# Stop strings are looked for in both processes after each token, and bad words are tokenized.
_MOST_STOPS = 16
_MOST_BAD_WORDS = 1024
_LONGEST_WORD = 1024


class Body(BaseModel):
    """A JSON object of a request: an unknown field is refused, and a string is no number.

    Fields of OpenAI's and vLLM's API that are not served are in :attr:`OFF` with the values, beside
    null, that ask for nothing; any other value is refused by the field's name.
    """

    model_config = ConfigDict(
        extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=()
    )

    OFF: ClassVar[Off] = {}

    @model_validator(mode="before")
    @classmethod
    def _without_what_is_off(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        for name in cls.OFF.keys() & data.keys():
            value = data[name]
            if value is not None and not any(_same(value, off) for off in cls.OFF[name]):
                raise refused(name, f"{name} is not supported; leave it out")
        return {name: value for name, value in data.items() if name not in cls.OFF}


class StreamOptions(Body):
    """Of ``stream: true``."""

    OFF: ClassVar[Off] = {"include_obfuscation": (False,)}

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class JsonSchema(Body):
    """``response_format.json_schema``. ``strict`` or not, the output is in the schema."""

    name: str
    description: str | None = None
    json_schema: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class TextFormat(Body):
    """Any text."""

    type: Literal["text"]


class JsonObjectFormat(Body):
    """Any JSON object."""

    type: Literal["json_object"]


class JsonSchemaFormat(Body):
    """JSON of a schema."""

    type: Literal["json_schema"]
    json_schema: JsonSchema


class Structure(Body):
    """JSON of a schema between two texts."""

    begin: str
    schema_: dict[str, Any] | bool = Field(alias="schema")
    end: str


class StructuralTagFormat(Body):
    """vLLM's format of free text with structures in it; see ``vattn.StructuredOutputsParams``."""

    OFF: ClassVar[Off] = {"format": ()}

    type: Literal["structural_tag"]
    structures: list[Structure] = Field(min_length=1)
    triggers: list[str] = Field(min_length=1)


ResponseFormat = Annotated[
    TextFormat | JsonObjectFormat | JsonSchemaFormat | StructuralTagFormat,
    Field(discriminator="type"),
]


class StructuredOutputs(Body):
    """vLLM's ``structured_outputs``; see :class:`vattn.StructuredOutputsParams`."""

    OFF: ClassVar[Off] = {
        "disable_fallback": (False,),
        "disable_additional_properties": (False,),
    }

    json_: str | dict[str, Any] | None = Field(None, alias="json")
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: str | None = None
    disable_any_whitespace: bool | None = None
    whitespace_pattern: str | None = None


_Word = Annotated[str, Field(max_length=_LONGEST_WORD)]
_Bias = Annotated[float, Field(ge=-MAX_LOGIT_BIAS, le=MAX_LOGIT_BIAS)]
_TokenIds = Annotated[
    list[int], Field(fail_fast=True)
]  # no more than the vocabulary has: see make_params


class SamplingFields(Body):
    """How to sample: what completions and chat have in common; null is as left out.

    See :class:`vattn.SamplingParams`. Of temperature, top_p, top_k, min_p and repetition_penalty
    the defaults are the model's own, else OpenAI's.
    """

    OFF: ClassVar[Off] = COMMON_OFF

    model: str | None = None
    temperature: float | None = Field(None, ge=0)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, lt=INT64)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    n: int | None = Field(None, ge=1, le=MOST_SAMPLES)
    stop: _Word | Annotated[list[_Word], Field(max_length=_MOST_STOPS, fail_fast=True)] | None = (
        None
    )
    seed: int | None = Field(None, ge=-INT64, lt=INT64)
    logit_bias: dict[str, _Bias] | None = None
    user: str | None = Field(None, description="Its first 200 characters are told in the log.")
    safety_identifier: str | None = Field(None, description="As `user`.")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    ignore_eos: bool | None = None
    min_tokens: int | None = Field(None, ge=0, lt=INT64)
    stop_token_ids: _TokenIds | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    bad_words: Annotated[list[_Word], Field(max_length=_MOST_BAD_WORDS, fail_fast=True)] | None = (
        None
    )
    allowed_token_ids: _TokenIds | None = None
    truncate_prompt_tokens: int | None = Field(None, ge=-1, lt=INT64)
    prompt_logprobs: int | None = Field(None, ge=0, lt=INT64)
    structured_outputs: StructuredOutputs | None = None
    response_format: ResponseFormat | None = None
    priority: int | None = Field(None, ge=-INT64, lt=INT64)
    cache_salt: str | None = Field(None, min_length=1, max_length=1024)
    request_id: str | None = Field(None, min_length=1, max_length=_MAX_ID)
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None

    @model_validator(mode="after")
    def _agree(self) -> SamplingFields:
        if self.stream_options is not None and not self.stream:
            raise refused("stream_options", "stream_options needs stream=true; leave it out")
        if self.stream and self.prompt_logprobs is not None:
            raise refused(
                "prompt_logprobs", "prompt_logprobs is not told in a stream; use stream=false"
            )
        text = self.response_format is None or self.response_format.type == "text"
        if not text and self.structured_outputs is not None:
            raise refused(
                "structured_outputs", "give response_format or structured_outputs, not both"
            )
        return self

    @property
    def samples(self) -> int:
        """Samples of each prompt."""
        return self.n or 1

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with a chunk that tells the usage."""
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def usage_always(self) -> bool:
        """Whether each chunk of a stream tells the usage so far."""
        return self.include_usage and bool(
            self.stream_options and self.stream_options.continuous_usage_stats
        )


def refused(param: str, message: str) -> PydanticCustomError:
    """An error for validators to raise: the field at fault, and what is wrong with it."""
    # Braces would be taken for fields of the template.
    return PydanticCustomError("refused", "{message}", {"param": param, "message": message})


def check_model(state: ServerState, model: str | None) -> str:
    """The model's name in responses.

    Raises:
        ApiError: 404; it is not the one that is served.
    """
    names = state.settings.served_model_names
    if model is None:
        return names[0]
    if model not in names:
        raise ApiError(
            404,
            f"the model {reprlib.repr(model)} does not exist here; there is {', '.join(names)}",
            type="not_found_error",
            param="model",
            code="model_not_found",
        )
    return model


def request_id_of(request: Request, body: SamplingFields, prefix: str) -> str:
    """An id for responses and logs, as ``cmpl-...``: the body's, else the HTTP request's.

    Args:
        request: its own id is the client's ``X-Request-Id``, or drawn.
        body: may have a ``request_id``, which goes first.
        prefix: ``cmpl`` or ``chatcmpl``.

    Raises:
        ApiError: 400; not printable ASCII.
    """
    given = body.request_id
    if given is None:
        # Checked, or drawn, by the middleware.
        given = request.state.request_id
    elif not (given.isascii() and given.isprintable()):
        raise ApiError(
            400,
            f"request_id={reprlib.repr(given)} must be printable ASCII",
            param="request_id",
        )
    return f"{prefix}-{given}"


def note_user(request: Request, body: SamplingFields) -> None:
    """Tells the log who asks, if the client says."""
    for name in ("user", "safety_identifier"):
        if (value := getattr(body, name)) is not None:
            note(request, **{name: value})


def note_end(request: Request, usage: Mapping[str, Any], reasons: Iterable[str | None]) -> None:
    """Tells the log what a response came to: tokens, and how its choices ended."""
    ends = sorted({reason for reason in reasons if reason})
    counts = {name: usage[name] for name in ("prompt_tokens", "completion_tokens")}
    note(request, **counts, finish=",".join(ends))


def _same(value: Any, off: Any) -> bool:
    """Equal, and no boolean for a number."""
    return bool(value == off) and isinstance(value, bool) == isinstance(off, bool)
