"""The layout and page size that a device gets when the user asks for none, and why.

A table, filled in by measurement: each entry names the result file that decided it, or says that
nothing has been measured yet. ``python -m bench.report --suggest FILE`` says what a result file of
``bench.layout`` speaks for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from vattn import _core
from vattn.kv.layout import Order

UNMEASURED = "unmeasured: "


@dataclass(frozen=True)
class LayoutDefault:
    """How K and V lie on one device.

    Attributes:
        order: of tokens and heads, see :mod:`vattn.kv.layout`.
        layers_per_region: layers that share a region; None is all equal ones.
        page_bytes: None is the driver's own default, the granularity on CUDA.
        source: the result file that decided, from the root of the repository, or
            ``"unmeasured: "`` and why this is a fair guess.
    """

    order: Order
    layers_per_region: int | None
    page_bytes: int | None
    source: str


# By the name of a device as torch gives it ("NVIDIA H200"), by compute capability ("sm_90"), or by
# kind ("cuda", "cpu"), which every device has. The first that is there counts, in this order.
DEFAULTS: dict[str, LayoutDefault] = {
    "cpu": LayoutDefault("head", None, 16 << 10, "bench/results/cpu/layout.json"),
    "cuda": LayoutDefault(
        "token",
        8,
        None,
        UNMEASURED + "of the layouts that waste less than 5% "
        "(bench/results/cpu/levels/memory.json), the one with the longest rows; make gpu-check "
        "measures its speed",
    ),
}


def layout_default(
    device: torch.device, table: Mapping[str, LayoutDefault] = DEFAULTS
) -> LayoutDefault:
    """The entry of ``table`` for a device: by name, else by compute capability, else by kind.

    Raises:
        KeyError: the table has none for this kind of device.
    """
    return table[next((name for name in _names(device) if name in table), device.type)]


def default_page_bytes(device: torch.device, driver: _core.Driver) -> int:
    """Bytes of a page where none is asked for.

    The table's, unless this driver cannot make such pages (one of a coarser granularity, as tests
    give a pool); then the driver's own.
    """
    page_bytes = layout_default(device).page_bytes
    if page_bytes is None or page_bytes % driver.granularity():
        return driver.default_page_bytes()
    return page_bytes


def _names(device: torch.device) -> Iterator[str]:
    if device.type == "cuda" and torch.cuda.is_available():
        found = torch.cuda.get_device_properties(device)
        yield found.name
        yield f"sm_{found.major}{found.minor}"
