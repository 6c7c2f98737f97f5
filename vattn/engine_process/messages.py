"""What an engine process and its owner say to each other, as msgpack over two sockets.

The owner sends *commands*; the first one is :class:`Start`. The engine sends *news*; the first one
is :class:`Ready` or :class:`StartFailed`, and after each step that told somebody something there is
one :class:`Steps`. Handles are the owner's numbers for prompts, and never used twice for one engine
process.

Structures are arrays on the wire, each behind its tag, so both sides must be of one version:
:data:`VERSION` is part of Start.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import msgspec

from vattn.kv.report import CacheStats
from vattn.metrics import EngineStats
from vattn.outputs import KVUsage, Timings

VERSION = 2


class Message(msgspec.Struct, array_like=True, tag=True, frozen=True, gc=False):
    """One message."""


# Commands -----------------------------------------------------------------------------------------


class Start(Message, frozen=True):
    """What the engine is to be made of.

    Args:
        version: of these messages.
        model: a directory or an id of the Hugging Face Hub.
        settings: ``tokenizer``, ``dtype``, ``device``, ``revision``, and the options of
            :class:`vattn.engine.config.EngineConfig`; for ``vattn.LLM``.
        factory: ``"package.module:function"`` that makes the LLM of ``model`` and ``settings``
            instead of :class:`vattn.LLM`; None for that.
        log_level: of the engine process.
        log_format: ``"text"`` or ``"json"``.
        budget_bytes: of the KV cache, in place of what the settings say; None for that.
    """

    version: int
    model: str
    settings: dict[str, Any]
    factory: str | None = None
    log_level: str = "info"
    log_format: str = "text"
    budget_bytes: int | None = None


class Add(Message, frozen=True):
    """A prompt and its ``n`` samples.

    ``params`` are the fields of SamplingParams that are not at their defaults; see
    :func:`vattn.engine_process.params.to_wire`. ``deadline_s`` is of the machine's monotonic clock.
    """

    handle: int
    name: str  # for logs and errors
    prompt_ids: list[int]
    params: dict[str, Any]
    priority: int = 0
    cache_salt: str = ""
    deadline_s: float | None = None


class Abort(Message, frozen=True):
    """The end of prompts. Unknown and finished ones are left as they are; the end is told."""

    handles: list[int]


class Ask(Message, frozen=True):
    """A question or an order; :class:`Answer` or :class:`Trouble` with the same ``number`` follows.

    ``what``: ``"set_budget"`` (argument: bytes; answer: :class:`BudgetReport`), ``"memory_map"``
    (argument: most cells of a row; answer: :class:`PageRows`), ``"reset_prefix_cache"``,
    ``"check"`` (the invariants of engine and pool; for tests and the curious), ``"stats"`` (answer:
    :class:`Stats`).
    """

    number: int
    what: str
    argument: Any = None


class Stop(Message, frozen=True):
    """Ends the engine process; what runs is aborted."""


Command: TypeAlias = Start | Add | Abort | Ask | Stop

# News ---------------------------------------------------------------------------------------------


class Facts(Message, frozen=True):
    """What callers need to know of the model and the engine; it does not change."""

    model: str
    dtype: str
    device: str
    vocab_size: int
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    eos_token_ids: list[int]
    generation_defaults: dict[str, Any]  # arguments of SamplingParams
    generation_ignored: list[str]
    page_bytes: int
    slots: int
    slot_pages: int  # pages of a whole slot, over all regions and runs
    budget_bytes: int
    enable_prefix_caching: bool
    scheduling_policy: str
    max_logprobs: int
    attention_backend: str


class Ready(Message, frozen=True):
    """The engine serves."""

    facts: Facts


class StartFailed(Message, frozen=True):
    """It could not be made, and the process ends.

    ``is_input``: the settings or the model are at fault; another try would fail as well.
    """

    error: str
    is_input: bool


class Progress(Message, frozen=True):
    """What is new of one sample.

    Args:
        handle: of its prompt.
        index: of the sample.
        tokens: new ones.
        cached: prompt tokens that were found in the cache.
        logprobs: for each new token ``{token: (logprob, rank)}``, if they were asked for.
        prompt_logprobs: of the prompt, those not told before; None stands for the first token.
        end: how it ended; None while it goes on.
    """

    handle: int
    index: int
    tokens: list[int]
    cached: int = 0
    logprobs: list[dict[int, tuple[float, int]]] | None = None
    prompt_logprobs: list[dict[int, tuple[float, int]] | None] | None = None
    end: End | None = None


class End(Message, frozen=True):
    """How a sample ended. ``timings`` are in seconds of the machine's monotonic clock."""

    finish_reason: str
    stop_reason: int | str | None
    error: str | None
    timings: Timings
    kv: KVUsage | None
    preemptions: int = 0


class Refused(Message, frozen=True):
    """The prompt cannot be served: its tokens or parameters are at fault, and the text says how."""

    handle: int
    error: str


class Stats(Message, frozen=True):
    """Figures of this moment.

    Args:
        engine: its ``cache`` is None here.
        cache: of the KV cache.
        pool: as of :class:`vattn.kv.pool.PoolStats`.
        driver_calls: for each kind of call of the driver how many, and seconds in all.
        requests: of unfinished samples, in the scheduler's order and at most 256: handle, index,
            :class:`vattn.request.Status` and computed tokens.
        step_seconds: of the last step.
        step_tokens: computed in the last step.
        monotonic_s: when.
    """

    engine: EngineStats
    cache: CacheStats
    pool: dict[str, int]
    driver_calls: dict[str, tuple[int, float]]
    step_seconds: float
    step_tokens: int
    monotonic_s: float
    requests: list[tuple[int, int, int, int]] = []


class Steps(Message, frozen=True):
    """News of a step: of samples that went on or ended. ``stats`` about four times a second."""

    progress: list[Progress]
    stats: Stats | None = None


class Row(Message, frozen=True):
    """One slot of the memory map.

    ``pages`` has one byte for each cell, a :class:`vattn.kv.report.PageState`, with
    :data:`RECYCLED` added where the page served another sequence before and went over in place.
    ``handle`` is of the prompt whose sample is in it, -1 if there is none.
    """

    slot: int
    tokens: int
    kept: int
    handle: int
    index: int
    pages: bytes


class PageRows(Message, frozen=True):
    """The virtual address space: slots with anything mapped, each row over the slot's tokens.

    A row spreads the pages of each run of a region over its cells: page ``p`` of ``n`` is in cell
    ``p * cells // n``, so that a cell stands for ``pages_per_cell`` pages at most. It shows the
    state that most needs to be seen.
    """

    page_bytes: int
    slots: int
    slot_tokens: int
    pages_per_cell: int
    rows: list[Row]


RECYCLED = 0x80


class BudgetReport(Message, frozen=True):
    """What moving the budget did, in bytes. ``returned`` went back to the device."""

    budget_before: int
    budget: int
    created_before: int
    created: int
    returned: int


class Answer(Message, frozen=True):
    """To the question with this number."""

    number: int
    value: Any = None


class Trouble(Message, frozen=True):
    """The question with this number could not be answered."""

    number: int
    error: str
    is_input: bool


News: TypeAlias = Ready | StartFailed | Steps | Refused | Answer | Trouble

encode = msgspec.msgpack.Encoder().encode
decode_command = msgspec.msgpack.Decoder(Command).decode
decode_news = msgspec.msgpack.Decoder(News).decode
