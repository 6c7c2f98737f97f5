"""Calls as Llama 3.1 and later write them."""

from __future__ import annotations

from vattn.server.tools.base import ToolParser
from vattn.server.tools.tagged import TaggedParser, Tags


def llama_parser() -> ToolParser:
    """``{"name": ..., "parameters": {...}}``, several of them separated by ``;``.

    They begin the text or follow ``<|python_tag|>``; ``arguments`` will do for ``parameters``.
    """
    return TaggedParser(Tags("<|python_tag|>", ";", ("parameters", "arguments"), bare=True))
