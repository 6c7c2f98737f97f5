"""Messages of a chat, as clients send them and as chat templates read them."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal, TypeAlias

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator

from vattn.server.errors import ApiError
from vattn.server.openai.common import Body, refused
from vattn.server.openai.off import Off

MOST_MESSAGES = 8192  # of a request; and most parts of a message, and most calls in one
ROLES = ("system", "developer", "user", "assistant", "tool")


class TextPart(Body):
    """A part of a message's content; images, audio and files are refused."""

    type: Literal["text"]
    text: str

    @model_validator(mode="before")
    @classmethod
    def _is_text(cls, data: Any) -> Any:
        given = data.get("type", "text") if isinstance(data, dict) else "text"
        if given != "text":
            raise refused("type", f"type={reprlib.repr(given)} is not supported; send text")
        return data


def _kind(content: Any) -> str:
    return "(parts)" if isinstance(content, list) else "(text)"


Content = Annotated[
    Annotated[str, Tag("(text)")]
    | Annotated[
        list[TextPart],
        Field(min_length=1, max_length=MOST_MESSAGES, fail_fast=True),
        Tag("(parts)"),
    ],
    Discriminator(_kind),
]


class CalledFunction(Body):
    """Of a tool call. ``parsed_arguments``, the client's reading of them, is not looked at."""

    name: str = Field(min_length=1)
    arguments: str
    parsed_arguments: Any = None


class ToolCall(Body):
    """What an earlier answer called."""

    OFF: ClassVar[Off] = {"custom": ()}

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = None


class SystemMessage(Body):
    """Instructions; ``developer`` is OpenAI's newer name for ``system``."""

    role: Literal["system", "developer"]
    content: Content
    name: str | None = None


class UserMessage(Body):
    """What a user says."""

    role: Literal["user"]
    content: Content
    name: str | None = None


class AssistantMessage(Body):
    """An earlier answer, as it was told; ``parsed``, a client's reading of it, is not looked at."""

    OFF: ClassVar[Off] = {
        "refusal": (),
        "audio": (),
        "annotations": ([],),
        "function_call": (),
        "reasoning": (),
        "reasoning_content": (),
    }

    role: Literal["assistant"]
    content: Content | None = None
    name: str | None = None
    tool_calls: (
        Annotated[list[ToolCall], Field(max_length=MOST_MESSAGES, fail_fast=True)] | None
    ) = None
    parsed: Any = None

    @model_validator(mode="after")
    def _says_something(self) -> AssistantMessage:
        if self.content is None and not self.tool_calls:
            raise refused("content", "an assistant's message needs content or tool_calls")
        return self


class ToolMessage(Body):
    """What a tool call came to."""

    role: Literal["tool"]
    content: Content
    tool_call_id: str
    name: str | None = None


def _known_role(data: Any) -> Any:
    role = data.get("role") if isinstance(data, dict) else None
    if isinstance(data, dict) and "role" in data and role not in ROLES:
        raise refused("role", f"role={reprlib.repr(role)} must be one of {', '.join(ROLES)}")
    return data


Message: TypeAlias = SystemMessage | UserMessage | AssistantMessage | ToolMessage
# As a field of a body.
MessageField = Annotated[
    Annotated[Message, Field(discriminator="role")], BeforeValidator(_known_role)
]


def text_of(content: str | Sequence[TextPart] | None) -> str:
    """All of a message's text; its parts are lines, as in vLLM."""
    if content is None or isinstance(content, str):
        return content or ""
    return "\n".join(part.text for part in content)


def for_template(
    messages: Sequence[Message],
    *,
    developer_role: bool,
) -> list[dict[str, Any]]:
    """Messages as templates expect them: text, and arguments of calls as objects.

    Args:
        messages: of a request.
        developer_role: the template knows ``developer``; else it becomes ``system``.

    Raises:
        ApiError: 400; arguments of a call that are no JSON object.
    """
    found = []
    for index, message in enumerate(messages):
        role: str = message.role
        if role == "developer" and not developer_role:
            role = "system"
        each: dict[str, Any] = {"role": role, "content": text_of(message.content)}
        if message.name is not None:
            each["name"] = message.name
        if isinstance(message, ToolMessage):
            each["tool_call_id"] = message.tool_call_id
        if isinstance(message, AssistantMessage) and message.tool_calls:
            each["tool_calls"] = [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {
                        "name": call.function.name,
                        "arguments": _arguments(
                            call, f"messages[{index}].tool_calls[{n}].function.arguments"
                        ),
                    },
                }
                for n, call in enumerate(message.tool_calls)
            ]
        found.append(each)
    return found


def _arguments(call: ToolCall, param: str) -> dict[str, Any]:
    text = call.function.arguments
    try:
        read = json.loads(text or "{}")
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"{param} is no JSON: {error}", param=param) from error
    if not isinstance(read, dict):
        raise ApiError(400, f"{param}={reprlib.repr(text)} must be a JSON object", param=param)
    return read
