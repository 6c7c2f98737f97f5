"""Structural tags as users write them, checked where they enter."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any


def tag_text(given: Any) -> str:
    """Structural tags as text, checked but for their schemas.

    Args:
        given: see :class:`vattn.StructuredOutputsParams`.

    Raises:
        ValueError: something is missing, or too much.
    """
    try:
        tag = json.loads(given) if isinstance(given, str) else given
        text = given if isinstance(given, str) else json.dumps(given)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"structural_tag={repr(given)[:400]} is no JSON: {error}") from error
    if not isinstance(tag, Mapping) or tag.keys() != {"type", "triggers", "structures"}:
        raise ValueError(
            'structural_tag must be an object with "type": "structural_tag", "triggers" and '
            f'"structures", and nothing else; it is {text[:400]}'
        )
    triggers, structures = tag["triggers"], tag["structures"]
    if tag["type"] != "structural_tag":
        raise ValueError(f'type={tag["type"]!r} of structural_tag must be "structural_tag"')
    if not _are(triggers, lambda each: isinstance(each, str) and each):
        raise ValueError("triggers of structural_tag must be non-empty strings, one at least")
    if not _are(structures, _is_structure):
        raise ValueError(
            'structures of structural_tag must be objects with "begin", "schema" and "end", one '
            "at least"
        )
    for trigger in triggers:
        if not any(each["begin"].startswith(trigger) for each in structures):
            raise ValueError(f"no structure of structural_tag begins with the trigger {trigger!r}")
    for each in structures:
        if not each["begin"].startswith(tuple(triggers)):
            raise ValueError(f"begin={each['begin']!r} of structural_tag starts with no trigger")
    return text


def _are(given: Any, is_one: Callable[[Any], Any]) -> bool:
    return isinstance(given, list | tuple) and bool(given) and all(map(is_one, given))


def _is_structure(given: Any) -> bool:
    return (
        isinstance(given, Mapping)
        and given.keys() == {"begin", "schema", "end"}
        and isinstance(given["begin"], str)
        and isinstance(given["end"], str)
        and isinstance(given["schema"], Mapping | bool)
    )
