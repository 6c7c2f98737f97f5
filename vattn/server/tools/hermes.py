"""Calls as Hermes and Qwen models write them."""

from __future__ import annotations

from vattn.server.tools.base import ToolParser
from vattn.server.tools.tagged import TaggedParser, Tags


def hermes_parser() -> ToolParser:
    """``<tool_call>{"name": ..., "arguments": {...}}</tool_call>``, any number, amid text."""
    return TaggedParser(Tags("<tool_call>", "</tool_call>", ("arguments",)))
