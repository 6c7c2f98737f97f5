"""What an allocator holds and did, in the form of ``torch.cuda.memory._snapshot()``.

PyTorch's memory page (https://pytorch.org/memory_viz) opens it, and so do the functions of
``torch.cuda._memory_viz``. Events are there for as long as recording is on
(:func:`vattn.allocator.record_trace`). No call stack is recorded, since no path of the allocator
takes the GIL; the place of frames holds one that names the tag, so that the page and flame graphs
tell tags apart.
"""

from __future__ import annotations

import os
import pickle
from typing import TYPE_CHECKING, Any

from vattn import _core
from vattn.allocator.snapshot_events import playable
from vattn.allocator.which import allocator_of

if TYPE_CHECKING:
    import torch

# The page's unpickler knows protocols up to this one.
_PICKLE_PROTOCOL = 4
_ATTEMPTS = 100
_NO_TAG = "(no tag)"
_PAUSES = ("pause", "resume")


def snapshot(
    device: str | torch.device | int | None = None, allocator: _core.CachingAllocator | None = None
) -> dict[str, Any]:
    """The memory of an allocator as a dictionary.

    ``segments`` are stretches of mapped addresses with their blocks, ``device_traces`` what was
    recorded, the oldest first, as in PyTorch. Beside what is there:

    * Blocks and events of a tag have one frame, whose ``name`` is the tag.
    * ``device_free`` of an ``oom`` is 0: what was free then is not recorded. The error's message
      told it.
    * Events are cut to what the page can play backwards (see :mod:`.snapshot_events`).
    * ``vattn`` holds figures (:meth:`CachingAllocator.figures`), pauses and resumptions, and how
      many events were dropped for newer ones.

    Args:
        device: whose allocator; None for the current device.
        allocator: another allocator instead.

    Raises:
        RuntimeError: there is no allocator on the device.
    """
    allocator = allocator_of(device, allocator)
    figures, found, recorded, dropped = _consistent(allocator)
    index = _device_index(allocator.pool.driver.name())
    segments = [_segment(index, each) for each in found]
    events = [_event(*each) for each in recorded if each[0] not in _PAUSES]
    traces: list[list[dict[str, Any]]] = [[] for _ in range(index + 1)]
    traces[index] = playable(events, segments)
    return {
        "segments": segments,
        "device_traces": traces,
        "allocator_settings": {"backend": "vattn", "expandable_segments": True},
        "external_annotations": [],
        "vattn": {
            "figures": figures,
            "pool": allocator.pool.stats(),
            "dropped_events": dropped,
            "pauses": [_pause(*each) for each in recorded if each[0] in _PAUSES],
        },
    }


def dump_snapshot(
    path: str | os.PathLike[str] = "dump_snapshot.pickle",
    device: str | torch.device | int | None = None,
    allocator: _core.CachingAllocator | None = None,
) -> None:
    """Writes :func:`snapshot` to a file for https://pytorch.org/memory_viz.

    Args:
        path: of the file, which is replaced.
        device: as for :func:`snapshot`.
        allocator: as for :func:`snapshot`.

    Raises:
        RuntimeError: there is no allocator on the device.
        OSError: the file cannot be written.
    """
    content = snapshot(device, allocator)
    with open(path, "wb") as file:
        pickle.dump(content, file, protocol=_PICKLE_PROTOCOL)


def _consistent(
    allocator: _core.CachingAllocator,
) -> tuple[dict[str, Any], list[dict[str, Any]], list[Any], int]:
    """Figures, segments and events of one moment.

    Other threads may allocate between the calls. Where they never stop, what is returned is from
    moments very close to each other, and events that do not fit the segments are left out.
    """
    for _ in range(_ATTEMPTS):
        before = allocator.figures()
        segments = allocator.segments()
        events, dropped = allocator.recorded()
        if allocator.figures() == before:
            break
    return before, segments, events, dropped


def _device_index(name: str) -> int:
    """``"cuda:1"`` is 1; the host is shown as device 0."""
    return int(name.partition(":")[2] or 0)


def _frames(tag: str) -> list[dict[str, Any]]:
    return [{"filename": "vattn tag", "line": 0, "name": tag}] if tag else []


def _segment(device: int, found: dict[str, Any]) -> dict[str, Any]:
    graph = tuple(found["graph_pool"])
    scope = "" if found["scope"] == _NO_TAG else found["scope"]
    blocks = _blocks(found["blocks"], _frames(scope))
    live = [block for block in blocks if block["state"] == "active_allocated"]
    active = [block for block in blocks if block["state"] != "inactive"]
    return {
        "device": device,
        "address": found["address"],
        "total_size": found["bytes"],
        "allocated_size": sum(block["size"] for block in live),
        "active_size": sum(block["size"] for block in active),
        "requested_size": sum(block["requested_size"] for block in active),
        "stream": found["stream"],
        "segment_type": found["kind"],
        "segment_pool_id": graph,
        "is_expandable": True,
        "frames": _frames(scope),
        "blocks": blocks,
    }


def _blocks(found: list[Any], frames: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Blocks in torch's form; neighbours that are free are one."""
    blocks: list[dict[str, Any]] = []
    for address, size, asked, state in found:
        if state == "inactive" and blocks and blocks[-1]["state"] == "inactive":
            blocks[-1]["size"] += size
            continue
        blocks.append(
            {
                "address": address,
                "size": size,
                "requested_size": asked,
                "state": state,
                "frames": [] if state == "inactive" else list(frames),
            }
        )
    return blocks


def _event(
    action: str, address: int, size: int, stream: int, time_us: int, tag: int
) -> dict[str, Any]:
    event: dict[str, Any] = {
        "action": action,
        "size": size,
        "stream": stream,
        "time_us": time_us,
        "frames": _frames(_core.tag_name(tag)),
    }
    return event | ({"device_free": 0} if action == "oom" else {"addr": address})


def _pause(
    action: str, address: int, size: int, stream: int, time_us: int, tag: int
) -> dict[str, Any]:
    del address, stream  # of all of the tag
    return {"action": action, "tag": _core.tag_name(tag), "bytes": size, "time_us": time_us}
