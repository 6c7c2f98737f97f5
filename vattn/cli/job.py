"""Prepares a request of ``vattn generate``: device, model, limits and cache."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from rich.console import Console

import vattn
from vattn.cli import load
from vattn.cli.console import BadInput, CliError, notes, one_line
from vattn.cli.generate import Request
from vattn.cli.run import Generator, sampling_options
from vattn.cli.session import Session

# The embedded model has seen 512 tokens at once, and its tokens are so small (128 bytes per head)
# that the driver's default page would hold more than a whole prompt.
EMBEDDED_MODEL_LEN = 512
EMBEDDED_PAGE_BYTES = 4096
TINY_PARAMETERS = 10_000_000
# Addresses cost nothing, but a model made for millions of tokens would exceed what kernels address.
MAX_DEFAULT_RESERVE_TOKENS = 131_072


def run(request: Request) -> None:
    """Generates and prints; every failure is a CliError, Ctrl-C an exit with code 130."""
    console = notes()
    load.quiet_transformers()
    device = load.find_device(request.device)
    dtype = load.find_dtype(request.dtype)
    source = load.find_model(request.model)
    if not source.is_directory:
        console.print(f"looking for {source.name} on the Hugging Face Hub", style="dim")
    config = load.load_config(source)
    tokenizer = load.load_tokenizer(source)
    limit = token_limit(request, load.model_limit(config), source.is_embedded)
    longest = check_prompts(request.prompts, tokenizer, limit)
    new_tokens = min(request.max_tokens, limit - longest) if limit else request.max_tokens
    if new_tokens < request.max_tokens:
        console.print(
            f"[yellow]note:[/] {new_tokens} instead of {request.max_tokens} new tokens, because "
            f"{limit} is the limit with the prompt; --max-model-len sets another",
            soft_wrap=True,
        )
    reserve = max(min(limit or 0, MAX_DEFAULT_RESERVE_TOKENS), longest + new_tokens)
    page_bytes = request.page_bytes
    if source.is_embedded and device.type == "cpu":
        page_bytes = page_bytes or EMBEDDED_PAGE_BYTES

    # The cache comes first: what it cannot serve is known before gigabytes are loaded.
    cache = open_cache(request, source, config, reserve, page_bytes, device)
    try:
        with console.status(f"loading {source.name}") if console.is_terminal else nullcontext():
            model = load.load_model(source, config, dtype, device)
        sampling = sampling_options(
            model.generation_config, request.temperature, request.top_p, request.top_k
        )
        sampling["pad_token_id"] = tokenizer.pad_token_id
        model.generation_config.cache_implementation = None  # the cache is ours
        print_header(console, request, source.name, model)
        torch.manual_seed(request.seed)
        generator = Generator(model, tokenizer, cache, sampling, request.samples)
        with few_threads(model):
            Session(request, console, generator, source.name, new_tokens).run()
    except torch.OutOfMemoryError as error:
        raise CliError(
            f"out of GPU memory: {one_line(error, 200)}; use a smaller model or --device cpu"
        ) from error
    finally:
        cache.close()


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


def check_prompts(prompts: Sequence[str], tokenizer: Any, limit: int | None) -> int:
    """The length of the longest prompt in tokens.

    Raises:
        BadInput: a prompt of no tokens, or one that leaves no room for a single new token.
    """
    lengths = [len(ids) for ids in tokenizer(list(prompts), verbose=False)["input_ids"]]
    for number, (prompt, length) in enumerate(zip(prompts, lengths, strict=True), start=1):
        name = f"prompt {number}" if len(prompts) > 1 else "the prompt"
        if length == 0:
            raise BadInput(f"{name}, {prompt!r}, is no token to this model; give more text")
        if limit is not None and length >= limit:
            raise BadInput(
                f"{name} has {length} tokens, but the limit for it and its text is {limit}; "
                "shorten it, or raise --max-model-len if the model allows it"
            )
    return max(lengths)


def open_cache(
    request: Request,
    source: load.Source,
    config: Any,
    max_tokens: int,
    page_bytes: int | None,
    device: torch.device,
) -> vattn.VirtualCache:
    """An empty cache for the request's largest batch.

    Raises:
        BadInput: a size that the device does not have, or a model without K and V to cache.
        CliError: the driver does not work.
    """
    try:
        pool = vattn.PagePool(device, page_bytes=page_bytes, budget_bytes=request.budget_bytes)
    except ValueError as error:
        text = str(error).replace("page_bytes", "--page-bytes").replace("budget_bytes", "--budget")
        raise BadInput(text) from error
    except vattn.DriverError as error:
        raise CliError(f"the driver failed: {one_line(error)}; see vattn doctor") from error
    order: Any = request.order
    rows = min(request.batch_size, len(request.prompts)) * request.samples
    try:
        return vattn.VirtualCache(
            config, max_tokens=max_tokens, max_batch=rows, pool=pool, order=order
        )
    except ValueError as error:
        reason = one_line(error).split(";")[0]
        raise BadInput(
            f"--model {source.name} ({config.model_type}) is not supported: {reason}; give a "
            "decoder-only model with attention layers, such as Llama, Qwen or Gemma"
        ) from error


@contextmanager
def few_threads(model: Any) -> Iterator[None]:
    """One thread for a tiny model on a CPU, unless OMP_NUM_THREADS says otherwise.

    Handing out its small products costs more than doing them: on two busy cores the embedded model
    wrote 23 tokens/s with two threads and 285 with one.
    """
    is_tiny = model.num_parameters() < TINY_PARAMETERS
    if model.device.type != "cpu" or not is_tiny or "OMP_NUM_THREADS" in os.environ:
        yield
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


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
        parts.append(f"{request.samples} samples")
    console.print(" · ".join(parts), style="dim", markup=False)
