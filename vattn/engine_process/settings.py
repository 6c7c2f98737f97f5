"""Checks what an engine process is to be made of, before it is started."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vattn import logs
from vattn.engine.config import EngineConfig, known_options
from vattn.engine_process.messages import VERSION, Start, encode
from vattn.models import tiny_path

_FACTORY = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
_FACTORY_REMEDY = 'make the LLM in the engine process by llm_factory="package.module:function"'


def start_command(
    model: str | Path | None,
    options: dict[str, Any],
    *,
    loading: dict[str, Any],
    llm_factory: str | None,
    log_level: str,
    log_format: str,
) -> Start:
    """The first command for an engine process.

    Args:
        model: a directory or a Hub id; None for the embedded model.
        options: of :class:`EngineConfig`.
        loading: ``tokenizer``, ``dtype``, ``device`` and ``revision``; those that are None are left
            out.
        llm_factory: see :class:`vattn.AsyncLLM`.
        log_level: of the engine process.
        log_format: of the engine process.

    Raises:
        TypeError: an option that does not exist.
        ValueError: a value out of range, or one that cannot be sent to another process.
    """
    known_options(options, "AsyncLLM()")
    for name in ("scheduling_policy", "eviction_policy"):
        value = options.get(name)
        if value is not None and not isinstance(value, str):
            raise ValueError(
                f"{name}={value!r} is an object, which cannot be sent to another process; "
                f"{_FACTORY_REMEDY}"
            )
    EngineConfig(**options)
    model = tiny_path() if model is None else model
    _check_text("model", model)
    for name, value in loading.items():
        if value is not None:
            _check_text(name, value)
    if llm_factory is not None and not _FACTORY.fullmatch(str(llm_factory)):
        raise ValueError(f'llm_factory={llm_factory!r} must be "package.module:function"')
    for name, given, known in (
        ("log_level", log_level, logs.LEVELS),
        ("log_format", log_format, logs.FORMATS),
    ):
        if given not in known:
            raise ValueError(f"{name}={given!r} must be one of {', '.join(known)}")
    settings = {name: _plain(value) for name, value in loading.items() if value is not None}
    for name, value in options.items():
        settings[name] = _plain(value)
        try:
            encode(settings[name])
        except (TypeError, ValueError, OverflowError) as error:
            raise ValueError(
                f"{name}={value!r} cannot be sent to another process ({error}); {_FACTORY_REMEDY}"
            ) from error
    return Start(VERSION, str(model), settings, llm_factory, log_level, log_format)


def check_seconds(name: str, value: Any) -> float:
    """A number of seconds.

    Raises:
        ValueError: not a finite positive number.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(f"{name}={value!r} must be a finite number of seconds above 0")
    return float(value)


def _check_text(name: str, value: Any) -> None:
    if not isinstance(value, str | Path):
        raise ValueError(
            f"{name}={value!r} is an object, which cannot be sent to another process; give its "
            f"name, or {_FACTORY_REMEDY}"
        )


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | range):
        return [_plain(item) for item in value]
    return value
