"""Sampling parameters as plain data, for messages between processes."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from vattn.sampling_params import SamplingParams, StructuredOutputsParams


def to_wire(params: SamplingParams) -> dict[str, Any]:
    """The fields that are not at their defaults.

    ``output_kind`` is left out: outputs are made where they are read, and the engine does not need
    it. A :class:`StructuredOutputsParams` becomes a mapping.
    """
    wire = _differing(params, SamplingParams())
    wire.pop("output_kind", None)
    if params.structured_outputs is not None:
        given = params.structured_outputs
        wire["structured_outputs"] = {
            field.name: getattr(given, field.name)
            for field in fields(given)
            if getattr(given, field.name) != field.default
        }
    return wire


def from_wire(wire: dict[str, Any]) -> SamplingParams:
    """The parameters again, checked as always.

    Raises:
        TypeError: a field that does not exist.
        ValueError: a value out of range.
    """
    given = dict(wire)
    if given.get("structured_outputs") is not None:
        given["structured_outputs"] = StructuredOutputsParams(**given["structured_outputs"])
    return SamplingParams(**given)


def _differing(params: SamplingParams, default: SamplingParams) -> dict[str, Any]:
    return {
        field.name: getattr(params, field.name)
        for field in fields(params)
        if getattr(params, field.name) != getattr(default, field.name)
    }
