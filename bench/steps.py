"""Single steps of a model over slots that are filled by hand, and their time on the device."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch

from bench.common import Json, quartiles, wall_clock
from bench.device import cuda
from vattn.attention.base import Backend
from vattn.attention.select import choose
from vattn.engine.batch import StepBatch
from vattn.engine.runner import ModelRunner
from vattn.hf.compiled import CompiledModel, compile_model
from vattn.hf.model import LoadedModel
from vattn.kv.cache import KVCache

# Cycles that the device spins before a step whose launches it is not to wait for: some 25 ms.
_HEAD_START_CYCLES = 50_000_000


@dataclass(frozen=True)
class Mode:
    """A way to launch the model's kernels."""

    name: str
    graphs: bool
    compiled: bool

    def refusal(self, device: str) -> str | None:
        """Why it cannot be measured on a device; None if it can."""
        return "a CPU has no CUDA graphs" if self.graphs and device == "cpu" else None

    def engine_options(self) -> Json:
        """What asks an engine for it: on a GPU, a compiled model comes with graphs."""
        if self.name == "eager":
            return {"enforce_eager": True}
        return {"compile_model": self.compiled}


MODES = {
    mode.name: mode
    for mode in (
        Mode("eager", graphs=False, compiled=False),
        Mode("compiled", graphs=False, compiled=True),
        Mode("graphs", graphs=True, compiled=False),
        Mode("graphs+compiled", graphs=True, compiled=True),
    )
}


@dataclass(frozen=True)
class StepTimes:
    """Microseconds of a step.

    ``flow`` is what it takes when one is launched after the other; ``device`` is what the device
    takes if every launch is there before it is needed. None on a CPU, where it is the same, and
    without a graph: more launches than the queue of the device holds (some 1,000) wait for it, and
    what is timed contains the host's gaps.
    """

    flow_us: float
    flow_low_us: float  # quartiles
    flow_high_us: float
    device_us: float | None
    rounds: int


def time_steps(
    step: Callable[[], object], device: str, rounds: int, *, graphs: bool, warmup: int = 3
) -> StepTimes:
    """Times a step that does not wait for the device, in a flow and, as a graph, with a head start.

    Args:
        step: launches one.
        device: ``"cpu"`` or ``"cuda"``.
        rounds: steps of the flow; the head start is given to a third of as many.
        graphs: whether the step is one launch, of a graph.
        warmup: steps before.
    """
    for _ in range(warmup):
        step()
    ahead = None
    if device == "cpu":
        times = [wall_clock(step) * 1e6 for _ in range(rounds)]
    else:
        times = _flow(step, rounds)
    if device != "cpu" and graphs:
        ahead = statistics.median(_with_head_start(step) for _ in range(max(3, rounds // 3)))
    low, high = quartiles(times)
    return StepTimes(statistics.median(times), low, high, ahead, rounds)


def _flow(step: Callable[[], object], rounds: int) -> list[float]:
    cuda.synchronize()
    marks = [cuda.Event(enable_timing=True) for _ in range(rounds + 1)]
    marks[0].record()
    for mark in marks[1:]:
        step()
        mark.record()
    cuda.synchronize()
    return [a.elapsed_time(b) * 1e3 for a, b in itertools.pairwise(marks)]


def _with_head_start(step: Callable[[], object]) -> float:
    start, end = cuda.Event(enable_timing=True), cuda.Event(enable_timing=True)
    cuda.synchronize()
    cuda._sleep(_HEAD_START_CYCLES)
    start.record()
    step()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) * 1e3


class Slots:
    """A cache with open slots of equal length, full of random K and V, and a scratch slot.

    Args:
        loaded: whose layers it is for.
        count: slots.
        tokens: of each; all of them are mapped and filled.
        backend: by name, or as made; None for the first that can serve the model.
    """

    def __init__(
        self, loaded: LoadedModel, count: int, tokens: int, backend: Backend | str | None = None
    ) -> None:
        if backend is None or isinstance(backend, str):
            backend = choose(loaded.specs, loaded.device, name=backend)
        self.loaded = loaded
        self.backend = backend
        self.tokens = tokens
        self.cache = KVCache(
            loaded.layer_specs(),
            max_seqs=count + 1,
            max_tokens=tokens,
            device=loaded.device,
            order=backend.order,
            kv_tile_tokens=backend.kv_tile_tokens,
        )
        self.scratch = self.cache.max_seqs - 1
        self.cache.open(slot=self.scratch)
        self.cache.ensure(self.scratch, 1)
        self.slots = np.array(sorted(int(self.cache.open()) for _ in range(count)), np.int32)
        self.cache.ensure_many(self.slots, np.full(count, tokens, np.int32))
        self._fill()
        self._random = np.random.default_rng(0)

    def _fill(self) -> None:
        torch.manual_seed(0)
        for slot in self.slots:
            for layer in range(len(self.cache.specs)):
                for tensor in self.cache.view(int(slot), layer):
                    tensor.normal_()

    def runner(self, mode: Mode, forward: Callable[..., Any] | None) -> ModelRunner:
        """A runner in a mode, its graphs captured for as many decodes as there are slots.

        Args:
            mode: of it.
            forward: as :class:`Forwards` says.

        Raises:
            RuntimeError: graphs were asked for and could not be captured.
            ValueError: graphs were asked for of a backend that cannot be captured.
        """
        runner = ModelRunner(
            self.loaded,
            self.cache,
            self.backend,
            max_num_seqs=len(self.slots),
            max_model_len=self.tokens,
            scratch_slot=self.scratch,
            capture_sizes=[len(self.slots)],
            graphs=mode.graphs,
            forward=forward,
        )
        runner.capture()
        if mode.graphs and not runner.graph_stats.captured:
            raise RuntimeError(f"no graph was captured for {mode.name}; the warning above says why")
        return runner

    def decode(self) -> StepBatch:
        """One more token for every slot, the last of those it has."""
        n = len(self.slots)
        return self._batch(np.ones(n, np.int32), n, np.arange(n))

    def prefill(self) -> StepBatch:
        """All tokens of every slot as one chunk each."""
        query_lens = np.full(len(self.slots), self.tokens, np.int32)
        return self._batch(query_lens, 0, np.cumsum(query_lens) - 1)

    def _batch(self, query_lens: Any, decodes: int, rows: Any) -> StepBatch:
        vocabulary = self.loaded.vocab_size
        return StepBatch(
            slots=self.slots,
            query_lens=query_lens,
            kv_lens=np.full(len(self.slots), self.tokens, np.int32),
            num_decodes=decodes,
            input_ids=self._random.integers(0, vocabulary, int(query_lens.sum())),
            logit_rows=rows.astype(np.int64),
            sample_slots=self.slots.astype(np.int64),
        )

    def close(self) -> None:
        self.cache.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def choose_modes(names: Sequence[str], device: str) -> tuple[list[Mode], Json]:
    """The modes of these names that a device has, and why it has not the others."""
    reasons = {name: MODES[name].refusal(device) for name in names}
    modes = [MODES[name] for name in names if reasons[name] is None]
    return modes, {name: reason for name, reason in reasons.items() if reason is not None}


class Forwards:
    """What computes a forward pass in each mode; a model is compiled once, when it is asked for.

    Args:
        loaded: the model.

    Attributes:
        compile_s: seconds that compiling took; None before.
    """

    def __init__(self, loaded: LoadedModel) -> None:
        self.compile_s: float | None = None
        self._loaded = loaded
        self._compiled: CompiledModel | None = None

    def needed_s(self, mode: Mode, compile_s: float) -> float:
        """Seconds before the first step of a mode, if compiling takes so many."""
        return compile_s if mode.compiled and self._compiled is None else 0.0

    def of(self, mode: Mode) -> CompiledModel | None:
        """The runner's ``forward``; None for the model as it is.

        Raises:
            RuntimeError: the model does not compile.
        """
        if not mode.compiled:
            return None
        if self._compiled is None:
            start = time.perf_counter()
            self._compiled = compile_model(self._loaded)
            self.compile_s = time.perf_counter() - start
        if self._compiled.refusal is not None:
            raise RuntimeError(f"the model does not compile: {self._compiled.refusal}")
        return self._compiled
