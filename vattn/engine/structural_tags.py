"""Free text with JSON behind certain words, as a grammar of llguidance."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

ANY_TEXT = r"/(.|\n)*/"


def structural_grammar(
    tag: Mapping[str, Any],
    options: Mapping[str, Any],
    special: Mapping[str, int],
    plain: Collection[int],
) -> str:
    """Lark grammar of outputs that may end anywhere but within a structure.

    Args:
        tag: see :class:`vattn.StructuredOutputsParams`; has been checked.
        options: of llguidance, for the schemas.
        special: tokens that llguidance does not take for text, with their ids. Where a structure
            has one, it may be the token or spelled out.
        plain: those that are text to their tokenizer, and so may come anywhere.
    """
    triggers: Sequence[str] = tag["triggers"]
    rules: list[str] = []
    segments: list[str] = []
    begun: set[int] = set()
    for number, trigger in enumerate(triggers):
        tails = [
            (each["begin"][len(trigger) :], each["schema"], each["end"])
            for each in tag["structures"]
            if each["begin"].startswith(trigger)
        ]
        # A lazy lexeme ends where it can for the first time, so that no text runs over a trigger.
        rules.append(f"trigger_{number}[lazy]: TEXT {json.dumps(trigger)}")
        starts = f"trigger_{number}"
        first, *rest = parts = _parts(trigger, special)
        if first in special:
            starts = f"({starts} | TEXT <[{special[first]}]> {_spelled(rest, special)})"
        begun.update(special[part] for part in parts if part in special)
        rules.append(
            f"segment_{number}: {starts} ("
            + " | ".join(f"tail_{number}_{n}" for n in range(len(tails)))
            + ")"
        )
        for n, (begin, schema, end) in enumerate(tails):
            before, after = (_spelled(_parts(each, special), special) for each in (begin, end))
            rules.append(f"tail_{number}_{n}: {before} {embedded(schema, options)} {after}")
        segments.append(f"segment_{number}")
    if free := sorted(set(plain) - begun):
        rules.append(f"free: TEXT <[{','.join(map(str, free))}]>")
        segments.append("free")
    lines = ["%llguidance {}", f"start: ({' | '.join(segments)})* TEXT", f"TEXT: {ANY_TEXT}"]
    return "\n".join([*lines, *rules, ""])


def embedded(schema: Any, options: Mapping[str, Any]) -> str:
    """JSON of a schema, within a grammar."""
    whole = {} if schema is True else dict(schema)
    return "%json " + json.dumps({**whole, "x-guidance": dict(options)})


def _parts(text: str, special: Mapping[str, int]) -> list[str]:
    """A text cut into special tokens and what is between them."""
    names = "|".join(map(re.escape, sorted(special, key=len, reverse=True)))
    return [part for part in re.split(f"({names})", text) if part] if names else [text]


def _spelled(parts: Sequence[str], special: Mapping[str, int]) -> str:
    """Parts of a text, within a grammar."""
    return " ".join(
        f"({json.dumps(part)} | <[{special[part]}]>)" if part in special else json.dumps(part)
        for part in parts
        if part
    )
