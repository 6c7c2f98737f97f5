"""Tools of a request: who decides whether one is called, and how the call is found."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag

from vattn.engine.grammars import check_schema
from vattn.sampling_params import StructuredOutputsParams
from vattn.server.errors import ApiError
from vattn.server.openai.common import Body, refused
from vattn.server.openai.off import Off
from vattn.server.settings import ServerSettings
from vattn.server.tools import make_tool_parser
from vattn.server.tools.base import ToolParser
from vattn.server.tools.forced import KEY, ListParser, NamedParser
from vattn.server.tools.strict import WHITESPACE, strict_language

MOST_TOOLS = 128  # as OpenAI has it
_ANY = {"type": "object"}
_NO_PARAMETERS = {"type": "object", "properties": {}, "additionalProperties": False}


class FunctionDefinition(Body):
    """A function that may be called. ``parameters`` is a JSON schema; none for no parameters."""

    name: str = Field(min_length=1)
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


def _functions_only(data: Any) -> Any:
    given = data.get("type", "function") if isinstance(data, dict) else "function"
    if given != "function":
        raise refused("type", f"type={given!r} is not supported; use function")
    return data


class Tool(Body):
    """A function; custom tools are refused."""

    OFF: ClassVar[Off] = {"custom": ()}

    type: Literal["function"] = "function"
    function: FunctionDefinition


class FunctionName(Body):
    """The function that is to be called."""

    name: str


class NamedChoice(Body):
    """``tool_choice`` of one function."""

    type: Literal["function"] = "function"
    function: FunctionName


# As a field of a body.
ToolsField = Annotated[
    list[Annotated[Tool, BeforeValidator(_functions_only)]],
    Field(max_length=MOST_TOOLS, fail_fast=True),
]
ToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("(word)")]
    | Annotated[NamedChoice, BeforeValidator(_functions_only), Tag("(named)")],
    Discriminator(lambda given: "(word)" if isinstance(given, str) else "(named)"),
]


@dataclass(frozen=True)
class ToolPlan:
    """How calls come about.

    Args:
        make_parser: of each sample's text; None if it has no calls.
        structured_outputs: what makes the text one or several calls, or keeps those in it to
            their schemas; None for free text.
        has_text: what ``structured_outputs`` ask for need not be a call.
        parts: the fields that it was made of, each with what it alone asks for.
    """

    make_parser: Callable[[], ToolParser] | None = None
    structured_outputs: StructuredOutputsParams | None = None
    has_text: bool = False
    parts: tuple[tuple[str, StructuredOutputsParams], ...] = ()


def plan_tools(
    settings: ServerSettings,
    tools: Sequence[Tool] | None,
    choice: str | NamedChoice | None,
    *,
    parallel: bool,
) -> ToolPlan:
    """What tools and ``tool_choice`` ask for.

    Args:
        settings: have the parser.
        tools: of the request.
        choice: its ``tool_choice``; None is ``auto`` if there are tools.
        parallel: its ``parallel_tool_calls``.

    Raises:
        ApiError: 400; they do not fit together, or the server was not set up for them.
    """
    _check_names(tools)
    if not tools:
        if choice not in (None, "none", "auto"):
            raise ApiError(400, "tool_choice needs tools; give some", param="tool_choice")
        return ToolPlan()
    if choice == "none":
        return ToolPlan()
    if isinstance(choice, NamedChoice):
        return _named(tools, choice.function.name)
    if choice == "required":
        schema = required_schema(tools, parallel=parallel)
        return ToolPlan(ListParser, _structured(schema), parts=_parts(tools))
    return _auto(settings, tools, parallel=parallel)


def check_format(plan: ToolPlan, kind: str) -> None:
    """Refuses a ``response_format`` that makes calls impossible, or that a call leaves no room for.

    Args:
        plan: of the request's tools.
        kind: the type of its ``response_format``.

    Raises:
        ApiError: 400.
    """
    if kind == "text" or plan.make_parser is None:
        return
    if plan.structured_outputs is None and kind == "structural_tag":
        return  # which may have calls in it
    asked = "it may be one" if plan.has_text or not plan.structured_outputs else "it is one"
    raise ApiError(
        400,
        f"response_format={kind} holds the whole answer, so no call of a tool can be in it, and by "
        f'tool_choice {asked}; leave response_format out, or use tool_choice "none"',
        param="response_format",
    )


def required_schema(tools: Sequence[Tool], *, parallel: bool) -> dict[str, Any]:
    """Arrays of calls: ``[{"name": ..., "parameters": {...}}]``, of one call or more."""
    calls = []
    for index, tool in enumerate(tools):
        where = f"#/items/anyOf/{index}/properties/{KEY}"
        properties = {
            "name": {"const": tool.function.name},
            KEY: _moved(_parameters(tool), where),
        }
        calls.append(
            {
                "type": "object",
                "properties": properties,
                "required": list(properties),
                "additionalProperties": False,
            }
        )
    most = {} if parallel else {"maxItems": 1}
    return {"type": "array", "minItems": 1, **most, "items": {"anyOf": calls}}


def _check_names(tools: Sequence[Tool] | None) -> None:
    seen: set[str] = set()
    for index, tool in enumerate(tools or ()):
        name = tool.function.name
        if name in seen:
            raise ApiError(
                400,
                f"two tools are named {reprlib.repr(name)}; give each its own name",
                param=f"tools[{index}].function.name",
            )
        seen.add(name)


def _named(tools: Sequence[Tool], name: str) -> ToolPlan:
    for index, tool in enumerate(tools):
        if tool.function.name == name:
            structured = _structured(_parameters(tool))
            parts = ((f"tools[{index}].function.parameters", structured),)
            return ToolPlan(lambda: NamedParser(name), structured, parts=parts)
    raise ApiError(
        400,
        f"tool_choice names {name!r}, which is not among the tools",
        param="tool_choice.function.name",
    )


def _auto(settings: ServerSettings, tools: Sequence[Tool], *, parallel: bool) -> ToolPlan:
    parser = settings.tool_call_parser
    if not settings.enable_auto_tool_choice or parser is None:
        raise ApiError(
            400,
            'tool_choice "auto" needs a server with --enable-auto-tool-choice and '
            '--tool-call-parser; "required" and a named function are served without',
            param="tool_choice",
        )
    if not any(tool.function.strict for tool in tools):
        return ToolPlan(lambda: make_tool_parser(parser))
    functions = []
    for index, tool in enumerate(tools):
        schema = _parameters(tool) if tool.function.strict else _ANY
        functions.append((tool.function.name, schema))
        try:
            check_schema(schema)
        except ValueError as error:
            param = f"tools[{index}].function.parameters"
            raise ApiError(400, f"{param}: {error}", param=param) from error
    return ToolPlan(
        lambda: make_tool_parser(parser),
        strict_language(parser, functions, parallel=parallel),
        has_text=True,
        parts=_parts(tools, strict=True),
    )


def _parameters(tool: Tool) -> dict[str, Any]:
    return tool.function.parameters or _NO_PARAMETERS


def _parts(
    tools: Sequence[Tool], *, strict: bool = False
) -> tuple[tuple[str, StructuredOutputsParams], ...]:
    """Of all tools, or of the strict ones."""
    return tuple(
        (f"tools[{index}].function.parameters", _structured(_parameters(tool)))
        for index, tool in enumerate(tools)
        if tool.function.strict or not strict
    )


def _structured(schema: dict[str, Any]) -> StructuredOutputsParams:
    return StructuredOutputsParams(json=schema, whitespace_pattern=WHITESPACE)


def _moved(schema: Any, where: str) -> Any:
    """A schema that is found at ``where`` in another one: references to itself go there."""
    if isinstance(schema, list):
        return [_moved(each, where) for each in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: where + value[1:]
        if key == "$ref" and isinstance(value, str) and (value == "#" or value.startswith("#/"))
        else _moved(value, where)
        for key, value in schema.items()
    }
