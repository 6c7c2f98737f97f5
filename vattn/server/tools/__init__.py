"""Tool calls: finding them in text, and making models write them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from vattn.server.tools.base import ToolParser
from vattn.server.tools.hermes import hermes_parser
from vattn.server.tools.llama import llama_parser

# By the names that vLLM gives them.
TOOL_PARSERS: Mapping[str, Callable[[], ToolParser]] = MappingProxyType(
    {
        "hermes": hermes_parser,
        "llama3_json": llama_parser,
    }
)


def make_tool_parser(name: str) -> ToolParser:
    """A fresh parser, for one text.

    Raises:
        ValueError: there is none of that name.
    """
    if name not in TOOL_PARSERS:
        raise ValueError(f"no tool call parser {name!r}; there are {', '.join(TOOL_PARSERS)}")
    return TOOL_PARSERS[name]()
