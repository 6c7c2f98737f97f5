"""The sides of the peers level: how each is opened, and their turns."""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from bench.common import Json, Pairs
from bench.levels.block_sweep import measured_side
from bench.levels.engines import EngineSettings, how_it_ran, kv_budget, open_engine, parse_side
from bench.levels.peers.model import weight_bytes
from bench.levels.peers.process import PeerProcess, missing
from bench.levels.repeat import Repeated, repeated
from bench.model_args import release
from bench.offline_sides import BatchSettings, GenerateBatch, Padded, Side, Work
from bench.served import greedy

OURS = "vattn"
SIDES = (
    *(OURS, "paged", "vllm", "nano-vllm"),
    *("generate_batch", "batch-defaults", "manager", "padded", "padded-sorted", "single"),
)
_SLOW = 5.0  # times as long as ours: such a side takes part in one round
# Of a GPU, beside the weights and K and V of an engine: activations, graphs, its context.
_ENGINE_BYTES = 4 << 30


class InProcess:
    """`vattn.LLM` on contiguous or on paged memory, made once and kept."""

    def __init__(
        self, name: str, model: Any, storage: str, settings: EngineSettings, shape: str
    ) -> None:
        self.name = name
        own = copy.deepcopy(model)
        side, tried = measured_side(
            *(parse_side(storage), own, shape),
            positions=settings.max_model_len,
            sequences=settings.max_num_seqs,
        )
        self.llm = open_engine(side, own, settings)
        self.about = how_it_ran(self.llm) | ({"blocks": tried} if tried else {})

    def run(self, work: Work) -> list[list[int]]:
        """See :class:`bench.offline_sides.Side`."""
        outputs = self.llm.generate(
            [{"prompt_token_ids": ids} for ids in work.prompts],
            [greedy(n) for n in work.new_tokens],
            use_tqdm=False,
        )
        answers = [output.outputs[0] for output in outputs]
        if failed := [answer.error for answer in answers if answer.error]:
            raise RuntimeError(f"{self.name} failed {len(failed)} requests: {failed[0]}")
        return [answer.token_ids for answer in answers]

    def close(self) -> None:
        self.llm.close()


def engine_settings(args: argparse.Namespace, model: Any, work: Work) -> EngineSettings:
    """Room for all that run at once, as long as the longest, and as much for what is kept."""
    longest = max(work.totals)
    budget = kv_budget(model, 2 * args.sequences * longest)
    return EngineSettings(longest, args.sequences, budget)


def open_side(
    name: str,
    args: argparse.Namespace,
    model: Any,
    directory: Callable[[], str],
    settings: EngineSettings,
    batch: Callable[[], BatchSettings],
    work: Work,
) -> Side:
    """A side by its name.

    Args:
        name: one of :data:`SIDES`.
        args: of the level.
        model: that all run, which is copied.
        directory: where the model is saved.
        settings: of the engines.
        batch: of transformers' continuous batching, the fastest here.
        work: the largest that it has to have room for.

    Raises:
        Exception: whatever keeps it from being opened.
    """
    if name in ("vllm", "nano-vllm"):
        if (why := missing(name)) is not None:
            raise ModuleNotFoundError(why)
        told = peer_settings(args, model, directory(), settings)
        return PeerProcess(name, told, open_s=args.open_s, run_s=args.run_s)
    makers: dict[str, Callable[[], Side]] = {
        OURS: lambda: InProcess(name, model, "contiguous", settings, args.shape),
        "paged": lambda: InProcess(name, model, "paged", settings, args.shape),
        "generate_batch": lambda: GenerateBatch(model, batch(), name),
        "batch-defaults": lambda: GenerateBatch(model, None, name),
        "manager": lambda: GenerateBatch(model, batch(), name, keep=work),
        "padded": lambda: Padded(model, args.sequences, name),
        "padded-sorted": lambda: Padded(model, args.sequences, name, by_length=True),
        "single": lambda: Padded(model, 1, name),
    }
    return makers[name]()


def peer_settings(
    args: argparse.Namespace, model: Any, directory: str, settings: EngineSettings
) -> Json:
    """What a peer in another process is told; all engines get as much for K and V."""
    told: Json = {
        "directory": directory,
        "device": args.device,
        "dtype": str(model.dtype).removeprefix("torch."),
        "max_model_len": settings.max_model_len,
        "max_num_seqs": settings.max_num_seqs,
        "kv_bytes": settings.budget_bytes,
    }
    if args.device == "cuda":
        free, total = torch.cuda.mem_get_info()
        own = weight_bytes(model) + settings.budget_bytes + _ENGINE_BYTES
        told["share_of_own"] = round(min(0.9, own / total), 4)
        told["share_of_all"] = round(min(0.95, (total - free + own) / total), 4)
    return told


@dataclass
class Taken:
    """What a side has done: seconds by round, and how many of its answers were right."""

    warm_up_s: float = 0.0
    seconds: dict[int, float] = field(default_factory=dict)
    equal: int = 0
    compared: int = 0


class Turns:
    """Lets every side do the work of each round, in an order that rotates.

    The first round warms up and is not timed. A side that is much slower than ours takes part in
    one more. One that fails is left out from then on, and :attr:`failed` says why.
    """

    def __init__(self, sides: Sequence[Side], device: str) -> None:
        self.sides = list(sides)
        self.taken = {side.name: Taken() for side in sides}
        self.failed: dict[str, str] = {}
        self._device = device

    def round(self, number: int, work: Work) -> None:
        """Round 0 warms up; its answers are compared like the others."""
        texts: dict[str, list[list[int]]] = {}
        shift = number % max(1, len(self.sides))
        for side in [*self.sides[shift:], *self.sides[:shift]]:
            if number > 0 and not self._takes_part(side.name, number):
                continue
            try:
                seconds, texts[side.name] = timed(side, work)
            except Exception as error:  # of another library, of any type
                self.failed[side.name] = f"{type(error).__name__}: {error}"
                self.sides.remove(side)
                side.close()
                continue
            finally:
                if side.name == "batch-defaults":  # it took most of the memory there is
                    release(self._device)
            taken = self.taken[side.name]
            if number == 0:
                taken.warm_up_s = seconds
            else:
                taken.seconds[number] = seconds
        self._compare(texts)

    def _takes_part(self, name: str, number: int) -> bool:
        ours = self.taken[OURS].warm_up_s if OURS in self.taken else 0.0
        slow = ours > 0 and self.taken[name].warm_up_s > _SLOW * ours
        return not slow or number == 1

    def _compare(self, texts: dict[str, list[list[int]]]) -> None:
        """With generate()'s on one request, or on a batch; else with ours."""
        reference = next((n for n in ("single", "padded", OURS) if n in texts), None)
        if reference is None:
            return
        for name, got in texts.items():
            self.taken[name].compared += len(got)
            pairs = zip(got, texts[reference], strict=True)
            self.taken[name].equal += sum(a == b for a, b in pairs)

    def close(self) -> None:
        for side in self.sides:
            side.close()

    def ratio(self, name: str) -> Repeated | None:
        """A side's seconds over ours, of each round that both did; None without any."""
        base, ours = self.taken[name].seconds, self.taken.get(OURS, Taken()).seconds
        rounds = [number for number in base if number in ours]
        if name == OURS or not rounds:
            return None
        pairs = [(base[number], ours[number]) for number in rounds]
        return repeated([Pairs(1, b / c, b / c, b / c, b * 1e6, c * 1e6) for b, c in pairs])


def timed(side: Side, work: Work) -> tuple[float, list[list[int]]]:
    """Seconds of a side's work, and its answers; of a process, the seconds are its own.

    Raises:
        RuntimeError: an answer has another length than asked for.
    """
    start = time.perf_counter()
    texts = side.run(work)
    seconds = time.perf_counter() - start
    if [len(text) for text in texts] != work.new_tokens:
        raise RuntimeError(f"{side.name} gave other numbers of tokens than asked for")
    return getattr(side, "seconds", seconds), texts
