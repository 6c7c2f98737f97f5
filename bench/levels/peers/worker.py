"""A peer in a process of its own: opens an engine, then generates what it is asked for.

    python -m bench.levels.peers.worker vllm '{"directory": ...}'

Talks in lines of JSON. The first that it writes is ``{"ready": {...}}`` with version and options,
or ``{"error": "..."}``. Each line that it reads is work, ``{"prompts": [[...]], "new_tokens":
[...]}``, and each is answered with ``{"seconds": ..., "texts": [[...]]}``. It ends with its input.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import sys
import time
from collections.abc import Callable
from importlib import metadata
from typing import Any, TextIO

Generate = Callable[[list[list[int]], list[int]], list[list[int]]]
# nano-vllm refuses a temperature of 0. At this one, the likeliest token is drawn unless another's
# logit is nearer to it than some 1e-4.
NANO_TEMPERATURE = 1e-5


def open_vllm(settings: dict[str, Any]) -> tuple[Generate, dict[str, Any]]:
    """``vllm.LLM`` with its defaults but for sizes, seed and memory; its version and options."""
    if settings["device"] == "cpu":
        gib = max(1, -(-settings["kv_bytes"] // (1 << 30)))
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(gib))
    from vllm import LLM, EngineArgs, SamplingParams

    options: dict[str, Any] = {
        "dtype": settings["dtype"],
        "max_model_len": settings["max_model_len"],
        "max_num_seqs": settings["max_num_seqs"],
        "seed": 0,
        "skip_tokenizer_init": True,
    }
    if settings["device"] == "cuda":
        options["gpu_memory_utilization"] = settings["share_of_own"]
        # Exact, where the version has it: the share is then only what has to be free at the start.
        if "kv_cache_memory_bytes" in _fields(EngineArgs):
            options["kv_cache_memory_bytes"] = settings["kv_bytes"]
    llm = LLM(model=settings["directory"], **options)

    def generate(prompts: list[list[int]], new_tokens: list[int]) -> list[list[int]]:
        outputs = llm.generate(
            [{"prompt_token_ids": ids} for ids in prompts],
            [
                SamplingParams(temperature=0.0, max_tokens=n, ignore_eos=True, detokenize=False)
                for n in new_tokens
            ],
            use_tqdm=False,
        )
        return [list(output.outputs[0].token_ids) for output in outputs]

    return generate, {"version": _version("vllm"), "options": options}


def open_nano_vllm(settings: dict[str, Any]) -> tuple[Generate, dict[str, Any]]:
    """``nanovllm.LLM``, graphs and all; its version and options."""
    if settings["device"] != "cuda":
        raise RuntimeError("nano-vllm needs a GPU")
    from nanovllm import LLM, SamplingParams

    options: dict[str, Any] = {
        "enforce_eager": False,
        "max_model_len": settings["max_model_len"],
        "max_num_seqs": settings["max_num_seqs"],
        # Its default, which it wants to be no less than the longest sequence.
        "max_num_batched_tokens": max(16384, settings["max_model_len"]),
        # It counts the memory of everybody on the device as its own.
        "gpu_memory_utilization": settings["share_of_all"],
    }
    llm = LLM(settings["directory"], **options)

    def generate(prompts: list[list[int]], new_tokens: list[int]) -> list[list[int]]:
        params = [
            SamplingParams(temperature=NANO_TEMPERATURE, max_tokens=n, ignore_eos=True)
            for n in new_tokens
        ]
        outputs = llm.generate(prompts, params, use_tqdm=False)
        return [list(output["token_ids"]) for output in outputs]

    told = options | {"temperature": NANO_TEMPERATURE}
    return generate, {"version": _version("nano-vllm"), "options": told}


PEERS = {"vllm": open_vllm, "nano-vllm": open_nano_vllm}


def _fields(kind: Any) -> set[str]:
    if dataclasses.is_dataclass(kind):
        return {field.name for field in dataclasses.fields(kind)}
    return set(inspect.signature(kind).parameters)


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:  # on the path only
        return "unknown"


def serve(peer: str, settings: dict[str, Any], asked: TextIO, told: TextIO) -> None:
    """Opens the peer and answers until there is no more work."""

    def tell(message: dict[str, Any]) -> None:
        told.write(json.dumps(message) + "\n")
        told.flush()

    try:
        generate, about = PEERS[peer](settings)
    except Exception as error:  # whatever the peer raises is for the other process to report
        tell({"error": f"{type(error).__name__}: {error}"})
        raise
    tell({"ready": about})
    for line in asked:
        work = json.loads(line)
        start = time.perf_counter()
        texts = generate(work["prompts"], work["new_tokens"])
        tell({"seconds": time.perf_counter() - start, "texts": texts})


def main() -> None:
    """Peers print; so messages get the output, and what is printed goes to the errors."""
    told = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    serve(sys.argv[1], json.loads(sys.argv[2]), sys.stdin, told)


if __name__ == "__main__":
    main()
