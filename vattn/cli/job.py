"""Prepares a request of ``vattn generate``: device, model, limits and engine."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape

import vattn
from vattn.cli import load
from vattn.cli.beams import BeamRun, WatchedLLM
from vattn.cli.console import BadInput, CliError, notes, one_line
from vattn.cli.decoding import named, with_option_names
from vattn.cli.generate import Request, beam_params
from vattn.cli.run import Run, sampling_params
from vattn.cli.session import Session
from vattn.engine.defaults import (
    EMBEDDED_MODEL_LEN,
    MAX_DEFAULT_RESERVE_TOKENS,
    default_page_bytes,
    few_threads,
)
from vattn.engine.grammars import GrammarCompiler
from vattn.engine.setup import AHEAD_BYTES
from vattn.engine.token_sets import bad_words_ids
from vattn.hf.checks import longest_sequence
from vattn.hf.model import LoadedModel
from vattn.llm import LLM
from vattn.sampling_params import SamplingParams


def run(request: Request) -> None:
    """Generates and prints; every failure is a CliError, Ctrl-C an exit with code 130."""
    console = notes()
    load.quiet_transformers()
    device = load.find_device(request.device)
    load.check_dtype(request.dtype)
    source = load.find_model(request.model)
    if not source.is_directory:
        console.print(f"looking for {source.name} on the Hugging Face Hub", style="dim")
    config = load.load_config(source)
    tokenizer = load.load_tokenizer(source)
    # All that can be refused without the model is refused before gigabytes are loaded.
    limit = token_limit(request, longest_sequence(config), source.is_embedded)
    keep = request.decoding.choice.get("truncate_prompt_tokens")
    prompt_ids = read_tokens(request.prompts, tokenizer, limit, keep)
    longest = max(map(len, prompt_ids))
    wanted = longest + request.max_tokens
    if limit is not None and limit < wanted:
        print_shorter(console, request, limit - longest, limit)
        wanted = limit
    max_model_len = max(min(limit or 0, MAX_DEFAULT_RESERVE_TOKENS), wanted)
    check_language(request, tokenizer)
    pool = open_pool(request, device, source.is_embedded)
    try:
        with console.status(f"loading {source.name}") if console.is_terminal else nullcontext():
            llm = open_engine(request, source, tokenizer, pool, max_model_len)
        print_header(console, request, source.name, llm.model)
        if request.is_search:
            run: Run = BeamRun(llm, request, prompt_ids, beam_params(request))
        else:
            params = choose_params(console, request, llm.engine.loaded)
            run = Run(llm, request, prompt_ids, params)
        generate(request, console, run, source.name)
    except torch.OutOfMemoryError as error:
        raise CliError(
            f"out of GPU memory: {one_line(error, 200)}; use a smaller model or --device cpu"
        ) from error


def choose_params(console: Console, request: Request, loaded: LoadedModel) -> SamplingParams:
    """How to sample, and a note on what the model asks for in vain.

    Raises:
        BadInput: the model asks for something that is not possible.
    """
    if ignored := loaded.generation_ignored:
        console.print(
            f"[yellow]note:[/] the model's generation config asks for "
            f"{escape(', '.join(ignored))}, which is not served and left out",
            soft_wrap=True,
        )
    try:
        return sampling_params(request, loaded)
    except ValueError as error:  # the user's own values have been checked
        raise BadInput(
            f"the model's generation config cannot be followed: "
            f"{with_option_names(one_line(error))}; choose for yourself"
        ) from error


def generate(request: Request, console: Console, run: Run, name: str) -> None:
    """Runs a session and gives the memory back."""
    try:
        with few_threads(run.llm.model), traced(request, run.llm):
            Session(request, console, run, name).run()
    except BaseException:
        # A step that was broken off leaves requests half done; their memory goes all the same.
        run.llm.engine.cache.close()
        raise
    run.llm.close()


@contextmanager
def traced(request: Request, llm: LLM) -> Iterator[None]:
    """Has a run traced, if that is asked for.

    Raises:
        BadInput: the file cannot be written.
    """
    if request.trace_file is None:
        yield
        return
    try:
        llm.start_trace(request.trace_file, kernels=request.trace_kernels)
    except ValueError as error:
        raise BadInput(f"--trace: {one_line(error)}") from error
    try:
        yield
    finally:
        llm.stop_trace()


def token_limit(request: Request, model_limit: int | None, is_embedded: bool) -> int | None:
    """Most tokens of a prompt and its text together.

    Raises:
        BadInput: more was asked for than the model is made for.
    """
    asked = request.max_model_len
    if asked is None:
        return EMBEDDED_MODEL_LEN if is_embedded else model_limit
    if model_limit is not None and asked > model_limit:
        raise BadInput(f"--max-model-len {asked} is beyond the model's limit of {model_limit}")
    return asked


def read_tokens(
    prompts: Sequence[str], tokenizer: Any, limit: int | None, keep: int | None = None
) -> list[list[int]]:
    """The token ids of each prompt, of which the last ``keep`` are used; -1 for as many as fit.

    Raises:
        BadInput: a prompt of no tokens, or one that leaves no room for a single new token.
    """
    every: list[list[int]] = tokenizer(list(prompts), verbose=False)["input_ids"]
    if keep is not None and keep < 0:
        keep = None if limit is None else limit - 1
    if keep is not None:
        every = [ids[-keep:] for ids in every]
    for number, (prompt, ids) in enumerate(zip(prompts, every, strict=True), start=1):
        length = len(ids)
        name = f"prompt {number}" if len(prompts) > 1 else "the prompt"
        if length == 0:
            raise BadInput(f"{name}, {prompt!r}, is no token to this model; give more text")
        if limit is not None and length >= limit:
            raise BadInput(
                f"{name} has {length} tokens, but the limit for it and its text is {limit}; "
                "shorten it, set --truncate-prompt-tokens, or raise --max-model-len if the model "
                "allows it"
            )
    return every


def check_language(request: Request, tokenizer: Any) -> None:
    """Refuses words and languages that the model's tokenizer has no tokens for.

    Whether the tokens are the model's is left to the engine, as it alone knows how many there are.

    Raises:
        BadInput: the message names the option.
    """
    asked = request.decoding
    with named():
        bad_words_ids(asked.choice.get("bad_words", ()), tokenizer, sys.maxsize)
        if asked.structured is not None:
            GrammarCompiler(tokenizer, 0, frozenset()).compile(asked.structured)


def open_pool(request: Request, device: torch.device, is_embedded: bool) -> vattn.PagePool:
    """The physical memory for the KV cache.

    Raises:
        BadInput: a size that the device does not have.
        CliError: the driver does not work.
    """
    page_bytes = request.page_bytes or default_page_bytes(device, embedded=is_embedded)
    try:
        return vattn.PagePool(
            device,
            page_bytes=page_bytes,
            budget_bytes=request.budget_bytes,
            ahead_bytes=AHEAD_BYTES[device.type],
        )
    except ValueError as error:
        text = str(error).replace("page_bytes", "--page-bytes").replace("budget_bytes", "--budget")
        raise BadInput(text) from error
    except vattn.DriverError as error:
        raise CliError(f"the driver failed: {one_line(error)}; see vattn doctor") from error


def open_engine(
    request: Request,
    source: load.Source,
    tokenizer: Any,
    pool: vattn.PagePool,
    max_model_len: int,
) -> LLM:
    """The model with its engine.

    Raises:
        BadInput: a model that cannot be served, or sizes that no layout of the cache can have.
        CliError: the driver does not work, or the budget is too small to begin with.
    """
    try:
        with load.told(source):
            return WatchedLLM(
                source.location,
                tokenizer=tokenizer,
                dtype=request.dtype,
                device=pool.device,
                pool=pool,
                max_model_len=max_model_len,
                max_num_seqs=min(request.max_num_seqs, request.sequences),
                max_num_batched_tokens=request.max_num_batched_tokens,
                swap_space=request.swap_space,
                enable_prefix_caching=request.prefix_caching,
                enforce_eager=request.enforce_eager,
                order=request.order,
                seed=request.seed,
                speculative_config=request.decoding.speculative,
                max_logprobs=-1,  # who asks for them is who pays
            )
    except ValueError as error:
        raise BadInput(with_option_names(one_line(error))) from error
    except vattn.OutOfPages as error:
        raise CliError(f"out of pages: {one_line(error)}; raise --budget") from error
    except vattn.DriverError as error:
        raise CliError(f"the driver failed: {one_line(error)}; see vattn doctor") from error


def print_shorter(console: Console, request: Request, tokens: int, limit: int) -> None:
    """Says that a text cannot get as long as was asked for."""
    few = "only" if len(request.prompts) == 1 else "as few as"
    console.print(
        f"[yellow]note:[/] {few} {tokens} instead of {request.max_tokens} new tokens, because "
        f"{limit} is the limit with the prompt; --max-model-len sets another",
        soft_wrap=True,
    )


def print_header(console: Console, request: Request, name: str, model: Any) -> None:
    """One line that says what runs."""
    millions = model.num_parameters() / 1e6
    size = f"{millions:.2f}M" if millions < 100 else f"{millions / 1e3:.2f}B"
    dtype = str(model.dtype).removeprefix("torch.")
    parts = [
        f"vattn {vattn.__version__}",
        f"{name}, {size} parameters in {dtype} on {model.device}",
    ]
    if len(request.prompts) > 1:
        parts.append(f"{len(request.prompts)} prompts")
    if request.samples > 1:
        parts.append(f"{request.samples} {'beams' if request.is_search else 'samples'}")
    console.print(" · ".join(parts), style="dim", markup=False)
