"""Languages of texts that may have calls, whose arguments then are in their function's schema."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from vattn.engine.structural_tags import embedded
from vattn.sampling_params import StructuredOutputsParams

# White space without end is JSON, too, and small models like it.
WHITESPACE = " ?"
_OPTIONS = {"lenient": False, "whitespace_flexible": True, "whitespace_pattern": WHITESPACE}
# What the parser takes for the beginning of a call, or for a tag, is in no text.
_LLAMA_TEXT = r"""
start: text | blank calls
text: TEXT
TEXT: /(.|\n)*/ & ~/[\s\x1c-\x1f]*;?[\s\x1c-\x1f]*\{(.|\n)*/ & ~/(.|\n)*<\|python_tag\|>(.|\n)*/
blank: /[ \n]{0,4}/
"""


def strict_language(
    parser: str, functions: Sequence[tuple[str, Any]], *, parallel: bool
) -> StructuredOutputsParams:
    """What a text is in that is free but for its calls.

    Args:
        parser: a key of :data:`vattn.server.tools.TOOL_PARSERS`.
        functions: names and schemas of arguments, one at least, that have been checked.
        parallel: several calls may follow each other, where that can be told.
    """
    if parser == "hermes":
        return _hermes(functions)
    return _llama(functions, parallel=parallel)


def _hermes(functions: Sequence[tuple[str, Any]]) -> StructuredOutputsParams:
    """Behind ``<tool_call>`` nothing but a call goes on, wherever it comes in the text."""
    structures = [
        {
            "begin": f'<tool_call>\n{{"name": {json.dumps(name)}, "arguments": ',
            "schema": schema,
            "end": "}\n</tool_call>",
        }
        for name, schema in functions
    ]
    tag = {"type": "structural_tag", "triggers": ["<tool_call>"], "structures": structures}
    return StructuredOutputsParams(structural_tag=tag, whitespace_pattern=WHITESPACE)


def _llama(functions: Sequence[tuple[str, Any]], *, parallel: bool) -> StructuredOutputsParams:
    """There is no tag: what begins with a brace is calls to its end, and all else has none."""
    rules = [_LLAMA_TEXT, "calls: call" + (' ("; " call)*' if parallel else "")]
    rules.append("call: " + " | ".join(f"call_{n}" for n in range(len(functions))))
    for n, (name, schema) in enumerate(functions):
        begin = json.dumps(f'{{"name": {json.dumps(name)}, "parameters": ')
        rules.append(f'call_{n}: {begin} {embedded(schema, _OPTIONS)} "}}"')
    return StructuredOutputsParams(grammar="\n".join([*rules, ""]))
