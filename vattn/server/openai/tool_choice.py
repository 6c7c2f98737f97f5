"""Tools of a request: who decides whether one is called, and how the call is found."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag

from vattn.sampling_params import StructuredOutputsParams
from vattn.server.errors import ApiError
from vattn.server.openai.common import Body, refused
from vattn.server.openai.off import Off
from vattn.server.settings import ServerSettings
from vattn.server.tools import make_tool_parser
from vattn.server.tools.base import ToolParser
from vattn.server.tools.forced import KEY, ListParser, NamedParser

# White space without end is JSON, too, and small models like it.
_WHITESPACE = " ?"
_NO_PARAMETERS = {"type": "object", "properties": {}}


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


ToolField = Annotated[Tool, BeforeValidator(_functions_only)]
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
        structured_outputs: what makes the text one or several calls; None for free text.
    """

    make_parser: Callable[[], ToolParser] | None = None
    structured_outputs: StructuredOutputsParams | None = None


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
        return ToolPlan(ListParser, _structured(schema, "tools"))
    return _auto(settings, tools)


def required_schema(tools: Sequence[Tool], *, parallel: bool) -> dict[str, Any]:
    """Arrays of calls: ``[{"name": ..., "parameters": {...}}]``, of one call or more."""
    calls = []
    for index, tool in enumerate(tools):
        where = f"#/items/anyOf/{index}/properties/{KEY}"
        properties = {
            "name": {"const": tool.function.name},
            KEY: _moved(tool.function.parameters or _NO_PARAMETERS, where),
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
    names = [tool.function.name for tool in tools or ()]
    for index, name in enumerate(names):
        if name in names[:index]:
            raise ApiError(
                400,
                f"two tools are named {name!r}; give each its own name",
                param=f"tools[{index}].function.name",
            )


def _named(tools: Sequence[Tool], name: str) -> ToolPlan:
    for index, tool in enumerate(tools):
        if tool.function.name == name:
            schema = tool.function.parameters or {**_NO_PARAMETERS, "additionalProperties": False}
            param = f"tools[{index}].function.parameters"
            return ToolPlan(lambda: NamedParser(name), _structured(schema, param))
    raise ApiError(
        400,
        f"tool_choice names {name!r}, which is not among the tools",
        param="tool_choice.function.name",
    )


def _auto(settings: ServerSettings, tools: Sequence[Tool]) -> ToolPlan:
    parser = settings.tool_call_parser
    if not settings.enable_auto_tool_choice or parser is None:
        raise ApiError(
            400,
            'tool_choice "auto" needs a server with --enable-auto-tool-choice and '
            '--tool-call-parser; "required" and a named function are served without',
            param="tool_choice",
        )
    for index, tool in enumerate(tools):
        if tool.function.strict:
            raise ApiError(
                400,
                'strict=true is not kept to with tool_choice "auto"; use "required" or a named '
                "function, whose arguments always are in the schema, or leave strict out",
                param=f"tools[{index}].function.strict",
            )
    return ToolPlan(lambda: make_tool_parser(parser))


def _structured(schema: dict[str, Any], param: str) -> StructuredOutputsParams:
    try:
        return StructuredOutputsParams(json=schema, whitespace_pattern=_WHITESPACE)
    except ValueError as error:
        raise ApiError(400, str(error), param=param) from error


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
