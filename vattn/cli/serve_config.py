"""The file of ``vattn serve --config``, and variables of the environment that nobody reads."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import typer

from vattn.cli.console import BadInput, one_line

# Read elsewhere, or by tools beside the server.
_OTHERS = frozenset({"BUDGET", "LIBCUDA", "ALLOCATOR", "FAKE_CUDA"})
# What Kubernetes sets for a service that is named vattn.
_KUBERNETES = re.compile(r"(SERVICE_(HOST|PORT(_\w+)?)|PORT_\d+_\w+)")


def read_config(context: typer.Context, path: Path | None) -> Path | None:
    """Makes a file's settings the defaults of the command's flags.

    Raises:
        BadInput: it cannot be read, or has a key that is no flag.
    """
    if path is None:
        return None
    import yaml

    try:
        found = yaml.safe_load(path.read_text())
    except (OSError, UnicodeError, yaml.YAMLError) as error:
        raise BadInput(f"--config {path} cannot be read: {one_line(error)}") from error
    if found is None:
        found = {}
    if not isinstance(found, dict):
        raise BadInput(f"--config {path} must hold lines such as max-num-seqs: 64")
    parameters = {each.name: each for each in context.command.params if each.name != "config"}
    defaults = {}
    for key, value in found.items():
        name = str(key).replace("-", "_")
        if name not in parameters:
            raise BadInput(
                f"--config {path}: {key!r} is no flag of vattn serve; see vattn serve --help"
            )
        if value is not None:
            defaults[name] = _as_given(path, str(key), value, parameters[name])
    context.default_map = defaults
    return path


def _as_given(path: Path, key: str, value: Any, parameter: Any) -> Any:
    """A value as the command line would give it."""
    is_switch = getattr(parameter, "is_flag", False)
    if is_switch != isinstance(value, bool):
        should = "true or false" if is_switch else "no true or false"
        raise BadInput(f"--config {path}: {key}: {json.dumps(value)} must be {should}")
    if is_switch:
        return value
    if parameter.multiple:
        return [str(each) for each in (value if isinstance(value, list) else [value])]
    if isinstance(value, list) or (isinstance(value, dict) and key[:11] != "speculative"):
        raise BadInput(f"--config {path}: {key}: {json.dumps(value)} must be one value")
    return json.dumps(value) if isinstance(value, dict) else str(value)


def unknown_variables(prefix: str, known: Collection[str]) -> list[str]:
    """Variables of the environment that look like settings and are none."""
    found = (name.removeprefix(prefix) for name in os.environ if name.startswith(prefix))
    return sorted(
        prefix + name
        for name in found
        if prefix + name not in known and name not in _OTHERS and not _KUBERNETES.fullmatch(name)
    )
