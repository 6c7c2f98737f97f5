"""``vattn generate``: a transformers model generating text with its KV cache in virtual memory."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from vattn.cli.console import BadInput
from vattn.cli.options import number, option, positive, size, whole

DEFAULT_PROMPT = (
    "A transaction is a group of statements that the database treats as one unit. When a "
    "transaction is committed, all of its changes become visible to other sessions at the same "
    "time. If the server fails before the commit, none of the changes are stored in the table. A "
    "session that reads the table while another one writes to it sees only the rows that were "
    "committed before its own statement began, so readers never wait for writers."
)
DEMO_SAMPLES = 3

_INPUT, _SAMPLING, _MACHINE = "Input", "Sampling", "Machine"
_MEMORY, _OUTPUT = "Memory", "Output"


@dataclass(frozen=True)
class Request:
    """What the user asked for, with sizes checked; None leaves a choice to the model or device."""

    prompts: tuple[str, ...]
    samples: int
    model: str | None
    max_tokens: int
    temperature: float | None
    top_p: float | None
    top_k: int | None
    seed: int
    batch_size: int
    device: str | None
    dtype: str
    max_model_len: int | None
    page_bytes: int | None
    budget_bytes: int | None
    order: str | None
    memory_map: bool
    stats: bool
    json_file: Path | None


def generate(
    text: Annotated[
        str | None, typer.Argument(metavar="PROMPT", help="The prompt, or - for standard input.")
    ] = None,
    prompt: Annotated[
        str | None, option("--prompt", "-p", panel=_INPUT, help="The prompt.")
    ] = None,
    prompts: Annotated[
        Path | None,
        option(
            "--prompts",
            panel=_INPUT,
            metavar="FILE",
            help="Many prompts, one in each line; empty lines are skipped. - is standard input.",
        ),
    ] = None,
    model: Annotated[
        str | None,
        option(
            "--model",
            "-m",
            panel=_INPUT,
            metavar="DIR|ID",
            help="A model directory or an id of the Hugging Face Hub; default: the embedded model.",
        ),
    ] = None,
    max_tokens: Annotated[
        int, whole("--max-tokens", panel=_SAMPLING, help="Most tokens to generate; default 128.")
    ] = 128,
    n: Annotated[
        int | None,
        whole(
            "--n",
            "-n",
            panel=_SAMPLING,
            help="Samples of each prompt; they share the pages of the prompt. Default 1, and "
            f"{DEMO_SAMPLES} of the built-in prompt.",
        ),
    ] = None,
    temperature: Annotated[
        float | None,
        number(
            "--temperature",
            panel=_SAMPLING,
            help="0 takes the likeliest token always; default: the model's own, else 0.8.",
        ),
    ] = None,
    top_p: Annotated[
        float | None,
        number(
            "--top-p",
            panel=_SAMPLING,
            help="Share of probability to sample from; default: the model's own, else 0.95.",
        ),
    ] = None,
    top_k: Annotated[
        int | None,
        whole("--top-k", panel=_SAMPLING, help="Tokens to sample from; 0 or -1 for all."),
    ] = None,
    seed: Annotated[int, whole("--seed", panel=_SAMPLING, help="Of sampling; default 0.")] = 0,
    batch_size: Annotated[
        int, whole("--batch-size", panel=_MACHINE, help="Prompts at a time; default 8.")
    ] = 8,
    device: Annotated[
        str | None,
        option(
            "--device",
            panel=_MACHINE,
            metavar="cpu|cuda[:N]",
            help="Default: the GPU where there is one.",
        ),
    ] = None,
    dtype: Annotated[
        str,
        option(
            "--dtype",
            panel=_MACHINE,
            metavar="NAME",
            help="auto (the model's own), float32, float16 or bfloat16.",
        ),
    ] = "auto",
    max_model_len: Annotated[
        int | None,
        whole(
            "--max-model-len",
            panel=_MEMORY,
            help="Longest prompt and text together, for which addresses are reserved; "
            "default: the model's limit.",
        ),
    ] = None,
    page_bytes: Annotated[
        str | None,
        option(
            "--page-bytes",
            panel=_MEMORY,
            metavar="SIZE",
            help="Size of a physical page, such as 16KiB; default: the driver's.",
        ),
    ] = None,
    budget: Annotated[
        str | None,
        option(
            "--budget",
            panel=_MEMORY,
            metavar="SIZE",
            help="Most physical memory for the cache, such as 2GiB; default: VATTN_BUDGET, else a "
            "share of the free memory.",
        ),
    ] = None,
    order: Annotated[
        str | None,
        option(
            "--order",
            panel=_MEMORY,
            metavar="token|head",
            help="Layout of a slot; default: the faster one on the device.",
        ),
    ] = None,
    memory_map: Annotated[
        bool, option("--memory-map", panel=_OUTPUT, help="Draw the slots and their pages.")
    ] = False,
    stats: Annotated[
        bool, option("--stats/--no-stats", panel=_OUTPUT, help="Print figures; default: yes.")
    ] = True,
    json_file: Annotated[
        Path | None,
        option("--json", panel=_OUTPUT, metavar="FILE", help="Write texts and figures to a file."),
    ] = None,
) -> None:
    """Generate text with a transformers model whose KV cache lives in virtual memory.

    Text goes to stdout, everything else to stderr. Without a prompt it continues a built-in one.
    """
    given = read_prompts(text, prompt, prompts)
    request = Request(
        prompts=given or (DEFAULT_PROMPT,),
        samples=positive("--n", n) or (1 if given else DEMO_SAMPLES),
        model=model,
        max_tokens=positive("--max-tokens", max_tokens) or 0,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        seed=seed,
        batch_size=positive("--batch-size", batch_size) or 0,
        device=device,
        dtype=dtype,
        max_model_len=positive("--max-model-len", max_model_len),
        page_bytes=size("--page-bytes", page_bytes),
        budget_bytes=size("--budget", budget),
        order=order,
        memory_map=memory_map,
        stats=stats,
        json_file=json_file,
    )
    check(request)
    # torch and transformers take seconds to import: not before the arguments are known to be good.
    from vattn.cli.job import run

    run(request)


def check(request: Request) -> None:
    """Refuses values that no model could work with.

    Raises:
        BadInput: it names the option, the value and what is allowed.
    """
    temperature, top_p, top_k = request.temperature, request.top_p, request.top_k
    if temperature is not None and not 0 <= temperature < math.inf:
        raise BadInput(f"--temperature {temperature} must be 0 (greedy) or more, such as 0.8")
    if top_p is not None and not 0 < top_p <= 1:
        raise BadInput(f"--top-p {top_p} must be above 0 and at most 1")
    if top_k is not None and top_k < -1:
        raise BadInput(f"--top-k {top_k} must be positive, or 0 or -1 for all tokens")
    if not 0 <= request.seed < 2**63:
        raise BadInput(f"--seed {request.seed} must be between 0 and 2**63 - 1")
    if request.order not in (None, "token", "head"):
        raise BadInput(f"--order {request.order} is not known; use token or head")
    path = request.json_file
    if path is not None and path.is_dir():
        raise BadInput(f"--json {path} is a directory; give a file")
    if path is not None and not path.parent.is_dir():
        raise BadInput(f"--json {path}: there is no directory {path.parent}; make it first")


def read_prompts(text: str | None, prompt: str | None, file: Path | None) -> tuple[str, ...]:
    """The prompts that were given in one of the ways to give them; none if there are none.

    Raises:
        BadInput: given in two ways, empty or unreadable.
    """
    if sum(source is not None for source in (text, prompt, file)) > 1:
        raise BadInput("give one of PROMPT, --prompt and --prompts, not several")
    if file is not None:
        name = "standard input" if str(file) == "-" else f"--prompts {file}"
        lines = tuple(line for line in _read(file, name).splitlines() if line.strip())
        if not lines:
            raise BadInput(f"{name} holds no prompt; write one in each line")
        return lines
    if text is None and prompt is None:
        return ()
    given = prompt if text is None else text
    assert given is not None
    if text == "-":
        given = _read(Path("-"), "standard input").rstrip("\n")
    if not given.strip():
        raise BadInput(f"the prompt {given!r} is empty; give some text, or none at all for a demo")
    return (given,)


def _read(file: Path, name: str) -> str:
    try:
        data = sys.stdin.buffer.read() if str(file) == "-" else file.read_bytes()
        return data.decode()
    except OSError as error:
        raise BadInput(f"{name} cannot be read: {error.strerror}; give a text file") from error
    except UnicodeDecodeError as error:
        raise BadInput(f"{name} is not UTF-8 text (byte {error.start}); convert it") from error
