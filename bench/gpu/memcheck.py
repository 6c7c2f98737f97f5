"""A short engine run under ``compute-sanitizer --tool memcheck``: no kernel leaves its memory.

    python -m bench.gpu.memcheck                     # finds the tool, runs it, counts errors
    python -m bench.gpu.memcheck --run --device cpu  # the run alone, which prints what it did

memcheck knows allocations of the virtual memory API by what is mapped and accessible, so a kernel
that leaves the mapped pages of a slot is found. It cannot see more than slots: torch's caching
allocator takes blocks of many megabytes and divides them by itself, so a kernel that leaves a
tensor of torch's (weights, logits, metadata of a step) for the one beside it makes no error. Nor
does it know tokens: what a kernel reads within a mapped page is checked by the attention tests, by
NaN.

Exit status: 0 without errors, 124 if the run came to no end in its time, else 1. Where there is no
tool, or it cannot work with the device, the last line is "skipped: " and why.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench.gpu.child import GRACE_S, TIMEOUT_CODE, Cut
from bench.gpu.child import run as run_command
from bench.provenance import gpu_missing, machine, versions

LIMIT_S = 160.0
_PAGE = 2 << 20
_SUMMARY = re.compile(r"ERROR SUMMARY: (\d+) errors?")
# Of the tool, on a device that it does not know.
_UNSUPPORTED = re.compile(r"Device not supported[^\n]*")
_TAIL_CHARS = 4000


def find_sanitizer() -> str | None:
    """The program, from ``CUDA_HOME``, ``CUDA_PATH``, ``PATH`` or the usual folder."""
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    for home in [*filter(None, homes), "/usr/local/cuda"]:
        for folder in ("bin", "compute-sanitizer"):
            path = Path(home) / folder / "compute-sanitizer"
            if path.is_file() and os.access(path, os.X_OK):
                return str(path)
    return shutil.which("compute-sanitizer")


def errors_in(log: str) -> int | None:
    """Errors that memcheck counted; None if it did not come to count them."""
    found = _SUMMARY.findall(log)
    return sum(map(int, found)) if found else None


def command(sanitizer: str, module: str = "bench.gpu.memcheck") -> list[str]:
    """A module's run under the tool; ends with the run's own exit code, or 86 for errors found."""
    return [
        sanitizer,
        *("--tool", "memcheck", "--error-exitcode", "86", "--print-limit", "20"),
        # Torch asks the driver for things that it may refuse.
        *("--report-api-errors", "no"),
        *(sys.executable, "-m", module, "--run"),
    ]


def check(
    sanitizer: str, limit_s: float = LIMIT_S, module: str = "bench.gpu.memcheck"
) -> dict[str, Any]:
    """Runs a module under memcheck for at most so many seconds, the last few for its end.

    Returns:
        ``status``: "passed", "failed", "timeout", or "skipped" by a tool that does not know the
        device, ``why`` then. ``errors`` (None if they were not counted), ``exit_code`` (None of a
        run that was ended), ``run`` (what the engine did) and ``log``, the end of what was printed.

    Raises:
        KeyboardInterrupt: a signal ended it.
    """
    with Cut() as cut:
        ended = run_command(command(sanitizer, module), limit_s, {}, cut)
    if ended.cut:
        raise KeyboardInterrupt(f"signal {cut.signal}")
    errors = errors_in(ended.log)
    lines = [line for line in ended.log.splitlines() if line.startswith('{"steps"')]
    unsupported = _UNSUPPORTED.search(ended.log)
    status = "passed" if ended.code == 0 and errors == 0 and lines else "failed"
    status = "timeout" if ended.at_limit else status
    if unsupported is not None and not errors:
        status = "skipped"  # the run may go on without the tool: that shows nothing
    return {
        "status": status,
        "why": None if unsupported is None else unsupported[0],
        "errors": errors,
        "exit_code": None if ended.at_limit else ended.code,
        "run": json.loads(lines[-1]) if lines else None,
        "log": ended.log[-_TAIL_CHARS:],
    }


# The run ------------------------------------------------------------------------------------------


def _model() -> Any:
    """A Llama of two layers, random; 128 of its tokens fill a page of 2 MiB."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=16,
        num_key_value_heads=16,
        head_dim=128,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=None,
        pad_token_id=0,
    )
    model: Any = LlamaForCausalLM(config)
    return model.eval()


def run(device: str) -> dict[str, int]:
    """Chunks, decodes, graphs, prefix hits, forks and preemptions on nine pages.

    Raises:
        RuntimeError: one of these did not happen, or a request failed.
    """
    import vattn

    graphs: dict[str, Any] = {"cudagraph_capture_sizes": [1, 4, 8]} if device == "cuda" else {}
    with vattn.LLM(
        _model(),
        device=device,
        dtype="bfloat16",
        skip_tokenizer_init=True,
        max_model_len=256,
        max_num_seqs=8,
        max_num_batched_tokens=128,
        kv_cache_memory_bytes=9 * _PAGE,
        page_bytes=_PAGE,
        layers_per_region=2,
        order="token",
        swap_space=0.125,
        **graphs,
    ) as llm:
        # Each of eight samples grows over a page's edge, whatever the kernel's tile: too many.
        shared = [3 + i * 7 % 120 for i in range(140)]
        prompts: list[Any] = [
            {"prompt_token_ids": [*shared[:tokens], 3 + tokens % 50]}
            for tokens in (100, 140, 101, 139)
        ]
        params = vattn.SamplingParams(
            n=2, temperature=0.8, seed=1, max_tokens=90, min_tokens=90, ignore_eos=True
        )
        for _ in range(2):
            for output in llm.generate(prompts, params, use_tqdm=False):
                failed = [sample.error for sample in output.outputs if sample.error]
                if failed:
                    raise RuntimeError(f"a request failed: {failed[0]}")
        llm.engine.check()
        stats = llm.stats()
        did = {
            "steps": stats.num_steps,
            "by_graph": stats.steps_by_graph,
            "prefix_hit_tokens": stats.prefix_cache_hits,
            "forked": stats.requests_forked,
            "preempted": stats.num_preemptions,
        }
    missing = [name for name, n in did.items() if not n and (graphs or name != "by_graph")]
    if missing:
        raise RuntimeError(f"the run had no {', '.join(missing)}, which it is there for: {did}")
    return did


def main(
    arguments: Sequence[str] | None = None,
    module: str = "bench.gpu.memcheck",
    run: Callable[[str], dict[str, int]] = run,
) -> int:
    """The command line of a module whose ``--run`` is this ``run``."""
    parser = argparse.ArgumentParser(prog=f"python -m {module}")
    parser.add_argument("--run", action="store_true", help="the run alone, without the tool")
    parser.add_argument("--device", default="cuda", choices=("cpu", "cuda"), help="of --run")
    parser.add_argument(
        "--limit-s", type=float, default=LIMIT_S, help=f"seconds, {GRACE_S:.0f} of them to end it"
    )
    parser.add_argument("--json", type=Path, help="file for the result")
    options = parser.parse_args(arguments)
    if options.run:
        print(json.dumps(run(options.device)), flush=True)
        return 0
    reason = gpu_missing()
    sanitizer = find_sanitizer()
    if reason is None and sanitizer is None:
        reason = "no compute-sanitizer in CUDA_HOME/bin, CUDA_PATH/bin, /usr/local/cuda or PATH"
    if reason is not None or sanitizer is None:
        print(f"skipped: {reason}")
        return 0
    result = check(sanitizer, options.limit_s, module)
    if result["status"] == "skipped":
        print(result["log"])
        print(f"skipped: {result['why']}")
        return 0
    if options.json is not None:
        found = {"machine": machine(), "versions": versions(), **result}
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    passed = result["status"] == "passed"
    print(f"memcheck: 0 errors in {result['run']}" if passed else result["log"])
    if result["status"] == "timeout":
        print(f"memcheck came to no end in {options.limit_s:.0f} s; give it more: --limit-s")
    return {"passed": 0, "timeout": TIMEOUT_CODE}.get(result["status"], 1)


if __name__ == "__main__":
    sys.exit(main())
