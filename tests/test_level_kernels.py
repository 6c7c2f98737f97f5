"""The kernel level: its grid, its sides, what it refuses to time, and how it reads its results."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.__main__ import main, parse
from bench.common import Json
from bench.levels.kernels import run as kernels_run
from bench.levels.kernels.blocks import SHUFFLED
from bench.levels.kernels.cells import Cells, sampled
from bench.levels.kernels.grid import SHAPES, Case, Shape
from bench.levels.kernels.level import Kernels
from bench.levels.kernels.presets import PRESETS
from bench.levels.kernels.sides import attention_spec, load_libraries
from bench.levels.kernels.time import Effort
from bench.paged.calls import PagedCall
from bench.problem import Problem, reference
from tests.kernel_sides import Blocks, Slots, installed

TINY = ["--small", "--device", "cpu", "--rounds", "1", "--repeats", "2", "--contexts", "48"]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # small matrices; two threads only wait for each other
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def known_bandwidth(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.levels.kernels.run.copy_bandwidth", lambda device: 1e10)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> Shape:
    """The shape of small runs, smaller still."""
    shape = Shape("llama-3-8b-tp2", 2, 4, 2, 16)
    for name in ("llama-3-8b-tp2", "yi-6b"):
        monkeypatch.setitem(SHAPES, name, replace(shape, name=name))
    return shape


def level(tmp_path: Path, *words: str) -> tuple[int, Json]:
    """Exit code and document of a run."""
    path = tmp_path / "kernels.json"
    code = main(["kernels", *words, "--json", str(path)])
    return code, json.loads(path.read_text())


# Runs ---------------------------------------------------------------------------------------------


def test_the_small_run_says_what_it_measured_and_what_is_absent(tmp_path: Path) -> None:
    plot = tmp_path / "kernels.svg"
    code, document = level(tmp_path, *TINY, "--plot", str(plot))
    assert code == 0
    assert document["benchmark"] == "kernels"
    assert document["targets"] == []
    results = document["results"]
    assert [(r["kernel"], r["phase"], r["batch"], r["context"]) for r in results["rows"]] == [
        ("sdpa-gather", "decode", 2, 48),
        ("sdpa-gather", "prefill", 1, 64),
    ]
    decode, prefill = results["rows"]
    assert decode["bytes"] == 2 * 48 * 2 * 4 * 128 * 4
    assert decode["floor_us"] == pytest.approx(decode["bytes"] / 1e4, rel=1e-3)
    assert (decode["queries"], prefill["queries"]) == (1, 32)
    assert prefill["floor_us"] is None
    for row in results["rows"]:
        assert set(row["paged"]) == {"16", "256"}
        for ratio in (row["ordinary"], *row["paged"].values()):
            assert len(ratio["repeats"]) == 2
            assert {"ratio", "spread", "agrees", "base_us", "candidate_us"} < set(ratio)
    assert {row["best_block_tokens"] for row in results["summary"]} <= {16, 256}
    assert results["layout"]["order"] == "head"  # the default of a CPU
    assert "scaled down" in results["scale"]
    for name in ("fa2", "fa3", "flashinfer", "torch", "vllm-fa2", "vllm-fa3"):
        assert "needs a CUDA device" in results["absent"][name]
    assert "failed" not in results
    assert plot.read_text().startswith("<?xml")


@pytest.mark.usefixtures("tiny")
def test_a_library_is_compared_with_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with installed(monkeypatch, Blocks):
        code, document = level(tmp_path, *TINY)
    assert code == 0
    assert [row["kernel"] for row in document["results"]["rows"]] == ["fake", "fake"]
    assert "engine's backend" in document["results"]["forms"]["fake"]["decode"]


@pytest.mark.usefixtures("tiny")
def test_a_side_that_is_wrong_has_no_figure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Blocks, "misreads_blocks", (16,))
    with installed(monkeypatch, Blocks):
        code, document = level(tmp_path, *TINY)
    assert code == 1
    results = document["results"]
    assert all(set(row["paged"]) == {"256"} for row in results["rows"])
    (failed,) = results["failed"]
    assert failed["part"] == "fake paged-16 llama-3-8b-tp2"
    assert "relative error" in failed["why"]


@pytest.mark.usefixtures("tiny")
def test_a_block_size_at_which_a_kernel_fails_costs_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Blocks.attend

    def refuse(self: Blocks, call: PagedCall, *args: Any) -> torch.Tensor:
        if call.block_tokens == 16:
            raise RuntimeError("block size must be a multiple of 256")
        return whole(self, call, *args)

    monkeypatch.setattr(Blocks, "attend", refuse)
    with installed(monkeypatch, Blocks):
        code, document = level(tmp_path, *TINY)
    assert code == 1
    results = document["results"]
    assert [set(row["paged"]) for row in results["rows"]] == [{"256"}] * 2
    assert "must be a multiple of 256" in results["failed"][0]["why"]


@pytest.mark.usefixtures("tiny")
def test_a_kernel_that_misreads_slots_has_no_figures_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Slots, "misreads", 1)
    with installed(monkeypatch, Blocks):
        code, document = level(tmp_path, *TINY)
    assert code == 1
    assert document["results"]["rows"] == []
    assert document["results"]["failed"][0]["part"] == "fake virtual llama-3-8b-tp2"


def test_every_cell_is_checked_too(tiny: Shape, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.model(torch.float32)
    with installed(monkeypatch, Blocks):
        ((library,), absent) = load_libraries("cpu", model)
        assert absent == {}
        monkeypatch.setattr(Blocks, "misreads_blocks", (32,))
        found = _compare(library, Case("decode", tiny, 2, 64), [16, 32])
    assert set(found["paged"]) == {"16"}
    assert set(found["wrong"]) == {"paged-32"}


def _compare(library: Any, case: Case, sizes: list[int]) -> Json:
    from bench.layout import default_choice

    model = case.shape.model(torch.float32)
    where = Cells("cpu", model, (1,), 1, 1 << 30)
    layout = default_choice("cpu", model)
    try:
        with where.filled(layout, case, len(sizes)) as filled:
            return where.compare(filled, library, sizes, SHUFFLED, Effort(1, 1, 0.1))
    finally:
        where.close()


def test_long_prompts_are_checked_where_they_begin_in_the_middle_and_where_they_end() -> None:
    problem = Problem(torch.randn(1, 80, 4, 8), [1], [100])
    k, v = (torch.randn(2, 100, 2, 8) for _ in range(2))
    whole = reference(problem, k, v)
    found = sampled(problem, k, v)
    assert [(rows.start, rows.stop) for rows, _ in found] == [(0, 16), (40, 56), (64, 80)]
    for rows, out in found:
        torch.testing.assert_close(out, whole[:, rows])


@pytest.mark.usefixtures("tiny")
def test_block_sizes_that_a_kernel_does_not_take_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with installed(monkeypatch, Blocks):
        _, document = level(tmp_path, *TINY, "--blocks", "24,64", "--phases", "decode")
        assert [set(row["paged"]) for row in document["results"]["rows"]] == [{"64"}]
        code, document = level(tmp_path, *TINY, "--blocks", "24")
    assert code == 1  # nothing was measured
    assert document["results"]["absent"] == {"fake": "takes none of the block sizes [24]"}


@pytest.mark.usefixtures("tiny")
def test_cells_without_room_are_listed(tmp_path: Path) -> None:
    code, document = level(tmp_path, *TINY, "--max-gib", "0.0001", "--phases", "decode")
    assert code == 1
    (cut,) = document["results"]["cut_for_memory"]
    assert cut["cell"] == "decode llama-3-8b-tp2 2x48"
    assert "may take 107374" in cut["why"]


@pytest.mark.usefixtures("tiny")
def test_cpu_time_can_be_the_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[object] = []

    def clock(run: Callable[[], object]) -> float:
        timed.append(run)
        run()
        return 1e-3

    monkeypatch.setattr(kernels_run, "cpu_clock", clock)
    code, document = level(tmp_path, *TINY, "--clock", "cpu", "--phases", "decode")
    assert code == 0
    assert document["settings"]["clock"] == "cpu"
    assert timed
    (row,) = document["results"]["rows"]
    assert row["ordinary"]["ratio"] == 1.0


@pytest.mark.usefixtures("tiny")
def test_nothing_is_measured_on_a_device_that_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost(*args: Any) -> Json:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(Cells, "compare", lost)
    code, document = level(tmp_path, *TINY)
    assert code == 1
    failed = document["results"]["failed"]
    assert [f["part"] for f in failed] == ["sdpa-gather decode llama-3-8b-tp2 2x48", "the rest"]
    assert document["results"]["summary"] == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--shapes", "gpt-5"], "--shapes: no shape gpt-5"),
        (["--phases", "decode,train"], "--phases: no train; there are decode, prefill"),
        (["--repeats", "0"], "--repeats 0: has to be at least 1"),
        (["--clock", "cpu"], "--clock cpu: times one thread of a CPU; set OMP_NUM_THREADS=1"),
        (["--kernels", "fa9"], "no kernel fa9; there are"),
    ],
)
def test_bad_arguments_are_refused_by_name(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    with pytest.raises(SystemExit, match=message):
        level(tmp_path, *TINY, *words)


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_presets_run_and_stand_beside_what_was_published(preset: str, tmp_path: Path) -> None:
    code, document = level(tmp_path, *TINY[:7], "--preset", preset)
    assert code == 0
    phase = preset.removeprefix("paper-")
    rows = document["results"]["rows"]
    assert {row["phase"] for row in rows} == {phase}
    assert {row["shape"] for row in rows} == {"yi-6b"}
    published = document["results"]["published"]
    expected = {"prefill": ["1.24x", "1.26x", "1.24x"], "decode": ["1.99x", "1.58x", "1.53x"]}
    assert [p["figure"] for p in published[:3]] == expected[phase]
    assert all(p["source"] and p["setting"] for p in published)


def test_the_paper_presets_are_of_its_models_and_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.__main__.gpu_missing", lambda: None)
    args = parse(Kernels(), ["--device", "cuda", "--preset", "paper-prefill"])
    assert (min(args.prompts), max(args.prompts)) == (1024, 192 * 1024)
    assert args.shapes == ["yi-6b", "llama-3-8b-tp2", "yi-34b-tp2"]
    args = parse(Kernels(), ["--device", "cuda", "--preset", "paper-decode"])
    assert (args.batches[0], args.batches[-1], args.contexts) == (1, 32, [16384])


def test_specs_are_of_full_attention() -> None:
    spec = attention_spec(SHAPES["yi-34b-tp2"].model(torch.bfloat16))
    assert (spec.heads, spec.kv_heads, spec.scale) == (28, 4, 128**-0.5)
    assert spec.window is None
