"""VirtualCache against transformers' DynamicCache and StaticCache: prefill, decode, memory.

    python -m bench.cache            # 8-layer 512-wide Llama, fp32, at 1x16K and 8x2K tokens
    python -m bench.cache --small    # the same in seconds, to see that it runs

The caches take turns in one process, step by step, and a ratio is the median over neighbouring
steps: above 1, VirtualCache is faster. The tokens they lead to are compared. StaticCache gets
exactly the room it needs, which is its best case. Memory is measured in a process per cache.

DynamicCache makes new tensors at every step. glibc gives memory of more than 32 MiB back to the
system when it is freed, so at these sizes (a layer's K is just above) each step pays for fresh
pages. ``--malloc keep`` runs everything with a malloc that keeps what is freed: what is left is the
cost of the copy itself.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace

import torch
from transformers import LlamaForCausalLM
from transformers.cache_utils import Cache

from bench.cache_memory import measure_memory
from bench.cache_model import KINDS, Shape, fill_randomly, forward, make_cache, make_model, prompt
from bench.common import (
    Json,
    Target,
    parser,
    print_table,
    print_targets,
    report,
    summarize_pairs,
    wall_clock,
    write_json,
)
from bench.provenance import ROOT
from vattn.config import format_bytes

# glibc's, in bytes: sizes from which memory is mapped apart, and is given back.
KEEP_MALLOC = {
    "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 34),
}
BASES = tuple(kind for kind in KINDS if kind != "virtual")
Times = dict[str, list[float]]


class Turns:
    """Lets the caches take one step each, in an order that rotates, and times every step."""

    def __init__(self, model: LlamaForCausalLM, caches: dict[str, Cache]) -> None:
        self.model = model
        self.caches = caches
        self.tokens: dict[str, list[torch.Tensor]] = {kind: [] for kind in caches}
        self._round = 0

    def take(self, ids: dict[str, torch.Tensor], times: Times | None) -> dict[str, torch.Tensor]:
        """One step of each cache over its ``ids``; the next tokens."""
        kinds = list(self.caches)
        shift = self._round % len(kinds)
        self._round += 1
        out: dict[str, torch.Tensor] = {}

        def step(kind: str) -> None:
            out[kind] = forward(self.model, self.caches[kind], ids[kind])

        for kind in kinds[shift:] + kinds[:shift]:
            seconds = wall_clock(lambda kind=kind: step(kind))  # type: ignore[misc]
            if times is not None:
                times.setdefault(kind, []).append(seconds)
        for kind, token in out.items():
            self.tokens[kind].append(token)
        return out


def prefill(turns: Turns, shape: Shape, fill: str) -> tuple[dict[str, torch.Tensor], Json]:
    """Brings all caches to ``shape.tokens``; each row's next token, and what it took."""
    ids = prompt(shape)
    if fill == "random":
        for cache in turns.caches.values():
            fill_randomly(cache, shape)
        first = dict.fromkeys(turns.caches, ids[:, :1])
        note = "not measured: the caches were filled with random K and V through update()"
        return first, {"note": note}
    times: Times = {}
    step = max(1, shape.chunk // shape.batch)
    out: dict[str, torch.Tensor] = {}
    for start in range(0, shape.tokens, step):
        chunk = ids[:, start : start + step]
        out = turns.take(dict.fromkeys(turns.caches, chunk), times)
    return out, {
        "chunk_tokens": step,
        "seconds": {kind: sum(t) for kind, t in times.items()},
        "ratios": ratios(times),
    }


def decode(turns: Turns, first: dict[str, torch.Tensor], pairs: int, warmup: int) -> Json:
    """Decodes one token at a time; ratios, and whether all caches led to the same tokens."""
    times: Times = {}
    ids = first
    for i in range(warmup + pairs):
        ids = turns.take(ids, times if i >= warmup else None)
    texts = {kind: torch.cat(tokens, dim=1) for kind, tokens in turns.tokens.items()}
    virtual = texts["virtual"]
    return {
        "ratios": ratios(times),
        "tokens_equal": {kind: bool(torch.equal(texts[kind], virtual)) for kind in BASES},
        "distinct_tokens": len(set(virtual.flatten().tolist())),
        "decoded_per_row": warmup + pairs,
    }


def ratios(times: Times) -> Json:
    return {base: asdict(summarize_pairs(times[base], times["virtual"])) for base in BASES}


def measure(shape: Shape, args: argparse.Namespace) -> Json:
    with torch.inference_mode():
        model = make_model(shape)
        turns = Turns(model, {kind: make_cache(kind, model, shape) for kind in KINDS})
        first, prefilled = prefill(turns, shape, args.fill)
        decoded = decode(turns, first, args.pairs, args.warmup)
    del turns, model
    memory = {} if args.no_memory else {kind: measure_memory(kind, shape) for kind in KINDS}
    return {"shape": shape.as_json(), "prefill": prefilled, "decode": decoded, "memory": memory}


def print_results(results: Sequence[Json]) -> None:
    speed, memory, pages = [], [], []
    for r in results:
        name = Shape(**r["shape"]).name
        for phase in ("prefill", "decode"):
            for base, pair in r[phase].get("ratios", {}).items():
                equal = r["decode"]["tokens_equal"][base]
                ms = [f"{pair[key] / 1e3:.1f}" for key in ("base_us", "candidate_us")]
                spread = f"{pair['ratio_low']:.2f}-{pair['ratio_high']:.2f}"
                speed.append([name, phase, base, *ms, pair["ratio"], spread, pair["pairs"], equal])
            if "note" in r[phase]:
                print(f"{name} {phase}: {r[phase]['note']}")
        live = r["shape"]["batch"] * Shape(**r["shape"]).token_bytes * r["shape"]["tokens"]
        for kind, m in r["memory"].items():
            peak = m["peak_over_model_bytes"]
            memory.append([name, kind, format_bytes(peak), format_bytes(live), peak / live])
        if r["memory"]:
            v = r["memory"]["virtual"]["virtual"]
            names = ("token", "live", "cover", "stale", "pooled", "physical")
            after = [v[f"after_{what}"]["physical_bytes"] for what in ("release", "trim")]
            sizes = [*(v[f"{n}_bytes"] for n in names), *after]
            pages.append([name, *(format_bytes(size) for size in sizes)])
    print_table(
        "one step, ms (prefill: a chunk; decode: a token of each row); ratio above 1: virtual wins",
        ["batch", "phase", "against", "ms", "virtual ms", "ratio", "quartiles", "pairs", "equal"],
        speed,
    )
    if memory:
        print_table(
            "peak resident memory over the model",
            ["batch", "cache", "peak", "K and V", "peak / K and V"],
            memory,
        )
        print_table(
            "VirtualCache: physical bytes",
            [
                *("batch", "tokens", "live", "cover", "stale", "pooled"),
                *("physical", "after release", "after trim"),
            ],
            pages,
        )


def make_targets(results: Sequence[Json]) -> list[Target]:
    targets = []
    for r in results:
        name = Shape(**r["shape"]).name
        ratio = r["decode"]["ratios"]["dynamic"]["ratio"]
        targets.append(Target(f"decode over DynamicCache, {name}", ratio, 1.25, "x", at_least=True))
        equal = float(all(r["decode"]["tokens_equal"].values()))
        targets.append(Target(f"tokens equal, {name}", equal, 1, "", at_least=True))
        if r["memory"]:
            v = r["memory"]["virtual"]["virtual"]
            share = v["live_bytes"] / v["live_limit_bytes"]
            targets += [
                Target(f"live / (tokens + a page per run), {name}", share, 1, "", at_least=False),
                Target(
                    f"bytes left after trim, {name}",
                    v["after_trim"]["physical_bytes"],
                    0,
                    "B",
                    at_least=False,
                ),
            ]
    return targets


def main(argv: Sequence[str] | None = None) -> int:
    cli = parser("bench.cache", __doc__)
    cli.add_argument("--small", action="store_true", help="few tokens and layers, for CI")
    cli.add_argument(
        "--shape",
        action="append",
        metavar="BATCHxTOKENS",
        help="repeatable; default 1x16384 and 8x2048, with --small 1x256 and 2x64",
    )
    cli.add_argument("--layers", type=int, default=8)
    cli.add_argument("--width", type=int, default=512)
    cli.add_argument("--heads", type=int, default=8)
    cli.add_argument("--kv-heads", type=int, default=8)
    cli.add_argument("--chunk", type=int, default=2048, help="prefill tokens of a step, all rows")
    cli.add_argument("--pairs", type=int, default=35, help="decode steps that are timed")
    cli.add_argument("--warmup", type=int, default=3, help="decode steps before them")
    cli.add_argument(
        "--fill",
        choices=["model", "random"],
        default="model",
        help="prefill by the model, or put random K and V in through update() (not timed)",
    )
    cli.add_argument("--no-memory", action="store_true", help="leave out the memory processes")
    cli.add_argument(
        "--malloc",
        choices=["stock", "keep"],
        default="stock",
        help="keep: start again with a malloc that gives nothing back to the system",
    )
    args = cli.parse_args(argv)
    if args.malloc == "keep" and not KEEP_MALLOC.items() <= os.environ.items():
        command = [sys.executable, "-m", "bench.cache", *(sys.argv[1:] if argv is None else argv)]
        return subprocess.run(command, cwd=ROOT, env=os.environ | KEEP_MALLOC).returncode
    if args.small:
        args.layers, args.width, args.chunk = 2, 128, 128
        args.pairs = min(args.pairs, 5)
    names = args.shape or (["1x256", "2x64"] if args.small else ["1x16384", "8x2048"])
    base = Shape(
        layers=args.layers,
        width=args.width,
        heads=args.heads,
        kv_heads=args.kv_heads,
        batch=1,
        tokens=1,
        steps=args.pairs + args.warmup + 1,
        chunk=args.chunk,
    )
    results = []
    for name in names:
        batch, tokens = (int(part) for part in name.split("x"))
        results.append(measure(replace(base, batch=batch, tokens=tokens), args))
    print_results(results)
    targets = [] if args.small else make_targets(results)
    print_targets(targets)
    if args.json:
        settings = {k: v for k, v in vars(args).items() if k != "json"}
        settings["threads"] = torch.get_num_threads()
        write_json(args.json, report("cache", settings, results, targets))
    return 0 if all(all(r["decode"]["tokens_equal"].values()) for r in results) else 1


if __name__ == "__main__":
    raise SystemExit(main())
