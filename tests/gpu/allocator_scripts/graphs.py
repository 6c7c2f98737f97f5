"""CUDA graphs under enable(): what a captured graph may touch keeps its address and its pages."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import torch

from tests.gpu.allocator_scripts.begin import (
    MIB,
    cuda,
    enabled,
    fill_up,
    filled,
    holds,
    main,
    settle,
)

BUDGET = 4096 * MIB


def warm_up(work: Callable[[], object]) -> None:
    """Runs it on a stream of its own, as a capture has to be preceded by."""
    side = cuda.Stream()
    side.wait_stream(cuda.current_stream())
    with cuda.stream(side):
        for _ in range(3):
            work()
    cuda.current_stream().wait_stream(side)
    cuda.synchronize()


def replay_beside_others(device: str) -> None:
    """Many replays while tensors of all sizes come and go, and memory is trimmed and runs out."""
    with enabled(device, BUDGET):
        weight = torch.randn(1024, 1024, device=device) / 32
        given = torch.randn(512, 1024, device=device)

        def work() -> torch.Tensor:
            x = given
            for _ in range(6):
                x = torch.tanh(x @ weight)  # each is a tensor of the graph's pool
            return x

        warm_up(work)
        graph = cuda.CUDAGraph()
        with cuda.graph(graph):
            out = work()
        place = out.data_ptr()
        rng = random.Random(0)
        held: list[tuple[torch.Tensor, int]] = []
        for i in range(300):
            given.normal_()
            graph.replay()
            held.append((filled(rng.randrange(1, 48 * MIB), i % 251, device), i % 251))
            if len(held) > 12:
                tensor, value = held.pop(rng.randrange(len(held)))
                assert holds(tensor, value), f"round {i}: a replay wrote into another's memory"
                del tensor
            if i % 10 == 9:
                torch.testing.assert_close(out, work(), rtol=1e-4, atol=1e-4)
                assert out.data_ptr() == place
            if i % 60 == 59:
                cuda.empty_cache()
        kept = out.clone()
        held.clear()
        filler = fill_up(32 * MIB, device)  # all that is not the graph's
        del filler[-2:]  # room to look at them
        for tensor in filler:
            tensor.fill_(7)
        assert torch.equal(out, kept), "the pages of the graph's result went elsewhere"
        for _ in range(20):
            graph.replay()
        assert torch.equal(out, kept)
        assert all(holds(tensor, 7) for tensor in filler)


def graphed_callables(device: str) -> None:
    """torch.cuda.make_graphed_callables, forward and backward, trains as the model itself does."""
    with enabled(device, BUDGET):
        torch.manual_seed(0)
        plain = torch.nn.Sequential(
            torch.nn.Linear(256, 512), torch.nn.Tanh(), torch.nn.Linear(512, 256)
        ).to(device)
        model = copy.deepcopy(plain)
        sample = torch.randn(64, 256, device=device)
        graphed: Any = cuda.make_graphed_callables(model, (sample,))
        both: list[tuple[Any, torch.optim.Optimizer]] = [
            (each, torch.optim.SGD(each.parameters(), lr=0.05)) for each in (plain, graphed)
        ]
        for i in range(30):
            x, wanted = (torch.randn(64, 256, device=device) for _ in range(2))
            losses = []
            for each, optimizer in both:
                loss = torch.nn.functional.mse_loss(each(x), wanted)
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                losses.append(float(loss.detach()))
            assert abs(losses[0] - losses[1]) <= 1e-3 * losses[0], (i, losses)
            other = filled((1 + i % 5) * 8 * MIB, i, device)
            assert holds(other, i)


def shared_pool(device: str) -> None:
    """Two graphs in one pool; when both are gone, its memory serves others again."""
    with enabled(device, BUDGET):
        given = torch.zeros(16 * MIB, device=device)
        cuda.synchronize()
        cuda.empty_cache()
        before = cuda.memory_allocated(), cuda.memory_reserved()
        first, second = cuda.CUDAGraph(), cuda.CUDAGraph()
        with cuda.graph(first):
            a = (given + 1) * 2
        with cuda.graph(second, pool=first.pool()):
            b = a + 3
        places = a.data_ptr(), b.data_ptr()
        for i in range(50):
            given.fill_(i)
            first.replay()
            second.replay()
            other = filled(64 * MIB, i, device)
            wanted = 2.0 * (i + 1)
            assert bool((a == wanted).all())
            assert bool((b == wanted + 3).all())
            assert holds(other, i)
        assert places == (a.data_ptr(), b.data_ptr())
        del other
        first.reset()  # its pool stays for the other one
        second.replay()
        assert bool((b == wanted + 3).all())
        inside = cuda.memory_allocated()
        assert inside >= before[0] + 2 * 64 * MIB, "a and b are of the pool"
        del a, b, first, second
        settle(device)
        cuda.empty_cache()
        # A generator's state for captures, of a few bytes, may stay.
        assert cuda.memory_allocated() <= before[0] + 4096
        assert cuda.memory_reserved() <= before[1] + 4 * MIB, "the pool's pages did not come back"


def out_of_memory_in_a_capture(device: str) -> None:
    """PyTorch's own error, and the next capture works."""
    with enabled(device, BUDGET):
        x = torch.ones(MIB, device=device)
        try:
            with cuda.graph(cuda.CUDAGraph()):
                y = x * 2
                torch.empty(2 * BUDGET, dtype=torch.uint8, device=device)
            raise AssertionError("there was no memory for this")
        except torch.OutOfMemoryError as error:
            assert "out of memory" in str(error), error
        y = x * 5
        assert bool((y == 5).all())
        graph = cuda.CUDAGraph()
        with cuda.graph(graph):
            z = x * 3
        graph.replay()
        assert bool((z == 3).all())
        del graph, z


if __name__ == "__main__":
    main(replay_beside_others, graphed_callables, shared_pool, out_of_memory_in_a_capture)
