"""The flags of ``vattn serve``: names are vLLM's, and each one has an environment variable.

``--max-num-seqs`` is ``VATTN_MAX_NUM_SEQS`` in the environment and ``max-num-seqs`` in a file for
``--config``; a flag goes before the environment, that before the file, and that before the default.
"""

# No `from __future__ import annotations`: typer is given these annotations by serve.py.
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import typer

from vattn.cli.options import option, to_float, to_int
from vattn.cli.serve_config import read_config

PREFIX = "VATTN_"

_MODEL, _SERVER, _KEYS = "Model", "Server", "Keys"
_BATCHING, _MEMORY, _CHAT, _LIMITS = "Batching", "Memory", "API", "Limits"

_Text: TypeAlias = str | None
_Int: TypeAlias = int | None
_Float: TypeAlias = float | None
_Many: TypeAlias = list[str] | None


def variable(name: str) -> str:
    """The environment variable of a flag or field."""
    return PREFIX + name.removeprefix("--").replace("-", "_").upper()


def to_port(text: Any) -> int:
    """The parser of --port."""
    if str(text).startswith("tcp://"):
        raise typer.BadParameter(
            f"{text!r} is no port: Kubernetes sets VATTN_PORT to it for a service that is named "
            "vattn; name the service otherwise, set enableServiceLinks: false, or give --port"
        )
    return to_int(text)


def _flag(name: str, panel: str, text: str, metavar: str | None = None, **how: Any) -> Any:
    first = name.partition("/")[0]
    return option(name, panel=panel, help=text, metavar=metavar, envvar=variable(first), **how)


def _whole(name: str, panel: str, text: str, **how: Any) -> Any:
    return _flag(name, panel, text, "N", parser=how.get("parser", to_int))


def _number(name: str, panel: str, text: str, metavar: str = "X") -> Any:
    return _flag(name, panel, text, metavar, parser=to_float)


def _switch(name: str, panel: str, text: str) -> Any:
    return _flag(f"{name}/--no-{name.removeprefix('--')}", panel, text)


@dataclass(frozen=True, kw_only=True)
class Flags:
    """What was given; None, and for lists nothing, leaves a setting at its default."""

    model: Annotated[
        _Text,
        typer.Argument(
            metavar="MODEL",
            envvar=variable("model"),
            help="A model directory or an id of the Hugging Face Hub; default: the embedded model.",
            show_default=False,
        ),
    ] = None
    config: Annotated[
        Path | None,
        _flag(
            "--config",
            _SERVER,
            "Settings in YAML: keys are flags without the dashes before them.",
            "FILE",
            is_eager=True,
            callback=read_config,
        ),
    ] = None
    host: Annotated[
        _Text,
        _flag(
            "--host",
            _SERVER,
            "Address to listen on; default 127.0.0.1, 0.0.0.0 for all.",
            "ADDRESS",
        ),
    ] = None
    port: Annotated[
        _Int, _whole("--port", _SERVER, "Default 8000; 0 for a free one.", parser=to_port)
    ] = None
    ssl_keyfile: Annotated[
        _Text, _flag("--ssl-keyfile", _SERVER, "With --ssl-certfile: serve HTTPS.", "FILE")
    ] = None
    ssl_certfile: Annotated[
        _Text, _flag("--ssl-certfile", _SERVER, "The certificate, with those that sign it.", "FILE")
    ] = None
    log_level: Annotated[
        _Text, _flag("--log-level", _SERVER, "debug, info, warning or error; default info.", "NAME")
    ] = None
    log_format: Annotated[
        _Text, _flag("--log-format", _SERVER, "text, or json for an object a line.", "NAME")
    ] = None
    drain_timeout: Annotated[
        _Float,
        _number(
            "--drain-timeout",
            _SERVER,
            "How long what runs may take to end after SIGTERM; default 30.",
            "SECONDS",
        ),
    ] = None
    engine_timeout: Annotated[
        _Float,
        _number(
            "--engine-timeout",
            _SERVER,
            "A step that takes longer counts as a hang, and the engine starts anew; default 120.",
            "SECONDS",
        ),
    ] = None
    start_timeout: Annotated[
        _Float,
        _number(
            "--start-timeout",
            _SERVER,
            "For the model to be fetched and loaded; default 1800.",
            "SECONDS",
        ),
    ] = None
    disable_page: Annotated[bool, _flag("--disable-page", _SERVER, "No live page at /.")] = False
    api_key: Annotated[
        _Many,
        _flag(
            "--api-key",
            _KEYS,
            "Clients need one; can be given several times. The environment hides it from others.",
            "KEY",
        ),
    ] = None
    admin_api_key: Annotated[
        _Many,
        _flag("--admin-api-key", _KEYS, "Needed for /admin; default: those of --api-key.", "KEY"),
    ] = None
    allowed_origins: Annotated[
        _Many,
        _flag(
            "--allowed-origins",
            _KEYS,
            "Other sites whose pages may ask (CORS); can be given several times.",
            "ORIGIN",
        ),
    ] = None
    served_model_name: Annotated[
        _Many,
        _flag(
            "--served-model-name",
            _MODEL,
            "Clients name the model so; can be given several times, the first is in responses.",
            "NAME",
        ),
    ] = None
    tokenizer: Annotated[
        _Text, _flag("--tokenizer", _MODEL, "Of another directory or id.", "DIR|ID")
    ] = None
    revision: Annotated[_Text, _flag("--revision", _MODEL, "Of a Hub model.", "NAME")] = None
    dtype: Annotated[
        _Text,
        _flag("--dtype", _MODEL, "auto (the model's own), float32, float16 or bfloat16.", "NAME"),
    ] = None
    device: Annotated[
        _Text, _flag("--device", _MODEL, "Default: the GPU where there is one.", "cpu|cuda[:N]")
    ] = None
    max_model_len: Annotated[
        _Int,
        _whole(
            "--max-model-len",
            _MODEL,
            "Longest prompt and output together; default: the model's limit.",
        ),
    ] = None
    attention_backend: Annotated[
        _Text,
        _flag(
            "--attention-backend",
            _MODEL,
            "By name; default: the first that can serve the model.",
            "NAME",
        ),
    ] = None
    enforce_eager: Annotated[
        bool, _switch("--enforce-eager", _MODEL, "No CUDA graphs: begin sooner, decode slower.")
    ] = False
    seed: Annotated[_Int, _whole("--seed", _MODEL, "Of requests without one; default 0.")] = None
    speculative_config: Annotated[
        _Text,
        _flag(
            "--speculative-config",
            _MODEL,
            'Guess tokens: \'{"method": "ngram", "num_speculative_tokens": 5}\'.',
            "JSON",
        ),
    ] = None
    max_num_seqs: Annotated[
        _Int,
        _whole("--max-num-seqs", _BATCHING, "Sequences that are computed at once; default 256."),
    ] = None
    max_num_batched_tokens: Annotated[
        _Int, _whole("--max-num-batched-tokens", _BATCHING, "Tokens of one step; default 8192.")
    ] = None
    enable_chunked_prefill: Annotated[
        bool | None,
        _switch(
            "--enable-chunked-prefill",
            _BATCHING,
            "Long prompts take several steps, beside others; default yes.",
        ),
    ] = None
    scheduling_policy: Annotated[
        _Text,
        _flag(
            "--scheduling-policy", _BATCHING, "fcfs, or priority for smaller values first.", "NAME"
        ),
    ] = None
    gpu_memory_utilization: Annotated[
        _Float,
        _number(
            "--gpu-memory-utilization",
            _MEMORY,
            "Share of the device's memory for all; default 0.9 of a GPU.",
        ),
    ] = None
    kv_cache_memory_bytes: Annotated[
        _Text,
        _flag(
            "--kv-cache-memory-bytes", _MEMORY, "The cache's budget itself, such as 4GiB.", "SIZE"
        ),
    ] = None
    swap_space: Annotated[
        _Float,
        _number(
            "--swap-space",
            _MEMORY,
            "GiB of host memory for sequences that must give way; default 4 beside a GPU.",
        ),
    ] = None
    enable_prefix_caching: Annotated[
        bool | None,
        _switch(
            "--enable-prefix-caching", _MEMORY, "Reuse what finished requests left; default yes."
        ),
    ] = None
    page_bytes: Annotated[
        _Text,
        _flag(
            "--page-bytes",
            _MEMORY,
            "Of a physical page, such as 64KiB; default: the driver's.",
            "SIZE",
        ),
    ] = None
    order: Annotated[
        _Text, _flag("--order", _MEMORY, "Layout of a slot; default: the faster one.", "token|head")
    ] = None
    layers_per_region: Annotated[
        _Int,
        _whole(
            "--layers-per-region",
            _MEMORY,
            "Layers whose K and V share addresses; see the documentation.",
        ),
    ] = None
    chat_template: Annotated[
        _Text,
        _flag(
            "--chat-template", _CHAT, "A Jinja template instead of the tokenizer's.", "FILE|TEXT"
        ),
    ] = None
    enable_auto_tool_choice: Annotated[
        bool, _switch("--enable-auto-tool-choice", _CHAT, "The model may choose to call tools.")
    ] = False
    tool_call_parser: Annotated[
        _Text,
        _flag("--tool-call-parser", _CHAT, "How it writes calls: hermes or llama3_json.", "NAME"),
    ] = None
    max_logprobs: Annotated[
        _Int, _whole("--max-logprobs", _CHAT, "Most to ask for; -1: all; default 20.")
    ] = None
    max_queued_requests: Annotated[
        _Int,
        _whole(
            "--max-queued-requests",
            _LIMITS,
            "Samples (n of each prompt) that may wait beside those that run; default 2048.",
        ),
    ] = None
    max_queued_tokens: Annotated[
        _Int,
        _whole(
            "--max-queued-tokens",
            _LIMITS,
            "Tokens of all unfinished samples, with those to come; more get 429.",
        ),
    ] = None
    max_body_bytes: Annotated[
        _Text,
        _flag(
            "--max-body-bytes", _LIMITS, "Of a request; larger ones get 413. Default 16MiB.", "SIZE"
        ),
    ] = None
    request_timeout: Annotated[
        _Float,
        _number(
            "--request-timeout", _LIMITS, "A request ends after it with what it has.", "SECONDS"
        ),
    ] = None
    body_timeout: Annotated[
        _Float,
        _number(
            "--body-timeout",
            _LIMITS,
            "For a request to arrive; slower ones get 408. Default 30.",
            "SECONDS",
        ),
    ] = None
