"""What bench.allocator_gpu runs in each of its processes, the same wherever memory comes from."""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from bench.alloc_traces.training import make_optimizer, train_step, varying_lengths
from bench.common import Json

cuda: Any = torch.cuda  # parts of it are untyped


@dataclass(frozen=True)
class Size:
    """How much of everything; see :data:`SIZES`."""

    hidden: int
    layers: int
    vocabulary: int
    sequences: int
    longest: int
    steps: int
    dtype: torch.dtype
    live_bytes: int
    smallest: int
    phases: int
    pairs: int


SIZES = {
    "cuda": Size(1024, 16, 32_000, 8, 2048, 40, torch.bfloat16, 12 << 30, 1 << 20, 8, 20_000),
    "cpu": Size(64, 2, 256, 2, 64, 4, torch.float32, 8 << 20, 64 << 10, 3, 50),
}
PAIR_BYTES = (512, 64 << 10, 4 << 20, 64 << 20)
_PAIR_RUNS = 7


class Memory:
    """What a part of a program takes of the device, and asks its driver for.

    Args:
        device: of type ``cuda``, or ``cpu``, of which there are no figures.
        driver_calls: mappings and unmappings, or cudaMalloc and cudaFree, so far.
    """

    def __init__(self, device: torch.device, driver_calls: Callable[[], int]) -> None:
        self._on_gpu = device.type == "cuda"
        self._driver_calls = driver_calls
        self.begin()

    def begin(self) -> None:
        """A new part; what the one before has left in caches goes."""
        gc.collect()
        self.peak_used_bytes = 0
        if not self._on_gpu:
            return
        cuda.synchronize()
        cuda.empty_cache()
        cuda.reset_peak_memory_stats()
        self._used_before = self._used()
        self._allocated_before = int(cuda.memory_stats()["requested_bytes.all.current"])
        self._calls_before = self.calls()

    def look(self) -> None:
        """Notes what is in use now. Caches keep what they have, so between steps is enough."""
        if self._on_gpu:
            used = self._used() - self._used_before
            self.peak_used_bytes = max(self.peak_used_bytes, used)

    def calls(self) -> int:
        """Of the driver, so far."""
        return self._driver_calls() if self._on_gpu else 0

    def found(self) -> Json:
        """Figures of the part so far; {} on a CPU.

        ``peak_used_bytes`` by the driver's count, ``peak_reserved_bytes`` by the allocator's,
        ``peak_requested_bytes`` of tensors, ``driver_calls``, ``alloc_retries``.
        """
        if not self._on_gpu:
            return {}
        stats = cuda.memory_stats()
        return {
            "peak_used_bytes": self.peak_used_bytes,
            "peak_reserved_bytes": int(stats["reserved_bytes.all.peak"]),
            "peak_requested_bytes": int(stats["requested_bytes.all.peak"]) - self._allocated_before,
            "driver_calls": self.calls() - self._calls_before,
            "alloc_retries": int(stats["num_alloc_retries"]),
        }

    @staticmethod
    def _used() -> int:
        free, total = cuda.mem_get_info()
        return int(total - free)


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        cuda.synchronize()


# Training -----------------------------------------------------------------------------------------


def make_model(size: Size, device: torch.device) -> Any:
    """A Llama with random weights, the same ones each time."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden,
        intermediate_size=3 * size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=size.hidden // 64 or 1,
        num_key_value_heads=size.hidden // 64 or 1,
        max_position_embeddings=size.longest,
        bos_token_id=1,
        eos_token_id=None,
        pad_token_id=0,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    make: Any = AutoModelForCausalLM.from_config
    with device:
        return make(config, dtype=size.dtype, attn_implementation="sdpa")


def train(size: Size, device: torch.device, memory: Memory) -> Json:
    """Steps of varying lengths, twice, then of one length.

    Returns:
        ``first_us`` and ``step_us``: each step of the first and of the second round, which has the
        same lengths in another order; ``steady_us``; ``steady_calls``: of the driver, in the second
        half of the steps of one length; figures of memory.
    """
    memory.begin()
    model = make_model(size, device)
    optimizer = make_optimizer(model)
    wait(device)

    def steps(lengths: Sequence[int]) -> list[float]:
        return [timed_step(size, device, model, optimizer, length, memory) for length in lengths]

    lengths = varying_lengths(size.steps, size.longest)
    first = steps(lengths)
    random.Random(1).shuffle(lengths)
    again = steps(lengths)
    half = [size.longest // 2] * (size.steps // 4)
    steady = steps(half)
    calls = memory.calls()
    steady += steps(half)
    found = {
        "tokens": [size.sequences * length for length in lengths],
        "first_us": first,
        "step_us": again,
        "steady_us": steady,
        "steady_calls": memory.calls() - calls,
    }
    return found | memory.found()


def timed_step(
    size: Size, device: torch.device, model: Any, optimizer: Any, length: int, memory: Memory
) -> float:
    """Microseconds from an idle device to an idle device."""
    tokens = torch.randint(1, size.vocabulary, (size.sequences, length), device=device)
    wait(device)
    begun = time.perf_counter()
    train_step(model, optimizer, tokens)
    wait(device)
    took = time.perf_counter() - begun
    memory.look()
    return took * 1e6


# Fragmentation ------------------------------------------------------------------------------------


def fragments(size: Size, device: torch.device, memory: Memory) -> Json:
    """Blocks fill the memory, every other one goes, larger ones come, and so on.

    Returns:
        ``us``: of all requests and releases; ``operations``; figures of memory.
    """
    memory.begin()
    rng = random.Random(0)
    blocks: list[torch.Tensor] = []
    live = operations = 0
    begun = time.perf_counter()
    for phase in range(size.phases):
        smallest = size.smallest << phase // 2
        while live < size.live_bytes:
            nbytes = rng.randrange(smallest, 16 * smallest)
            blocks.append(torch.empty(nbytes, dtype=torch.uint8, device=device))
            live += nbytes
            operations += 1
        memory.look()
        rng.shuffle(blocks)
        gone = blocks[len(blocks) // 2 :]
        del blocks[len(blocks) // 2 :]
        live -= sum(block.nbytes for block in gone)
        operations += len(gone)
        del gone
    took = (time.perf_counter() - begun) * 1e6
    blocks.clear()
    return {"us": took, "operations": operations} | memory.found()


# Pairs --------------------------------------------------------------------------------------------


def pair(nbytes: int, count: int, device: torch.device) -> Json:
    """Nanoseconds of ``torch.empty`` and the end of its tensor, served from the cache.

    Returns:
        ``ns``, the median of several runs, and ``low_ns``, the best of them.
    """
    torch.empty(nbytes, dtype=torch.uint8, device=device)

    def run() -> float:
        begun = time.perf_counter_ns()
        for _ in range(count):
            torch.empty(nbytes, dtype=torch.uint8, device=device)
        return (time.perf_counter_ns() - begun) / count

    times = sorted(run() for _ in range(_PAIR_RUNS))
    return {"bytes": nbytes, "ns": statistics.median(times), "low_ns": times[0]}
