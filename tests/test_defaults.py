"""The layout that a device gets by default: chosen by measurement, or said not to be."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench.provenance import ROOT
from bench.report import suggestion
from vattn import KVCache, PagePool, _core
from vattn.kv import defaults
from vattn.kv.defaults import (
    DEFAULTS,
    UNMEASURED,
    LayoutDefault,
    default_page_bytes,
    layout_default,
)

CUDA = torch.device("cuda", 0)
CPU = torch.device("cpu")


def entry(name: str, page_bytes: int | None = None) -> LayoutDefault:
    return LayoutDefault("token", 4, page_bytes, f"{UNMEASURED}{name}")


@pytest.fixture
def h200(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(name="NVIDIA H200", major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)


# The table ----------------------------------------------------------------------------------------


def test_every_kind_of_device_has_an_entry() -> None:
    assert {"cpu", "cuda"} <= set(DEFAULTS)


@pytest.mark.parametrize("name", DEFAULTS)
def test_every_entry_has_its_source(name: str) -> None:
    found = DEFAULTS[name]
    if found.source.startswith(UNMEASURED):
        assert len(found.source) > len(UNMEASURED)
        return
    path = ROOT / found.source
    assert path.is_relative_to(ROOT / "bench/results")
    assert path.name == "layout.json"
    choice = suggestion(path)["choice"]
    taken = (found.order, found.layers_per_region, found.page_bytes)
    assert taken == (choice["order"], choice["layers_per_region"], choice["page_bytes"])


def test_names_go_before_capabilities_before_kinds(h200: None) -> None:
    table = {name: entry(name) for name in ("NVIDIA H200", "sm_90", "cuda")}
    for name in list(table):
        assert layout_default(CUDA, table).source.endswith(name)
        del table[name]
    with pytest.raises(KeyError):
        layout_default(CUDA, table)


def test_a_device_that_is_not_there_has_the_entry_of_its_kind(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert layout_default(CUDA) is DEFAULTS["cuda"]
    assert layout_default(CPU) is DEFAULTS["cpu"]


# Its use ------------------------------------------------------------------------------------------


def cache(**options: Any) -> KVCache:
    return KVCache(8, 2, 16, torch.float32, max_seqs=1, max_tokens=64, **options)


def test_a_cache_lies_as_the_table_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(DEFAULTS, "cpu", entry("test", 64 << 10))
    with cache() as found:
        assert [len(region.layers) for region in found.layout.regions] == [4, 4]
        assert {region.order for region in found.layout.regions} == {"token"}
        assert found.pool.page_bytes == found.layout.page_bytes == 64 << 10
    assert PagePool().page_bytes == 64 << 10
    with cache(order="head", layers_per_region=8, page_bytes=16 << 10) as found:
        assert [(r.order, len(r.layers)) for r in found.layout.regions] == [("head", 8)]
        assert found.pool.page_bytes == 16 << 10


def test_pages_that_a_driver_cannot_make_are_its_own_instead(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    driver = _core.host_driver()
    monkeypatch.setitem(DEFAULTS, "cpu", entry("test", 8 << 10))
    assert default_page_bytes(CPU, driver) == 8 << 10
    for page_bytes in (5000, None):
        monkeypatch.setitem(defaults.DEFAULTS, "cpu", entry("test", page_bytes))
        assert default_page_bytes(CPU, driver) == driver.default_page_bytes()
