"""``vattn serve``: the OpenAI-compatible server."""

from __future__ import annotations

import inspect
import json
import logging
import math
import os
from collections.abc import Callable
from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from vattn.cli.console import BadInput, CliError, one_line
from vattn.cli.decoding import read_speculative
from vattn.cli.options import size
from vattn.cli.serve_config import unknown_variables
from vattn.cli.serve_flags import PREFIX, Flags, variable

if TYPE_CHECKING:
    from vattn.async_llm import AsyncLLM
    from vattn.server.settings import ServerSettings

EMBEDDED_NAME = "embedded"
# Flags of the engine that go to it as they are.
_ENGINE = (
    "max_model_len",
    "max_num_seqs",
    "max_num_batched_tokens",
    "gpu_memory_utilization",
    "kv_cache_memory_bytes",
    "swap_space",
    "enable_prefix_caching",
    "enable_chunked_prefill",
    "scheduling_policy",
    "attention_backend",
    "order",
    "layers_per_region",
    "enforce_eager",
    "max_logprobs",
    "seed",
)
_LOADING = ("tokenizer", "revision", "dtype", "device")
# Flags of the server whose settings are named otherwise.
_RENAMED = {
    "api_key": "api_keys",
    "admin_api_key": "admin_keys",
    "served_model_name": "served_model_names",
    "drain_timeout": "drain_timeout_s",
    "request_timeout": "request_timeout_s",
    "body_timeout": "body_timeout_s",
}
# Of difflib: a letter or two of a name.
_NEAR = 0.8

logger = logging.getLogger("vattn.server")


def serve(**given: Any) -> None:
    """Serve a model behind OpenAI's API, with metrics at /metrics and a live page at /.

    Without a model it serves the embedded one. Each flag can be set by an environment variable:
    --max-num-seqs by VATTN_MAX_NUM_SEQS.
    """
    flags = Flags(**given)
    unknown = _unknown_variables()
    settings = server_settings(flags)
    options = engine_options(flags)
    # Only what can work comes here: now torch and the server may be imported.
    from vattn import logs

    logs.setup(settings.log_level, settings.log_format)
    for name in unknown:
        logger.warning("%s in the environment is no setting of vattn serve; ignored", name)
    raise typer.Exit(_run(flags.model, settings, options))


serve.__signature__ = inspect.signature(Flags)  # type: ignore[attr-defined]
serve.__annotations__ = {**Flags.__annotations__, "return": None}


def _unknown_variables() -> list[str]:
    """Variables that look like settings and are none.

    Raises:
        BadInput: one looks like a mistyped setting, or has a key that would guard nothing.
    """
    known = [variable(field.name) for field in fields(Flags)]
    names = [each.removeprefix(PREFIX) for each in known]
    for name in known:
        if name.endswith("KEY") and not os.environ.get(name, name).strip():
            raise BadInput(f"{name} in the environment is empty and guards nothing; unset it")
    unknown = unknown_variables(PREFIX, known)
    for name in unknown:
        near = get_close_matches(name.removeprefix(PREFIX), names, n=1, cutoff=_NEAR)
        if near or "KEY" in name:
            meant = variable(near[0] if near else "api_key")
            raise BadInput(
                f"{name} in the environment is no setting of vattn serve; use {meant}, or unset it"
            )
    return unknown


def server_settings(flags: Flags) -> ServerSettings:
    """The settings of the server.

    Raises:
        BadInput: a value that it cannot have.
    """
    from vattn.server.settings import ServerSettings

    known = {field.name for field in fields(ServerSettings)}
    chosen: dict[str, Any] = {"served_model_names": (flags.model or EMBEDDED_NAME,)}
    for field in fields(Flags):
        name, value = _RENAMED.get(field.name, field.name), getattr(flags, field.name)
        if name in known and value not in (None, []):
            chosen[name] = tuple(value) if isinstance(value, list) else value
    chosen["max_body_bytes"] = size("--max-body-bytes", flags.max_body_bytes) or 16 << 20
    chosen["page"] = not flags.disable_page
    if flags.chat_template is not None:
        chosen["chat_template"] = read_template(flags.chat_template)
    try:
        return ServerSettings(**chosen)
    except ValueError as error:
        raise BadInput(_with_flags(error)) from error


def engine_options(flags: Flags) -> dict[str, Any]:
    """The arguments of AsyncLLM.

    Raises:
        BadInput: a value that the engine cannot have.
    """
    from vattn.engine.config import EngineConfig

    names = (name for name in _ENGINE if getattr(flags, name) is not None)
    options = {name: getattr(flags, name) for name in names}
    if (page_bytes := size("--page-bytes", flags.page_bytes)) is not None:
        options["page_bytes"] = page_bytes
    if (speculative := read_speculative(flags.speculative_config)) is not None:
        options["speculative_config"] = speculative
    try:
        EngineConfig(**options)
    except ValueError as error:
        raise BadInput(_with_flags(error)) from error
    for name in ("engine_timeout", "start_timeout"):
        if (seconds := getattr(flags, name)) is not None:
            if not 0 < seconds < math.inf:
                flag = f"--{name.replace('_', '-')}"
                raise BadInput(f"{flag} {seconds:g} must be above 0, and finite")
            options[f"{name}_s"] = seconds
    loading = {name: getattr(flags, name) for name in _LOADING}
    return options | {name: value for name, value in loading.items() if value is not None}


def read_template(given: str) -> str:
    """The text of --chat-template, which may be a file's name.

    Raises:
        BadInput: neither.
    """
    if "{" in given or "\n" in given:
        return given
    try:
        return Path(given).read_text()
    except (OSError, UnicodeError) as error:
        raise BadInput(f"--chat-template {given} cannot be read: {one_line(error)}") from error


def _run(model: str | None, settings: ServerSettings, options: dict[str, Any]) -> int:
    from vattn.async_llm import AsyncLLM
    from vattn.engine_process.errors import EngineDeadError
    from vattn.server.http import AddressError
    from vattn.server.run import serve as run

    def make() -> AsyncLLM:
        return AsyncLLM(
            model, log_level=settings.log_level, log_format=settings.log_format, **options
        )

    name = model or "the embedded model"
    logger.info("loading %s", name)
    try:
        return run(make, settings, _teller(name, settings))
    except AddressError as error:
        where = f"--host {settings.host} --port {settings.port}"
        raise CliError(f"{where}: {one_line(error)}; give another port or host") from error
    except ValueError as error:
        raise BadInput(_with_flags(error)) from error
    except EngineDeadError as error:
        raise CliError(f"the engine does not start: {one_line(error)}") from error


def _teller(name: str, settings: ServerSettings) -> Callable[[str, AsyncLLM], None]:
    def tell(url: str, llm: AsyncLLM) -> None:
        facts = llm.facts
        logger.info("%s in %s on %s serves at %s", name, facts.dtype, facts.device, url)
        if settings.page:
            typer.echo(f"live page: {url}/")
        typer.echo(f"try it:    {curl_line(url, settings)}")

    return tell


def curl_line(url: str, settings: ServerSettings) -> str:
    """A command that gets text from the server."""
    body = {
        "model": settings.served_model_names[0],
        "prompt": "A transaction is a group of statements",
        "max_tokens": 32,
    }
    parts = ["curl", f"{url}/v1/completions"]
    if url.startswith("https:"):
        parts.append("--insecure")  # the certificate is hardly one for this address
    parts.append("-H 'Content-Type: application/json'")
    if settings.api_keys:
        parts.append('-H "Authorization: Bearer $VATTN_API_KEY"')  # a log is no place for a key
    parts.append("-d '" + json.dumps(body).replace("'", "'\\''") + "'")
    return " ".join(parts)


def _with_flags(error: ValueError) -> str:
    """A message about a setting as one about its flag."""
    text = one_line(error)
    for field in fields(Flags):
        name = _RENAMED.get(field.name, field.name)
        if text.startswith((f"{name}=", f"{name} ")):
            return f"--{field.name.replace('_', '-')} {text[len(name) + 1 :]}"
    return text
