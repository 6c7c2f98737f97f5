"""The engine process from its first command to its exit code."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from importlib import import_module
from typing import Any

import torch
import zmq
from huggingface_hub.utils import logging as hub_logging
from transformers import AutoConfig
from transformers.utils import logging as transformers_logging

from vattn import logs
from vattn.engine.defaults import default_model_len, default_page_bytes, few_threads, is_embedded
from vattn.engine_process.intake import CommandReader
from vattn.engine_process.loop import Loop
from vattn.engine_process.messages import (
    VERSION,
    Facts,
    Ready,
    Start,
    StartFailed,
    decode_command,
    encode,
)
from vattn.hf.checks import longest_sequence, one_line
from vattn.kv.pool import parse_device
from vattn.llm import LLM

STOPPED, FAILED, NOT_STARTED = 0, 1, 2  # exit codes
_LINGER_MS = 5000

_log = logging.getLogger(__name__)


def run(commands_address: str, news_address: str) -> int:
    """Serves one owner; the exit code.

    Args:
        commands_address: zmq address of the owner's PAIR socket that sends commands.
        news_address: of the one that takes news.
    """
    context = zmq.Context()
    commands, news = _connect(context, commands_address), _connect(context, news_address)
    try:
        return _serve(commands, news)
    except Exception:
        _log.exception("the engine failed; what it was computing is lost")
        return FAILED
    finally:
        commands.close()
        news.close(linger=_LINGER_MS)
        context.term()


def _connect(context: zmq.Context[zmq.Socket[bytes]], address: str) -> zmq.Socket[bytes]:
    socket = context.socket(zmq.PAIR)
    socket.set_hwm(0)
    socket.linger = 0
    socket.connect(address)
    return socket


def _serve(commands: zmq.Socket[bytes], news: zmq.Socket[bytes]) -> int:
    try:
        start = _read_start(commands.recv())
        llm = make_llm(start)
        if start.budget_bytes is not None:
            llm.engine.storage.memory.set_budget(start.budget_bytes)
    except Exception as error:
        is_input = isinstance(error, ValueError | TypeError | OSError)
        if not is_input:
            _log.exception("the engine could not be made")
        text = one_line(error, 2000)
        news.send(
            encode(StartFailed(text if is_input else f"{type(error).__name__}: {text}", is_input))
        )
        return NOT_STARTED
    with few_threads(llm.model):
        loop = Loop(llm.engine, news.send)
        news.send(encode(Ready(facts_of(llm, start.model))))
        _log.info("the engine serves %s", start.model)
        with CommandReader(commands, llm.engine, loop):
            loop.run()
    llm.close()
    return STOPPED


def _read_start(data: bytes) -> Start:
    start = decode_command(data)
    if not isinstance(start, Start):
        raise TypeError(f"the first command is a {type(start).__name__}, not a Start")
    if start.version != VERSION:
        raise ValueError(
            f"the owner speaks version {start.version} of the messages, this engine {VERSION}; "
            "install the same vattn for both"
        )
    logs.setup(start.log_level, start.log_format)
    quiet_libraries()
    return start


def quiet_libraries() -> None:
    """Only errors of those that load models."""
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    hub_logging.set_verbosity_error()  # type: ignore[no-untyped-call]


def make_llm(start: Start) -> LLM:
    """The LLM that an owner asks for.

    Raises:
        TypeError: an option that does not exist, or a factory that makes something else.
        ValueError: a value out of range, a model that cannot be served, or no such factory.
        OSError: a model that cannot be read.
    """
    if start.factory is not None:
        llm = _find_factory(start.factory)(start.model, **start.settings)
        if not isinstance(llm, LLM):
            raise TypeError(f"llm_factory={start.factory!r} made {llm!r}, which is no vattn.LLM")
        return llm
    return LLM(start.model, **with_defaults(start.model, start.settings))


def _find_factory(name: str) -> Any:
    module, colon, function = name.partition(":")
    if not (module and colon and function):
        raise ValueError(f'llm_factory={name!r} must be "package.module:function"')
    try:
        found = getattr(import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"llm_factory={name!r} cannot be found: {error}") from error
    return found


def with_defaults(model: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings, with lengths and sizes that suit the model where none were given."""
    out = dict(settings)
    embedded = is_embedded(model)
    if out.get("max_model_len") is None:
        limit = None
        if not embedded:
            try:
                limit = longest_sequence(
                    AutoConfig.from_pretrained(
                        model, revision=out.get("revision"), trust_remote_code=False
                    )
                )
            except Exception:  # whatever it is, the LLM refuses the model, and says why
                return out
        out["max_model_len"] = default_model_len(limit, embedded=embedded)
    if embedded and out.get("page_bytes") is None:
        out["page_bytes"] = default_page_bytes(_device(out.get("device")), embedded=True)
    return out


def _device(name: str | None) -> torch.device:
    return parse_device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def facts_of(llm: LLM, model: str) -> Facts:
    """What callers need to know of it."""
    engine = llm.engine
    loaded, config, storage = engine.loaded, engine.config, engine.storage
    regions, policy = storage.cache.layout.regions, config.scheduling_policy
    page_bytes = storage.pool.page_bytes if storage.pool else 0
    return Facts(
        model=model,
        dtype=str(loaded.dtype).removeprefix("torch."),
        device=str(loaded.device),
        vocab_size=loaded.vocab_size,
        max_model_len=engine.max_model_len,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.step_tokens,
        eos_token_ids=sorted(loaded.eos_token_ids),
        generation_defaults=dict(loaded.generation_defaults),
        generation_ignored=list(loaded.generation_ignored),
        page_bytes=page_bytes,
        slots=storage.cache.max_seqs,
        slot_pages=sum(region.slot_bytes // page_bytes for region in regions) if page_bytes else 0,
        budget_bytes=storage.pool.stats().budget_bytes if storage.pool else 0,
        enable_prefix_caching=config.enable_prefix_caching,
        scheduling_policy=policy if isinstance(policy, str) else "function",
        max_logprobs=config.max_logprobs,
        attention_backend=storage.backend.name,
    )
