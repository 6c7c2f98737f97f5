"""Random JSON schemas whose documents are short, of all that llguidance keeps to."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

import jsonschema

Schema = dict[str, Any]

_NAMES = ("id", "name", "größe", "tags", "x-y", "a b", 'quote"d', "日本", "😀", "back\\slash")
_WORDS = ("red", "green", "", "naïve", "日本語", "😀", 'a "b"', "\\n", "line\nbreak", "e\u0301")
_PATTERNS = ("^[a-z]{1,5}$", "^\\d{2,3}-[A-F]$", "^(ab|cd){1,3}$", "^[à-ü]{2}$", "^\\w{1,3}!?$")
_FORMATS = ("date", "ipv4", "uuid")


def random_schema(seed: int) -> Schema:
    """A schema with objects, arrays, references and all kinds of values, at most three deep."""
    maker = _Maker(random.Random(f"schema {seed}"))
    kind = maker.rng.choice((maker.object, maker.object, maker.array, maker.any_of))
    schema = kind(3)
    if maker.definitions:
        schema["$defs"] = maker.definitions
    return schema


def assert_valid(schema: Schema, text: str) -> Any:
    """The text is a document of the schema; returns it."""
    document = json.loads(text)
    kind = jsonschema.Draft202012Validator
    kind.check_schema(schema)
    kind(schema, format_checker=kind.FORMAT_CHECKER).validate(document)
    return document


class _Maker:
    """Schemas by kind; ``depth`` is how many levels may still come."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.definitions: dict[str, Schema] = {}

    def any(self, depth: int) -> Schema:
        leaves: list[Callable[[int], Schema]] = [
            self.text,
            self.text,
            self.integer,
            self.number,
            self.fixed,
            self.simple,
        ]
        branches = [self.object, self.array, self.any_of, self.one_of, self.all_of, self.reference]
        return self.rng.choice(leaves + (branches if depth > 0 else []))(depth - 1)

    def text(self, _: int) -> Schema:
        rng = self.rng
        least = rng.randrange(4)
        return rng.choice(
            (
                {"type": "string", "minLength": least, "maxLength": least + rng.randrange(12)},
                {"type": "string", "pattern": rng.choice(_PATTERNS)},
                {"type": "string", "format": rng.choice(_FORMATS)},
                {"type": "string", "maxLength": rng.randrange(8)},
            )
        )

    def integer(self, _: int) -> Schema:
        low = self.rng.randrange(-5000, 5000)
        high = low + self.rng.randrange(1, 3000)
        return self.rng.choice(
            (
                {"type": "integer", "minimum": low, "maximum": high},
                {"type": "integer", "exclusiveMinimum": low, "exclusiveMaximum": high + 1},
                {"type": "integer", "minimum": 0, "maximum": 990, "multipleOf": 7},
            )
        )

    def number(self, _: int) -> Schema:
        # Without a step, decimals have no end.
        low = self.rng.randrange(-50, 50) / 4
        return self.rng.choice(
            (
                {"type": "number", "minimum": low, "maximum": low + 2.5, "multipleOf": 0.25},
                {"type": "number", "exclusiveMinimum": low, "maximum": 99, "multipleOf": 0.5},
            )
        )

    def fixed(self, _: int) -> Schema:
        values = [*self.rng.sample(_WORDS, 3), self.rng.randrange(1000), None, True, [1, "a"]]
        self.rng.shuffle(values)
        return self.rng.choice(({"const": values[0]}, {"enum": values[:4]}))

    def simple(self, _: int) -> Schema:
        return {"type": self.rng.choice(("boolean", "null", ["boolean", "null"]))}

    def object(self, depth: int) -> Schema:
        rng = self.rng
        names = rng.sample(_NAMES, rng.randint(1, 4))
        schema: Schema = {
            "type": "object",
            "properties": {name: self.any(depth - 1) for name in names},
            "additionalProperties": False,
        }
        form = rng.randrange(3)
        if form == 0:
            schema["required"] = names
        elif form == 1:
            schema["required"] = rng.sample(names, rng.randint(0, len(names)))
        else:  # other keys as well
            schema |= {"required": names, "maxProperties": len(names) + rng.randint(0, 2)}
            schema["minProperties"] = min(schema["maxProperties"], len(names) + rng.randint(0, 1))
            schema["patternProperties"] = {"^[A-Z]{1,3}$": self.any(depth - 1)}
        return schema

    def array(self, depth: int) -> Schema:
        rng = self.rng
        least = rng.randrange(3)
        schema: Schema = {"type": "array", "minItems": least, "maxItems": least + rng.randrange(3)}
        if rng.random() < 0.3:
            schema["prefixItems"] = [self.any(depth - 1) for _ in range(rng.randint(1, 2))]
            schema["items"] = rng.choice((False, {"type": "null"}))
            schema["minItems"] = min(least, len(schema["prefixItems"]))
            schema["maxItems"] = len(schema["prefixItems"]) + (schema["items"] is not False)
        else:
            schema["items"] = self.any(depth - 1)
        return schema

    def any_of(self, depth: int) -> Schema:
        return {"anyOf": [self.any(depth - 1) for _ in range(self.rng.randint(2, 3))]}

    def one_of(self, depth: int) -> Schema:
        kinds = self.rng.sample((self.text, self.integer, self.simple, self.array), 2)
        return {"oneOf": [kind(depth - 1) for kind in kinds]}

    def all_of(self, _: int) -> Schema:
        low = self.rng.randrange(100)
        return {"allOf": [{"type": "integer", "minimum": low}, {"maximum": low + 50}]}

    def reference(self, depth: int) -> Schema:
        name = f"part{len(self.definitions)}"
        self.definitions[name] = {}  # the name is taken
        self.definitions[name] = self.any(depth - 1)
        return {"$ref": f"#/$defs/{name}"}
