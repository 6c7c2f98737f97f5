"""Memory that several streams and threads use, under enable()."""

from __future__ import annotations

import queue
import threading
from typing import Any

import torch

from tests.gpu.allocator_scripts.begin import MIB, cuda, enabled, holds, main, settle

BYTES = 64 * MIB
BUSY_CYCLES = 40_000_000  # about 20 ms


def hand_over(device: str, value: int, *, recorded: bool) -> tuple[torch.Tensor, bool, bool]:
    """A producer's tensor is read late by a consumer, and freed and replaced before that.

    Returns:
        What the consumer saw; whether the replacement got the same memory; and whether the consumer
        was done by then.
    """
    producer, consumer = _streams()
    with cuda.stream(producer):
        data = torch.full((BYTES,), value, dtype=torch.uint8, device=device)
        ready = producer.record_event()
    with cuda.stream(consumer):
        seen = torch.empty_like(data)
        consumer.wait_event(ready)
        cuda._sleep(BUSY_CYCLES)
        seen.copy_(data)
        read = consumer.record_event()
    if recorded:
        data.record_stream(consumer)
    place = data.data_ptr()
    del data
    with cuda.stream(producer):
        again = torch.full((BYTES,), 255, dtype=torch.uint8, device=device)
    # In this order: who was done at the time of the request is done now.
    reused = again.data_ptr() == place
    return seen, reused, bool(read.query())


_made: list[Any] = []


def _streams() -> tuple[Any, Any]:
    if not _made:
        _made.extend(cuda.Stream() for _ in range(2))
    return _made[0], _made[1]


def record_stream(device: str) -> None:
    """What another stream still reads is not used again; without record_stream it is."""
    with enabled(device, 4096 * MIB):
        hand_over(device, 0, recorded=True)  # kernels are loaded
        cuda.synchronize()
        seen = []
        waited = 0
        for value in range(1, 25):
            tensor, reused, done = hand_over(device, value, recorded=True)
            assert done or not reused, f"round {value}: the consumer was not done"
            waited += not done
            seen.append(tensor)
        cuda.synchronize()
        for value, tensor in enumerate(seen, start=1):
            assert holds(tensor, value), f"round {value}: the producer wrote into it too early"
        assert waited > 0, "the consumer was always done: this shows nothing"
        del seen, tensor
        settle(device)
        # The pattern is one that would be noticed: not told, the allocator cannot know.
        early = 0
        for value in range(1, 9):
            _, reused, done = hand_over(device, value, recorded=False)
            early += reused and not done
            cuda.synchronize()
        assert early > 0, "a freed tensor's memory was not the next one's on its stream"


def memory_of_another_stream(device: str) -> None:
    """What one stream has freed serves another when there is nothing else, after its work."""
    with enabled(device, 1024 * MIB):
        producer, consumer = _streams()
        for value in range(1, 6):
            with cuda.stream(producer):
                data = torch.full((640 * MIB,), value, dtype=torch.uint8, device=device)
                cuda._sleep(BUSY_CYCLES)
                total = data[:: 64 * 1024].clone()  # late
            del data
            with cuda.stream(consumer):  # only there if it takes what the producer had
                other = torch.full((640 * MIB,), 200, dtype=torch.uint8, device=device)
            cuda.synchronize()
            assert holds(total, value), "the consumer wrote while the producer was reading"
            assert holds(other[: 64 * MIB], 200)
            del other, total


def threads(device: str) -> None:
    """Threads with streams of their own make, use and hand on tensors; each checks what it gets.

    Matrix products take a workspace for each stream.
    """
    rounds, count = (200, 4) if device == "cuda" else (40, 3)
    with enabled(device):
        inbox: list[queue.Queue[Any]] = [queue.Queue() for _ in range(count)]
        wrong: list[BaseException] = []

        def work(me: int) -> None:
            stream = cuda.Stream() if device == "cuda" else None
            try:
                with cuda.stream(stream):
                    for i in range(rounds):
                        make_and_pass(me, i, stream)
                        receive(me, stream)
            except BaseException as error:
                wrong.append(error)
                inbox[(me + 1) % count].put(None)

        def make_and_pass(me: int, i: int, stream: Any) -> None:
            rows = 64 + 64 * (i % 7)
            eye = torch.eye(rows, device=device)
            made = (eye * (i + 1)) @ torch.full((rows, rows), me + 1.0, device=device)
            ready = None if stream is None else stream.record_event()
            inbox[(me + 1) % count].put((made, ready, float((i + 1) * (me + 1))))

        def receive(me: int, stream: Any) -> None:
            got = inbox[me].get(timeout=60)
            assert got is not None, "another thread failed"
            tensor, ready, value = got
            if stream is not None:
                stream.wait_event(ready)
                tensor.record_stream(stream)
            doubled = tensor * 2
            assert float(doubled.min()) == float(doubled.max()) == 2 * value

        started = [threading.Thread(target=work, args=(me,)) for me in range(count)]
        for thread in started:
            thread.start()
        for thread in started:
            thread.join()
        assert not wrong, wrong
        for waiting in inbox:
            assert waiting.empty()
        if device == "cuda":
            settle(device)
            before = cuda.memory_allocated()
            clear: Any = torch._C
            clear._cuda_clearCublasWorkspaces()
            assert cuda.memory_allocated() < before, "workspaces are memory of ours"


class Numbers(torch.utils.data.Dataset[torch.Tensor]):
    """Item ``i`` is a megabyte of ``i``, modulo 251."""

    def __len__(self) -> int:
        return 96

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.full((MIB,), index % 251, dtype=torch.uint8)


def loader(device: str) -> None:
    """A DataLoader with worker processes and a pinning thread, made after CUDA is in use.

    The workers are forked, and have no use for the device's memory.
    """
    on_gpu = device == "cuda"
    with enabled(device):
        torch.ones(1, device=device)
        batches = torch.utils.data.DataLoader(
            Numbers(), batch_size=8, num_workers=2 if on_gpu else 0, pin_memory=on_gpu
        )
        side = cuda.Stream() if on_gpu else None
        for number, batch in enumerate(batches):
            with cuda.stream(side):
                there = batch.to(device, non_blocking=True)
            if side is not None:
                cuda.current_stream().wait_stream(side)
                there.record_stream(cuda.current_stream())
            wanted = torch.arange(8 * number, 8 * number + 8, device=device) % 251
            assert bool((there == wanted[:, None]).all())
            del there


if __name__ == "__main__":
    main(record_stream, memory_of_another_stream, threads, loader)
