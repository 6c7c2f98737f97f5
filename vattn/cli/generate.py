"""``vattn generate``: a transformers model generating text with its KV cache in virtual memory."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from vattn.cli import decoding, decoding_flags, flags
from vattn.cli.console import BadInput
from vattn.cli.decoding import Decoding
from vattn.cli.options import positive, size
from vattn.cli.prompts import read_prompts
from vattn.sampling_params import BeamSearchParams, SamplingParams

DEFAULT_PROMPT = (
    "A transaction is a group of statements that the database treats as one unit. When a "
    "transaction is committed, all of its changes become visible to other sessions at the same "
    "time. If the server fails before the commit, none of the changes are stored in the table. A "
    "session that reads the table while another one writes to it sees only the rows that were "
    "committed before its own statement began, so readers never wait for writers."
)
MAX_SAMPLES = 4096
MAX_SWAP_GIB = 2**20


@dataclass(frozen=True)
class Request:
    """What the user asked for, with sizes checked; None leaves a choice to the model or device."""

    prompts: tuple[str, ...]
    samples: int
    model: str | None
    max_tokens: int
    min_tokens: int
    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    stop: tuple[str, ...]
    seed: int
    max_num_seqs: int
    max_num_batched_tokens: int | None
    device: str | None
    dtype: str
    max_model_len: int | None
    page_bytes: int | None
    budget_bytes: int | None
    swap_space: float | None
    prefix_caching: bool
    enforce_eager: bool
    order: str | None
    memory_map: bool
    stats: bool
    json_file: Path | None
    trace_file: Path | None
    trace_kernels: bool
    decoding: Decoding

    @property
    def sequences(self) -> int:
        """Texts to generate, over all prompts."""
        return len(self.prompts) * self.samples

    @property
    def is_search(self) -> bool:
        """Whether the texts of a prompt are beams, and not samples."""
        return self.decoding.beam_width is not None


def generate(
    text: flags.Text = None,
    prompt: flags.Prompt = None,
    prompts: flags.Prompts = None,
    model: flags.Model = None,
    max_tokens: flags.MaxTokens = 128,
    min_tokens: flags.MinTokens = 0,
    n: flags.Samples = None,
    temperature: flags.Temperature = None,
    top_p: flags.TopP = None,
    top_k: flags.TopK = None,
    min_p: flags.MinP = None,
    stop: flags.Stop = None,
    seed: flags.Seed = 0,
    presence_penalty: decoding_flags.PresencePenalty = None,
    frequency_penalty: decoding_flags.FrequencyPenalty = None,
    repetition_penalty: decoding_flags.RepetitionPenalty = None,
    logit_bias: decoding_flags.LogitBias = None,
    bad_words: decoding_flags.BadWords = None,
    allowed_token_ids: decoding_flags.AllowedTokenIds = None,
    logprobs: decoding_flags.Logprobs = None,
    prompt_logprobs: decoding_flags.PromptLogprobs = None,
    truncate_prompt_tokens: decoding_flags.TruncatePromptTokens = None,
    json_schema: decoding_flags.JsonSchema = None,
    regex: decoding_flags.Regex = None,
    choice: decoding_flags.Choice = None,
    grammar: decoding_flags.Grammar = None,
    beam_width: decoding_flags.BeamWidth = None,
    length_penalty: decoding_flags.LengthPenalty = None,
    speculative_config: decoding_flags.SpeculativeConfig = None,
    max_num_seqs: flags.MaxNumSeqs = 32,
    max_num_batched_tokens: flags.MaxNumBatchedTokens = None,
    device: flags.Device = None,
    dtype: flags.Dtype = "auto",
    max_model_len: flags.MaxModelLen = None,
    page_bytes: flags.PageBytes = None,
    budget: flags.Budget = None,
    swap_space: flags.SwapSpace = None,
    no_prefix_caching: flags.NoPrefixCaching = False,
    enforce_eager: flags.EnforceEager = False,
    order: flags.Order = None,
    memory_map: flags.MemoryMap = False,
    stats: flags.Stats = True,
    json_file: flags.JsonFile = None,
    trace: flags.TraceFile = None,
    trace_kernels: flags.TraceKernels = False,
) -> None:
    """Generate text with a transformers model whose KV cache lives in virtual memory.

    All prompts are generated together, by continuous batching.

    Text goes to stdout, everything else to stderr. Without a prompt it continues a built-in one.
    """
    given = read_prompts(text, prompt, prompts)
    samples = positive("--n", n) or (1 if given else flags.DEMO_SAMPLES)
    choices = {
        "presence_penalty": presence_penalty,
        "frequency_penalty": frequency_penalty,
        "repetition_penalty": repetition_penalty,
        "logit_bias": decoding.read_bias(logit_bias),
        "bad_words": bad_words,
        "allowed_token_ids": decoding.read_ids(allowed_token_ids),
        "logprobs": logprobs,
        "prompt_logprobs": prompt_logprobs,
        "truncate_prompt_tokens": truncate_prompt_tokens,
    }
    asked = Decoding(
        choice={name: value for name, value in choices.items() if value is not None},
        structured=decoding.read_structured(json_schema, regex, choice, grammar),
        beam_width=positive("--beam-width", beam_width),
        length_penalty=length_penalty,
        speculative=decoding.read_speculative(speculative_config),
    )
    if asked.beam_width is not None and n is not None:
        raise BadInput(f"--n {n} and --beam-width {beam_width} say how many texts; drop one")
    request = Request(
        prompts=given or (DEFAULT_PROMPT,),
        samples=asked.beam_width or samples,
        model=model,
        max_tokens=positive("--max-tokens", max_tokens) or 0,
        min_tokens=min_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        stop=tuple(stop or ()),
        seed=seed,
        max_num_seqs=positive("--max-num-seqs", max_num_seqs) or 0,
        max_num_batched_tokens=positive("--max-num-batched-tokens", max_num_batched_tokens),
        device=device,
        dtype=dtype,
        max_model_len=positive("--max-model-len", max_model_len),
        page_bytes=size("--page-bytes", page_bytes),
        budget_bytes=size("--budget", budget),
        swap_space=swap_space,
        prefix_caching=not no_prefix_caching,
        enforce_eager=enforce_eager,
        order=order,
        memory_map=memory_map,
        stats=stats,
        json_file=json_file,
        trace_file=trace,
        trace_kernels=trace_kernels,
        decoding=asked,
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
    _check_sampling(request)
    _check_decoding(request)
    _check_engine(request)
    _check_file("--json", request.json_file)
    _check_file("--trace", request.trace_file)
    if request.trace_kernels and request.trace_file is None:
        raise BadInput("--trace-kernels adds to a trace; give --trace FILE, or drop it")
    if request.trace_file is not None and request.trace_file == request.json_file:
        raise BadInput(f"--json and --trace both name {request.trace_file}; give two files")
    if request.trace_file is not None:
        _try_file("--trace", request.trace_file)


def _try_file(option: str, path: Path) -> None:
    """Refuses a file that cannot be written, and leaves it as it is."""
    is_new = not path.exists()
    try:
        path.open("a").close()
        if is_new:
            path.unlink()
    except OSError as error:
        raise BadInput(
            f"{option} {path} cannot be written to: {error.strerror}; give another file"
        ) from error


def _check_file(option: str, path: Path | None) -> None:
    if path is not None and path.is_dir():
        raise BadInput(f"{option} {path} is a directory; give a file")
    if path is not None and not path.parent.is_dir():
        raise BadInput(f"{option} {path}: there is no directory {path.parent}; make it first")


def _check_sampling(request: Request) -> None:
    temperature, top_p, top_k = request.temperature, request.top_p, request.top_k
    if request.samples > MAX_SAMPLES:
        raise BadInput(f"--n {request.samples} must be at most {MAX_SAMPLES}")
    if not 0 <= request.min_tokens <= request.max_tokens:
        raise BadInput(
            f"--min-tokens {request.min_tokens} must be between 0 and --max-tokens, "
            f"{request.max_tokens}"
        )
    if temperature is not None and not 0 <= temperature < math.inf:
        raise BadInput(f"--temperature {temperature} must be 0 (greedy) or more, such as 0.8")
    if top_p is not None and not 0 < top_p <= 1:
        raise BadInput(f"--top-p {top_p} must be above 0 and at most 1")
    if top_k is not None and top_k < -1:
        raise BadInput(f"--top-k {top_k} must be positive, or 0 or -1 for all tokens")
    if request.min_p is not None and not 0 <= request.min_p <= 1:
        raise BadInput(f"--min-p {request.min_p} must be between 0 and 1")
    if "" in request.stop:
        raise BadInput("--stop '' is empty; give the text that ends the output")
    if not 0 <= request.seed < 2**63:
        raise BadInput(f"--seed {request.seed} must be between 0 and 2**63 - 1")


def _check_decoding(request: Request) -> None:
    asked = request.decoding
    if asked.beam_width is None:
        if asked.length_penalty is not None:
            raise BadInput(
                f"--length-penalty {asked.length_penalty:g} is of beam search; give --beam-width, "
                "or drop it"
            )
        with decoding.named():
            SamplingParams(
                max_tokens=request.max_tokens, min_tokens=request.min_tokens, **asked.choice
            )
        return
    names = ("min_tokens", "top_p", "top_k", "min_p", "stop")
    decoding.without_beams({name: getattr(request, name) for name in names})
    decoding.without_beams({name: [value] for name, value in asked.choice.items()})
    if asked.structured is not None:
        raise BadInput("beam search has no structured output; drop it, or --beam-width")
    if asked.beam_width > request.max_num_seqs:
        raise BadInput(
            f"--beam-width {asked.beam_width} is more than --max-num-seqs {request.max_num_seqs}, "
            "and beams run at once; raise the latter"
        )
    with decoding.named():
        beam_params(request)


def beam_params(request: Request) -> BeamSearchParams:
    """How to search, if beams are asked for."""
    asked = request.decoding
    assert asked.beam_width is not None
    return BeamSearchParams(
        beam_width=asked.beam_width,
        max_tokens=request.max_tokens,
        temperature=request.temperature or 0.0,
        length_penalty=1.0 if asked.length_penalty is None else asked.length_penalty,
    )


def _check_engine(request: Request) -> None:
    tokens, at_once = request.max_num_batched_tokens, min(request.max_num_seqs, request.sequences)
    if tokens is not None and tokens < at_once:
        raise BadInput(
            f"--max-num-batched-tokens {tokens} is less than one for each of the {at_once} "
            "sequences that are generated at once; raise it, or lower --max-num-seqs"
        )
    swap = request.swap_space
    if swap is not None and not 0 <= swap < MAX_SWAP_GIB:
        raise BadInput(f"--swap-space {swap} must be a number of GiB, 0 or more")
    if request.order not in (None, "token", "head"):
        raise BadInput(f"--order {request.order} is not known; use token or head")
