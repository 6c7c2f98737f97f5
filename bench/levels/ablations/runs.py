"""What the ablations run: pairs of engines on one model, and loops at a GPU's published costs."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

import torch

import bench.overlap
from bench.common import Json
from bench.fake import PUBLISHED_US
from bench.levels.ablations.choices import Choice, choices
from bench.levels.engines import EngineSettings, how_it_ran
from bench.levels.offline.work import open_work_trace, prefix_works, sharpen, trace_works
from bench.levels.turns import Contender, serve_rounds, throughput
from bench.model_args import release
from bench.offline_sides import Work
from bench.overlap_loop import wake_in_time
from bench.partial import Partial
from bench.shapes import DTYPES, SHAPES, build_model
from bench.trace import open_trace
from vattn import LLM
from vattn.engine.setup import virtual_storage
from vattn.engine.storage import MakeStorage

_POSITIONS = 1 << 20
_GPU_RESERVE_BYTES = 8 << 30
_CALLS = ("create", "map", "set_access", "unmap", "destroy")


class Engines:
    """Pairs of engines that differ in one choice, on one model.

    Args:
        args: after :func:`bench.__main__.parse`.
        out: takes the results.
    """

    def __init__(self, args: argparse.Namespace, out: Partial) -> None:
        self.args = args
        self.out = out
        shape = SHAPES[args.shape]
        model = build_model(shape, args.device, DTYPES[args.dtype], _POSITIONS)
        self.model = sharpen(model)
        self.layers = shape.layers
        self.vocabulary = shape.vocabulary

    def run(self) -> None:
        """Every choice that the device has."""
        for choice in choices(self.args.device, self.layers):
            if choice.name not in self.args.choices:
                continue
            if self.args.device not in choice.devices:
                self.out.results["absent"][choice.label] = (
                    f"nothing to choose on {self.args.device}; see {', '.join(choice.devices)}"
                )
                self.out.write()
            elif self.args.budget.allows(choice.label):
                with self.out.part(choice.label):
                    self.out.append("choices", self._compare(choice))

    def _works(self, workload: str) -> tuple[list[Work], int, str]:
        """Rounds, requests at once, and where the lengths are from."""
        args = self.args
        if workload == "prefix":
            requests, shared, own, new = args.prefix
            rounds = args.repeats + 1
            works = prefix_works(requests, shared, own, new, self.vocabulary, rounds)
            return works, requests, f"{shared} tokens shared by {requests} prompts"
        trace = open_work_trace(
            args.trace, long=False, requests=args.requests, divisor=args.divisor
        )
        return trace_works(trace, self.vocabulary, args.repeats + 1), args.sequences, trace.source

    def _compare(self, choice: Choice) -> Json:
        works, sequences, source = self._works(choice.workload)
        release(self.args.device)
        settings = EngineSettings(
            max_model_len=max(works[0].totals) + 1,
            max_num_seqs=sequences,
            budget_bytes=self._budget(),
        )
        sides = {
            "ours": (choice.options | choice.ours_options, virtual_storage),
            "other": (choice.options | choice.other_options, choice.other_storage),
        }
        engines = {name: self._open(settings, *side) for name, side in sides.items()}
        try:
            both = [Contender(name, llm) for name, llm in engines.items()]
            peaks = {name: Peak() for name in engines}
            found = serve_rounds(
                both, works, self.args.turn_steps, lambda c: peaks[c.name].see(c.llm)
            )
            row: Json = {"choice": choice.name, "paper": choice.paper, "source": source}
            row |= {"workload": choice.workload, "requests": len(works[0])}
            row |= {"ratio": found.ratio("other", "ours").as_json()}
            for c in both:
                seconds = sorted(found.seconds[c.name])[len(found.seconds[c.name]) // 2]
                row[c.name] = {"what": getattr(choice, c.name)} | throughput(seconds, works[0])
                row[c.name] |= peaks[c.name].as_json(c.llm) | {"ran": how_it_ran(c.llm)}
            return row | {"equal_texts": found.equal, "compared_texts": found.compared}
        finally:
            for llm in engines.values():
                llm.close()

    def _budget(self) -> int:
        if self.args.budget_mib:
            return int(self.args.budget_mib) << 20
        free, _ = torch.cuda.mem_get_info()
        return (free - _GPU_RESERVE_BYTES) // 2

    def _open(self, settings: EngineSettings, options: Json, storage: MakeStorage) -> LLM:
        return LLM(
            model=self.model,
            skip_tokenizer_init=True,
            storage=storage,
            **(settings.options() | options),
        )


@dataclass
class Peak:
    """What a cache holds when it holds the most."""

    token_bytes: int = 0
    live_bytes: int = 0
    cover_bytes: int = 0

    def see(self, llm: LLM) -> None:
        """Looks at it; between turns, whose time it must not be."""
        stats = llm.engine.cache.stats()
        if stats.token_bytes > self.token_bytes:
            self.token_bytes, self.live_bytes = stats.token_bytes, stats.live_bytes
            self.cover_bytes = stats.cover_bytes

    def as_json(self, llm: LLM) -> Json:
        """Bytes, and driver calls of the engine's whole life."""
        pool, calls = llm.engine.cache.pool.stats(), llm.engine.cache.pool.driver_calls()
        return {
            "token_bytes": self.token_bytes,
            "live_bytes": self.live_bytes,
            "cover_bytes": self.cover_bytes,
            "live_share": self.token_bytes / self.live_bytes if self.live_bytes else None,
            "peak_physical_bytes": pool.peak_created_bytes,
            "calls": {op: calls[op] for op in _CALLS},
        }


def published_costs(args: argparse.Namespace, out: Partial) -> None:
    """Mapping ahead and deferred reclamation where driver calls cost what a GPU's do.

    There is no model and no GPU: see :mod:`bench.overlap`.
    """
    try:
        wake_in_time()
        trace = open_trace(args.trace)
        found = bench.overlap.measure("steady", _loop_args(args), trace.scaled(args.loop_divisor))
    except FileNotFoundError as error:
        out.results["absent"]["driver calls at published costs"] = str(error)
        out.write()
        return
    for row in found:
        keep = ("way", "steps", "step_over_device", "with_pages_over_device", "pages_us")
        short: Json = {name: row[name] for name in keep}
        out.append("loops", short | {"calls_per_step": row["calls_per_step"]})
    out.set(costs_us=dict(PUBLISHED_US))


def _loop_args(args: argparse.Namespace) -> Any:
    """Of :class:`bench.overlap_loop.Loop` and :func:`bench.overlap.measure`."""
    running = args.loop_running
    return argparse.Namespace(
        running=running,
        queued=max(4, running // 8),
        slots_per_sequence=3,
        step_tokens=8 * running,
        layers=args.loop_layers,
        device_ms=args.loop_device_ms,
        budget=args.loop_budget_mib << 20,
        ahead_bytes=args.loop_budget_mib << 14,
        warm_up=args.loop_warm_up,
        turns=args.loop_turns,
        steps=args.loop_steps,
        growing_steps=0,
    )
