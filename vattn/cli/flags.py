"""The options of ``vattn generate``, as they are shown in its help; generate.py checks them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, TypeAlias

import typer

from vattn.cli.options import number, option, whole

DEMO_SAMPLES = 3

_INPUT, _SAMPLING, _BATCHING = "Input", "Sampling", "Batching"
_MACHINE, _MEMORY, _OUTPUT = "Machine", "Memory", "Output"

# Input --------------------------------------------------------------------------------------------

Text: TypeAlias = Annotated[
    str | None, typer.Argument(metavar="PROMPT", help="The prompt, or - for standard input.")
]
Prompt: TypeAlias = Annotated[
    str | None, option("--prompt", "-p", panel=_INPUT, help="The prompt.")
]
Prompts: TypeAlias = Annotated[
    Path | None,
    option(
        "--prompts",
        panel=_INPUT,
        metavar="FILE",
        help="Many prompts, one in each line; empty lines are skipped. - is standard input.",
    ),
]
Model: TypeAlias = Annotated[
    str | None,
    option(
        "--model",
        "-m",
        panel=_INPUT,
        metavar="DIR|ID",
        help="A model directory or an id of the Hugging Face Hub; default: the embedded model.",
    ),
]

# Sampling -----------------------------------------------------------------------------------------

MaxTokens: TypeAlias = Annotated[
    int, whole("--max-tokens", panel=_SAMPLING, help="Most tokens to generate; default 128.")
]
MinTokens: TypeAlias = Annotated[
    int,
    whole("--min-tokens", panel=_SAMPLING, help="No end of the text before so many tokens."),
]
Samples: TypeAlias = Annotated[
    int | None,
    whole(
        "--n",
        "-n",
        panel=_SAMPLING,
        help="Samples of each prompt; they share the pages of the prompt. Default 1, and "
        f"{DEMO_SAMPLES} of the built-in prompt.",
    ),
]
Temperature: TypeAlias = Annotated[
    float | None,
    number(
        "--temperature",
        panel=_SAMPLING,
        help="0 takes the likeliest token always; default: the model's own, else 0.8.",
    ),
]
TopP: TypeAlias = Annotated[
    float | None,
    number(
        "--top-p",
        panel=_SAMPLING,
        help="Share of probability to sample from; default: the model's own, else 0.95.",
    ),
]
TopK: TypeAlias = Annotated[
    int | None, whole("--top-k", panel=_SAMPLING, help="Tokens to sample from; 0 or -1 for all.")
]
MinP: TypeAlias = Annotated[
    float | None,
    number(
        "--min-p",
        panel=_SAMPLING,
        help="Least probability to sample from, as a share of the likeliest token's.",
    ),
]
Stop: TypeAlias = Annotated[
    list[str] | None,
    option(
        "--stop",
        panel=_SAMPLING,
        metavar="STRING",
        help="Ends the text, and is not part of it; can be given several times.",
    ),
]
Seed: TypeAlias = Annotated[int, whole("--seed", panel=_SAMPLING, help="Of sampling; default 0.")]

# Batching -----------------------------------------------------------------------------------------

MaxNumSeqs: TypeAlias = Annotated[
    int,
    whole(
        "--max-num-seqs",
        panel=_BATCHING,
        help="Sequences that are generated at once, others wait; default 32.",
    ),
]
MaxNumBatchedTokens: TypeAlias = Annotated[
    int | None,
    whole(
        "--max-num-batched-tokens",
        panel=_BATCHING,
        help="Tokens of all sequences in one step; longer prompts take several. Default 8192.",
    ),
]

# Machine ------------------------------------------------------------------------------------------

Device: TypeAlias = Annotated[
    str | None,
    option(
        "--device",
        panel=_MACHINE,
        metavar="cpu|cuda[:N]",
        help="Default: the GPU where there is one.",
    ),
]
Dtype: TypeAlias = Annotated[
    str,
    option(
        "--dtype",
        panel=_MACHINE,
        metavar="NAME",
        help="auto (the model's own), float32, float16 or bfloat16.",
    ),
]

# Memory -------------------------------------------------------------------------------------------

MaxModelLen: TypeAlias = Annotated[
    int | None,
    whole(
        "--max-model-len",
        panel=_MEMORY,
        help="Longest prompt and text together, for which addresses are reserved; "
        "default: the model's limit.",
    ),
]
PageBytes: TypeAlias = Annotated[
    str | None,
    option(
        "--page-bytes",
        panel=_MEMORY,
        metavar="SIZE",
        help="Size of a physical page, such as 16KiB; default: the driver's.",
    ),
]
Budget: TypeAlias = Annotated[
    str | None,
    option(
        "--budget",
        panel=_MEMORY,
        metavar="SIZE",
        help="Most physical memory for the cache, such as 2GiB; default: VATTN_BUDGET, else a "
        "share of the free memory.",
    ),
]
SwapSpace: TypeAlias = Annotated[
    float | None,
    number(
        "--swap-space",
        panel=_MEMORY,
        help="GiB of host memory for sequences that must give way for a while; default 4 beside a "
        "GPU, else 0.",
    ),
]
NoPrefixCaching: TypeAlias = Annotated[
    bool,
    option(
        "--no-prefix-caching",
        panel=_MEMORY,
        help="Do not reuse what finished prompts and texts left in memory.",
    ),
]
EnforceEager: TypeAlias = Annotated[
    bool,
    option(
        "--enforce-eager",
        panel=_MEMORY,
        help="No CUDA graphs: begin sooner, decode slower.",
    ),
]
Order: TypeAlias = Annotated[
    str | None,
    option(
        "--order",
        panel=_MEMORY,
        metavar="token|head",
        help="Layout of a slot; default: the faster one on the device.",
    ),
]

# Output -------------------------------------------------------------------------------------------

MemoryMap: TypeAlias = Annotated[
    bool,
    option(
        "--memory-map",
        panel=_OUTPUT,
        help="Draw the slots and their pages, as they were when most tokens were live.",
    ),
]
Stats: TypeAlias = Annotated[
    bool, option("--stats/--no-stats", panel=_OUTPUT, help="Print figures; default: yes.")
]
JsonFile: TypeAlias = Annotated[
    Path | None,
    option("--json", panel=_OUTPUT, metavar="FILE", help="Write texts and figures to a file."),
]
TraceFile: TypeAlias = Annotated[
    Path | None,
    option(
        "--trace",
        panel=_OUTPUT,
        metavar="FILE",
        help="Write what each step did, and when, for chrome://tracing or Perfetto.",
    ),
]
TraceKernels: TypeAlias = Annotated[
    bool,
    option(
        "--trace-kernels",
        panel=_OUTPUT,
        help="Have torch's profiler add operators and kernels to the trace.",
    ),
]
