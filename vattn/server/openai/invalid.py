"""What pydantic finds wrong with a request, in the words of this server."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from fastapi.exceptions import RequestValidationError

from vattn.server.errors import ApiError

# By pydantic's type of an error: a value of another type than that of the field.
_TYPES: Mapping[str, str] = MappingProxyType(
    {
        "string_type": "text",
        "int_type": "a whole number",
        "int_from_float": "a whole number",
        "int_parsing": "a whole number",
        "int_parsing_size": "a whole number of 64 bits",
        "float_type": "a number",
        "float_parsing": "a number",
        "finite_number": "a finite number",
        "bool_type": "true or false",
        "list_type": "a list",
        "dict_type": "an object",
        "model_type": "an object",
        "model_attributes_type": "an object",
    }
)
# And a value of that type which is not allowed.
_VALUES: Mapping[str, str] = MappingProxyType(
    {
        "greater_than": "must be above {gt}",
        "greater_than_equal": "must be at least {ge}",
        "less_than": "must be below {lt}",
        "less_than_equal": "must be at most {le}",
        "too_short": "must have at least {min_length} item(s)",
        "too_long": "must have at most {max_length} items",
        "string_too_short": "must have at least {min_length} character(s)",
        "string_too_long": "must have at most {max_length} characters",
        "literal_error": "must be {expected}",
        "union_tag_invalid": "must be one of {expected_tags}",
    }
)


def api_error_of(error: RequestValidationError) -> ApiError:
    """The first of what is wrong with a request, as OpenAI tells it: 400 with the field's path."""
    errors: Sequence[Any] = error.errors()
    first = errors[0]
    context = first.get("ctx") or {}
    where = tuple(first["loc"])
    if where[:1] == ("query",):
        name, value = where[-1], reprlib.repr(first.get("input"))
        return ApiError(400, f"{name}={value} {wording([first])}", param=str(name))
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is no JSON: {context.get('error', first['msg'])}")
    if first["type"] == "refused":
        path = [*_path(where, error.body), context["param"]]
        return ApiError(400, context["message"], param=_written(path))
    # Of a union there is an error for each of its members; the one that got furthest is meant.
    paths = [_path(_place(each), error.body, absent=_is_absent(each)) for each in errors]
    path = max((each for each in paths if each[:1] == paths[0][:1]), key=len)
    same = [each for each, its in zip(errors, paths, strict=True) if its == path]
    first = same[0]
    param = _written(path)
    if not path:
        return ApiError(400, "the body must be a JSON object, sent as application/json")
    if _is_absent(first):
        return ApiError(400, f"{param} is missing; it is needed", param=param)
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"{param} is not supported; leave it out", param=param)
    value = first.get("input")
    if first["type"] == "union_tag_invalid":
        value = context["tag"]
    return ApiError(400, f"{param}={reprlib.repr(value)} {wording(same)}", param=param)


def wording(errors: Sequence[Mapping[str, Any]]) -> str:
    """What a value must be, as ``must be text``.

    Args:
        errors: of this value, several if it may be one of several things.
    """
    values = [each for each in errors if each["type"] not in _TYPES]
    if values:  # the type is that of one of the things, so this one is meant
        kind, context = values[0]["type"], values[0].get("ctx") or {}
        if kind in _VALUES:
            return _VALUES[kind].format_map(context)
        return f"is wrong: {values[0]['msg']}"
    return "must be " + " or ".join(dict.fromkeys(_TYPES[each["type"]] for each in errors))


def _place(error: Any) -> tuple[int | str, ...]:
    """Where pydantic found it; of a union's error, the field that tells its members apart."""
    field = (error.get("ctx") or {}).get("discriminator")
    return (*error["loc"], field.strip("'")) if field else tuple(error["loc"])


def _is_absent(error: Any) -> bool:
    return error["type"] in ("missing", "union_tag_not_found")


def _path(where: tuple[int | str, ...], body: Any, *, absent: bool = False) -> list[int | str]:
    """The parts of pydantic's path that are in the request: not the names of union members.

    Args:
        where: pydantic's path.
        body: the request's.
        absent: the last part is a field that is missing.
    """
    path: list[int | str] = []
    at = body
    for number, part in enumerate(where[1:], 2):
        inside = isinstance(at, list) and isinstance(part, int) and part < len(at)
        if inside or (isinstance(at, dict) and part in at):
            at = at[part]
        elif not (absent and isinstance(at, dict) and number == len(where)):
            continue
        path.append(part)
    return path


def _written(path: Sequence[int | str]) -> str | None:
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text or None
