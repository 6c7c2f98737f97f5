"""A short program with all its memory from vattn.allocator, under ``compute-sanitizer memcheck``.

    python -m bench.gpu.memcheck_allocator                     # under the tool
    python -m bench.gpu.memcheck_allocator --run --device cpu  # the program alone

Training steps, a captured graph, tensors handed from stream to stream, a tag that is paused, and
memory that is trimmed while others use theirs: a kernel that touches a page after it was unmapped,
or before it was mapped, is found. What lies within pages is packed without gaps, so a kernel that
leaves its tensor for a neighbour makes no error here; the tests look for that by contents.
"""

from __future__ import annotations

import sys
from typing import Any

import torch

from bench.gpu import memcheck

MIB = 1 << 20
STEPS = 6

cuda: Any = torch.cuda  # parts of it are untyped


def run(device: str) -> dict[str, int]:
    """The program; on a CPU only its training, with memory as it comes there.

    Returns:
        What it did, by name.

    Raises:
        RuntimeError: contents were lost, or memory is left.
    """
    if device != "cuda":
        return {"steps": train(device)}
    from vattn import _core, allocator

    allocator.enable(budget_bytes=2048 * MIB)
    did = {
        "steps": train(device),
        "replays": replay(device),
        "handed_over": hand_over(device),
        "paused": pause(device),
    }
    cuda.synchronize()
    allocator.trim()
    made = _core.torch_allocator(0)
    assert made is not None
    made.check()
    if any(_core.torch_entry_errors().values()):
        raise RuntimeError(f"refused frees: {_core.torch_entry_errors()}")
    return did | {"mapped": made.pool.driver.counters()["map"][0]}


def train(device: str) -> int:
    """Steps of varying lengths, with caches emptied between some of them."""
    torch.manual_seed(0)
    layers = [torch.nn.Linear(256, 256) for _ in range(3)]
    model = torch.nn.Sequential(*layers).to(device)
    optimizer = torch.optim.AdamW(model.parameters())
    for step in range(STEPS):
        x = torch.randn(64 + 997 * step, 256, device=device)
        loss = torch.tanh(model(x)).square().mean()
        torch.autograd.backward(loss)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 2 and device == "cuda":
            cuda.empty_cache()
    return STEPS


def replay(device: str) -> int:
    """A graph's memory stays while all other memory is trimmed."""
    given = torch.ones(MIB, device=device)
    graph = cuda.CUDAGraph()
    with cuda.graph(graph):
        out = (given + 1) * 2
    for i in range(STEPS):
        given.fill_(i)
        other = torch.full((3 * MIB,), i, device=device)
        del other
        cuda.empty_cache()
        graph.replay()
        expect(out, 2.0 * (i + 1))
    return STEPS


def hand_over(device: str) -> int:
    """Freed by one stream while another still reads it."""
    producer, consumer = cuda.Stream(), cuda.Stream()
    for i in range(STEPS):
        with cuda.stream(producer):
            data = torch.full((2 * MIB,), float(i), device=device)
        consumer.wait_stream(producer)
        with cuda.stream(consumer):
            cuda._sleep(1_000_000)
            copy = data.clone()
        data.record_stream(consumer)
        del data
        with cuda.stream(producer):
            again = torch.full((2 * MIB,), -1.0, device=device)
        del again
        cuda.empty_cache()
        cuda.synchronize()
        expect(copy, float(i))
    return STEPS


def pause(device: str) -> int:
    """A tag's pages go to others and come back."""
    from vattn import allocator

    with allocator.pool("weights"):
        weights = torch.full((8 * MIB,), 3.0, device=device)
    for i in range(2):
        allocator.pause("weights")
        other = torch.full((8 * MIB,), float(i), device=device)
        expect(other, float(i))
        del other
        allocator.resume("weights")
        expect(weights, 3.0)
    return 2


def expect(tensor: torch.Tensor, value: float) -> None:
    if not bool((tensor == value).all()):
        raise RuntimeError(f"a tensor of {value} has lost its contents")


if __name__ == "__main__":
    sys.exit(memcheck.main(None, "bench.gpu.memcheck_allocator", run))
