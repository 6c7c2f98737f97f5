"""Arrays arrive as they are, in one copy, and no buffer is written while it is read."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from vattn.attention.upload import ALIGNMENT, Packing, Ring, Uploader


class Device(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Copies from pinned memory are done late: when an event after them is waited for.

    Each event made by :meth:`event` notes the waits that were of use.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.pinned: list[torch.Tensor] = []
        self.copies: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.done = self.waits = 0

    def pin(self, n: int) -> torch.Tensor:
        self.pinned.append(torch.full((n,), 0xAB, dtype=torch.uint8))
        return self.pinned[-1]

    def event(self) -> Event:
        return Event(self)

    def run(self, until: int | None = None) -> None:
        """Does the copies, all of them or the first ones."""
        until = len(self.copies) if until is None else until
        with _disable_current_modes():
            for target, source in self.copies[self.done : until]:
                target.copy_(source)
        self.done = max(self.done, until)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.copy_.default:
            storages = [x.untyped_storage().data_ptr() for x in self.pinned]
            assert args[1].untyped_storage().data_ptr() in storages
            assert args[2] is True  # the host does not wait
            self.copies.append((args[0], args[1]))
            return args[0]
        return func(*args, **(kwargs or {}))


class Event:
    def __init__(self, device: Device) -> None:
        self.device = device
        self.mark = 0

    def record(self) -> None:
        self.mark = len(self.device.copies)

    def synchronize(self) -> None:
        self.device.waits += self.device.done < self.mark
        self.device.run(self.mark)


@pytest.fixture
def device() -> Device:
    return Device()


def ring(device: Device, buffers: int = 3) -> Ring:
    return Ring(pin=device.pin, event=device.event, buffers=buffers)


ARRAYS: list[Any] = [
    np.arange(5, dtype=np.int64),
    np.array([], np.int32),
    np.arange(12, dtype=np.int32).reshape(3, 4),
    np.array([True, False, True]),
    np.arange(7, dtype=np.float32)[::2],  # not contiguous
    np.arange(6, dtype=np.int64).reshape(2, 3).T,
    np.array(3.5),
]


def test_arrays_arrive(device: Device) -> None:
    upload = Uploader("cpu", ring(device))
    with device:
        tensors = upload(*ARRAYS)
    assert len(device.copies) == 1
    device.run()
    for array, tensor in zip(ARRAYS, tensors, strict=True):
        assert torch.equal(tensor, torch.from_numpy(array.copy()))
        assert tensor.dtype == torch.from_numpy(array.copy()).dtype
        assert tensor.data_ptr() % ALIGNMENT == 0 or not tensor.numel()
        assert tensor.is_contiguous()


def test_nothing_is_no_transfer(device: Device) -> None:
    with device:
        assert Uploader("cpu", ring(device))() == []
        [tensor] = Uploader("cpu", ring(device))(np.array([], np.int64))
    assert tensor.shape == (0,)
    assert tensor.dtype == torch.int64
    assert device.copies == []


def test_buffers_in_flight_are_not_written(device: Device) -> None:
    """The device is never ahead of what the host has waited for."""
    upload = Uploader("cpu", ring(device, buffers=3))
    sent = []
    with device:
        for i in range(20):
            array = np.full(10 + i, i, np.int64)
            sent.append((array.copy(), upload(array)[0]))
            array[:] = -1
    assert device.waits == 20 - 3
    device.run()
    for array, tensor in sent:
        assert torch.equal(tensor, torch.from_numpy(array))


def test_a_ring_without_waits_would_be_noticed(device: Device) -> None:
    """What the test above relies on."""

    class Careless(Event):
        def synchronize(self) -> None:
            pass

    upload = Uploader("cpu", Ring(pin=device.pin, event=lambda: Careless(device), buffers=2))
    with device:
        tensors = [upload(np.full(4, i, np.int64))[0] for i in range(4)]
    device.run()
    assert [int(tensor[0]) for tensor in tensors] == [2, 3, 2, 3]


def test_buffers_grow_and_stay(device: Device) -> None:
    upload = Uploader("cpu", ring(device, buffers=2))
    with device:
        for _ in range(10):
            upload(np.zeros(100, np.int64))
        assert len(device.pinned) == 2
        for _ in range(10):
            upload(np.zeros(100_000, np.int64))
        assert len(device.pinned) == 4
        for n in range(1, 100_000, 9_999):
            upload(np.zeros(n, np.int64))
    assert len(device.pinned) == 4


def test_into_memory_that_stays(device: Device) -> None:
    upload = Uploader("cpu", ring(device))
    packing = Packing.of(ARRAYS)
    target = torch.full((packing.total_bytes + 8,), 0xCD, dtype=torch.uint8)
    views = packing.views(target)
    with device:
        upload.into(target, *ARRAYS)
    assert len(device.copies) == 1
    device.run()
    for array, view in zip(ARRAYS, views, strict=True):
        assert torch.equal(view, torch.from_numpy(array.copy()))
    assert (target[-8:] == 0xCD).all()
    with pytest.raises(ValueError, match=f"{packing.total_bytes} bytes.*room for 16"):
        upload.into(target[:16], *ARRAYS)


def test_a_cpu_needs_no_copy() -> None:
    upload = Uploader("cpu")
    arrays: list[Any] = [np.arange(3), np.arange(4, dtype=np.int32)]
    for array, tensor in zip(arrays, upload(*arrays), strict=True):
        assert tensor.data_ptr() == array.ctypes.data
    target = torch.zeros(64, dtype=torch.uint8)
    upload.into(target, *arrays)
    for array, view in zip(arrays, Packing.of(arrays).views(target), strict=True):
        assert torch.equal(view, torch.from_numpy(array))


def test_transfers_are_not_captured(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    upload = Uploader("cuda", ring(device))
    target = torch.zeros(64, dtype=torch.uint8)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="not captured"):
        upload(np.arange(3))
    with pytest.raises(RuntimeError, match="not captured"):
        upload.into(target, np.arange(3))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    upload.into(target, np.arange(3))
    assert target[8] == 1
