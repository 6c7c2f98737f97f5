"""What the offline level runs: pairs of engines on one model, over the workloads asked for."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch

from bench.common import Json
from bench.levels.block_sweep import WARMUP_TURNS, block_rows, sides_of, step_seconds
from bench.levels.engines import (
    EngineSettings,
    Side,
    contiguous_for,
    how_it_ran,
    kv_budget,
    open_sides,
)
from bench.levels.offline.work import (
    fixed_works,
    open_work_trace,
    prefix_works,
    sharpen,
    trace_works,
)
from bench.levels.turns import (
    Contender,
    attention_share,
    decode_turns,
    serve_rounds,
    throughput,
    tokens_for,
)
from bench.model_args import release
from bench.offline_sides import Work
from bench.paged.kernels import BLOCK_SIZES, load_kernels
from bench.partial import Partial
from bench.shapes import DTYPES, SHAPES, build_model, count_weights
from vattn import LLM
from vattn.engine.config import DEFAULT_MAX_NUM_BATCHED_TOKENS
from vattn.hf.model import LoadedModel, load_model

SIDES = ("contiguous", "paged")
_POSITIONS = 1 << 20  # of the model: more than any workload has, and nothing is as long as this
# Room beside the tokens of those that run: for partly filled blocks, the largest that any kernel
# takes, and a quarter more for what admissions leave free and for what is kept.
_SLACK, _MOST_BLOCK_TOKENS = 1.25, max(BLOCK_SIZES)
_GPU_RESERVE_BYTES = 8 << 30  # for activations, graphs and the allocator


class Comparison:
    """The offline level at the settings of its arguments.

    Args:
        args: after :func:`bench.__main__.parse`.
        out: takes the results.
    """

    def __init__(self, args: argparse.Namespace, out: Partial) -> None:
        self.args = args
        self.out = out
        self.shape = ""  # of the model that is loaded
        self.loaded: LoadedModel | None = None
        self._blocks: dict[tuple[str, str], int] = {}  # the best, by shape and kernel

    def run(self) -> None:
        """Every workload with every kernel that is there."""
        args = self.args
        # In an order by which a model is made as seldom as can be.
        runs: dict[str, Callable[[str], None]] = {
            "heavy": lambda kernel: self._contexts("heavy", kernel, args.heavy_points),
            "contexts": lambda kernel: self._contexts("contexts", kernel, args.points),
            "trace": lambda kernel: self._trace("trace", kernel),
            "prefix": self._prefix,
            "long": lambda kernel: self._trace("long", kernel),
        }
        self.out.set(absent={}, weights={})
        for workload, measure in runs.items():
            if workload not in args.workloads:
                continue
            shapes = {"heavy": args.heavy_shape, "long": args.long_shape}
            self._load(shapes.get(workload, args.shape))
            for kernel in self._kernels():
                with self.out.part(f"{workload}, {kernel}"):
                    measure(kernel)

    # Models and kernels ---------------------------------------------------------------------------

    def _load(self, shape: str) -> None:
        """Makes the model of a shape the one in use."""
        if self.shape == shape:
            return
        self.loaded = None
        release(self.args.device)
        model = build_model(SHAPES[shape], self.args.device, DTYPES[self.args.dtype], _POSITIONS)
        self.shape, self.loaded = shape, load_model(sharpen(model))
        self.out.results["weights"][shape] = count_weights(model).read_bytes
        self.out.write()

    @property
    def model(self) -> Any:
        """The transformers model in use."""
        assert self.loaded is not None
        return self.loaded.model

    def _kernels(self) -> list[str]:
        """Those asked for that are there; why the others are not goes into the results."""
        assert self.loaded is not None
        found, missing = load_kernels(self.loaded.device, self.loaded.specs, self.args.kernels)
        self.out.results["absent"].update(missing)
        self.out.write()
        return [*found]

    def _settings(self, works: Sequence[Work], sequences: int, engines: int) -> EngineSettings:
        """Room for the longest that can run at once, on each of so many engines."""
        longest = sorted(works[0].totals)[-sequences:]
        block = _MOST_BLOCK_TOKENS
        tokens = int(_SLACK * sum(-(-n // block) * block for n in longest)) + 2 * block
        budget = kv_budget(self.model, tokens)
        if self.args.device == "cuda":
            release("cuda")
            free, _ = torch.cuda.mem_get_info()
            budget = min(budget, (free - _GPU_RESERVE_BYTES) // engines)
        return EngineSettings(
            max_model_len=max(longest) + 1,
            max_num_seqs=sequences,
            budget_bytes=budget,
            step_tokens=self.args.step_tokens,
        )

    def _open(
        self, sides: Sequence[Side], settings: EngineSettings, **options: Any
    ) -> AbstractContextManager[dict[str, LLM]]:
        return open_sides(sides, self.model, settings, **options)

    def _block(self, kernel: str) -> int:
        """The block size with which a kernel's decode steps are the fastest here."""
        if (self.shape, kernel) not in self._blocks:
            self._blocks[self.shape, kernel] = self._sweep(kernel)
        return self._blocks[self.shape, kernel]

    def _sweep(self, kernel: str) -> int:
        assert self.loaded is not None
        found, _ = load_kernels(self.loaded.device, self.loaded.specs, [kernel])
        sizes = self.args.blocks or list(found[kernel].block_sizes(self.loaded.specs[0]))
        if len(sizes) == 1:
            return int(sizes[0])
        ((batch, context),) = self.args.sweep
        works = self._fixed(batch, context, 1)
        sides = sides_of(kernel, sizes)
        settings = self._settings(works, batch, len(sides))
        engines = self._open(sides, settings, cudagraph_capture_sizes=[batch])
        turns, steps = self.args.turns, self.args.turn_steps
        seconds = step_seconds(sides, engines, works[0], turns=turns, steps=steps)
        best, rows = block_rows(kernel, self.shape, batch, context, seconds)
        for row in rows:
            self.out.append("blocks", row)
        return best

    def _pair(self, kernel: str) -> tuple[Side, Side]:
        """The contiguous side and the paged one."""
        paged = Side("paged", kernel, self._block(kernel))
        return contiguous_for(paged), paged

    # Workloads ------------------------------------------------------------------------------------

    def _fixed(self, batch: int, context: int, rounds: int) -> list[Work]:
        args = self.args
        step_tokens = args.step_tokens or DEFAULT_MAX_NUM_BATCHED_TOKENS
        fill = batch * -(-context // step_tokens)
        new = tokens_for(fill, args.turns, WARMUP_TURNS, args.turn_steps)
        return fixed_works(batch, context, new, SHAPES[self.shape].vocabulary, rounds)

    def _decode(self, contenders: Sequence[Contender], works: Sequence[Work]) -> Any:
        args = self.args
        return decode_turns(
            contenders, works, turns=args.turns, warmup=WARMUP_TURNS, steps=args.turn_steps
        )

    def _contexts(self, workload: str, kernel: str, points: Sequence[tuple[int, int]]) -> None:
        for batch, context in points:
            if self.args.budget.allows(f"{workload} {batch} x {context}, {kernel}"):
                row = {"workload": workload} | self._context(kernel, batch, context)
                self.out.append("contexts", row)

    def _context(self, kernel: str, batch: int, context: int) -> Json:
        """Decode steps of one batch."""
        sides = self._pair(kernel)
        works = self._fixed(batch, context, self.args.repeats + 1)
        settings = self._settings(works, batch, len(sides))
        with self._open(sides, settings, cudagraph_capture_sizes=[batch]) as engines:
            both = [Contender(str(side), engines[str(side)]) for side in sides]
            found = self._decode(both, works[:-1])
            shares = [attention_share(c, works[-1], self.args.turns) for c in both]
            ran = [how_it_ran(c.llm) for c in both]
        ratio = found.ratio(both[1].name, both[0].name)
        times = (ratio.candidate_us, ratio.base_us)
        row: Json = {"kernel": kernel, "block_tokens": sides[1].block_tokens}
        row |= {"shape": self.shape, "batch": batch, "context": context}
        row |= {"kv_share": self._kv_share(batch * context), "ratio": ratio.as_json()}
        for name, us, share, how in zip(SIDES, times, shares, ran, strict=True):
            step_us = us / self.args.turn_steps
            row[name] = {"step_us": step_us, "output_throughput": batch * 1e6 / step_us}
            row[name] |= {"attention_share": share, "ran": how}
        return row | {"equal_texts": found.equal, "compared_texts": found.compared}

    def _kv_share(self, tokens: int) -> float:
        """K and V among the bytes that a decode step reads."""
        shape, dtype = SHAPES[self.shape], DTYPES[self.args.dtype]
        kv = tokens * shape.kv_token_bytes(dtype)
        return kv / (kv + int(self.out.results["weights"][self.shape]))

    def _trace(self, workload: str, kernel: str) -> None:
        args, long = self.args, workload == "long"
        trace = open_work_trace(
            args.long_trace if long else args.trace,
            long=long,
            requests=args.long_requests if long else args.requests,
            divisor=args.long_divisor if long else args.divisor,
        )
        works = trace_works(trace, SHAPES[self.shape].vocabulary, args.repeats + 1)
        sequences = args.long_sequences if long else args.sequences
        self._rounds(workload, kernel, works, sequences, trace.source)

    def _prefix(self, kernel: str) -> None:
        requests, shared, own, new = self.args.prefix
        vocabulary = SHAPES[self.shape].vocabulary
        works = prefix_works(requests, shared, own, new, vocabulary, self.args.repeats + 1)
        source = f"{shared} tokens shared by {requests} prompts, {own} of their own"
        self._rounds("prefix", kernel, works, requests, source)

    def _rounds(
        self, workload: str, kernel: str, works: Sequence[Work], sequences: int, source: str
    ) -> None:
        if not self.args.budget.allows(f"{workload}, {kernel}"):
            return
        sides = self._pair(kernel)
        settings = self._settings(works, sequences, len(sides))
        with self._open(sides, settings) as engines:
            both = [Contender(str(side), engines[str(side)]) for side in sides]
            found = serve_rounds(both, works, self.args.turn_steps)
            ran = [how_it_ran(c.llm) for c in both]
        work = works[0]
        row: Json = {"workload": workload, "kernel": kernel, "shape": self.shape}
        row |= {"block_tokens": sides[1].block_tokens, "requests": len(work), "source": source}
        row |= {"prompt_mean": statistics.mean(map(len, work.prompts))}
        row |= {"answer_mean": work.generated / len(work)}
        row |= {"ratio": found.ratio(both[1].name, both[0].name).as_json()}
        for name, c, how in zip(SIDES, both, ran, strict=True):
            row[name] = throughput(statistics.median(found.seconds[c.name]), work) | {"ran": how}
        row |= {"equal_texts": found.equal, "compared_texts": found.compared}
        self.out.append("rounds", row)
