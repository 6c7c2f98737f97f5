"""How the kernel level reads its results, and FlashInfer's contiguous forms."""

from __future__ import annotations

import sys
import types
from typing import Any

import numpy as np
import pytest
import torch

from bench.common import Json, summarize_pairs
from bench.layout_points import Model
from bench.levels.kernels.contiguous import of_sdpa, pages_of_slots, ragged_prompt
from bench.levels.kernels.level import Kernels
from bench.levels.kernels.sides import attention_spec
from bench.levels.kernels.tables import summarize
from bench.levels.repeat import repeated
from bench.problem import Problem, reference
from tests.kernel_sides import Blocks, attend
from vattn.attention.operators import Unavailable

CPU = {"device": "cpu", "phases": ["decode", "prefill"]}


def ratio(*repeats: float) -> Json:
    return repeated([summarize_pairs([value * 1e-3], [1e-3]) for value in repeats]).as_json()


def row(context: int, paged: dict[str, float], **given: Any) -> Json:
    return {
        "kernel": "fa2",
        "phase": "decode",
        "shape": "yi-6b",
        "batch": 8,
        "context": context,
        "queries": 1,
        "bytes": 1000,
        "floor_us": 12.5,
        "virtual_us": 1000.0,
        "clock": "graph",
        "ordinary": ratio(1.0, 1.0),
        "paged": {size: ratio(value, value) for size, value in paged.items()},
    } | given


ROWS = [
    row(128, {"16": 1.1, "256": 0.9}),
    row(512, {"16": 1.3, "256": 1.01}),
    row(2048, {"16": 1.2, "256": 1.6}),
]


def test_the_best_block_size_is_the_one_with_the_lowest_mean_over_all_cells() -> None:
    (found,) = summarize(ROWS)
    assert found["best_block_tokens"] == 256
    assert found["paged"]["256"] == pytest.approx((0.9 * 1.01 * 1.6) ** (1 / 3), abs=1e-3)
    assert (found["wins"], found["ties"], found["losses"]) == (1, 1, 1)
    assert (found["ratio_low"], found["ratio_high"]) == (pytest.approx(0.9), pytest.approx(1.6))
    # A size that is missing in a cell is not compared over others than all have.
    (found,) = summarize([*ROWS, row(64, {"16": 0.1})])
    assert found["best_block_tokens"] == 256
    assert found["ratio"] == pytest.approx((0.9 * 1.01 * 1.6) ** (1 / 3), abs=1e-3)


def test_kernels_and_phases_have_a_best_size_each() -> None:
    rows = [
        row(64, {"16": 1.0, "32": 2.0}),
        row(64, {"16": 2.0, "32": 1.5}, phase="prefill", floor_us=None),
        row(64, {}, kernel="fa3", ordinary=None),
    ]
    found = summarize(rows)
    assert [(f["kernel"], f["phase"], f["best_block_tokens"]) for f in found] == [
        ("fa2", "decode", 16),
        ("fa2", "prefill", 32),
        ("fa3", "decode", None),
    ]


def test_tables_have_a_column_for_each_block_size_and_say_where_repeats_disagree() -> None:
    rows = [*ROWS, row(4096, {"16": 1.0}, clock="events", ordinary=ratio(0.8, 1.2))]
    ratios, best = Kernels().tables({"rows": rows, "placement": "shuffled"})
    assert list(ratios.header)[3:] == [
        "virtual us",
        "floor us",
        "ordinary",
        "blocks of 16",
        "blocks of 256",
    ]
    assert ratios.rows[0][:3] == ["yi-6b", 8, "128"]
    assert ratios.rows[-1][3:] == ["1,000", "12.5", "1.00 (0.80-1.20)", "1.00", "-"]
    assert "10 of 11 ratios agree within 10%" in ratios.note
    assert "1 of 4 rows could not be captured" in ratios.note
    assert best.rows == [["fa2", "decode", 256, 1.133, "0.90-1.60", "1 / 1 / 1", 1.0]]
    assert Kernels().tables({}) == []


def test_what_did_not_fit_has_a_table() -> None:
    cut = [{"cell": "decode yi-6b 8x64K", "why": "needs 9 bytes, and may take 8"}]
    assert Kernels().tables({"rows": ROWS, "cut_for_memory": cut})[-1].rows == [
        ["decode yi-6b 8x64K", "needs 9 bytes, and may take 8"]
    ]


def test_the_target_of_a_cpu_is_of_long_decodes_at_their_best_block() -> None:
    (target,) = Kernels().targets(CPU, {"rows": ROWS})
    assert target.measured == pytest.approx((1.3 * 1.2) ** 0.5, abs=1e-3)
    assert (target.limit, target.met) == (1.3, False)
    assert target.note == "blocks of 16; geometric mean of 2 cells, 1.20 to 1.30"
    (target,) = Kernels().targets(CPU, {})
    assert target.met is None
    assert Kernels().targets(CPU | {"device": "cuda"}, {"rows": ROWS}) == []
    assert Kernels().targets(CPU | {"phases": ["prefill"]}, {"rows": ROWS}) == []


def test_the_plot_has_a_panel_for_each_phase_and_a_line_for_each_block_size() -> None:
    from matplotlib.figure import Figure

    figure = Figure()
    prefill = [row(c, {"16": 1.0}, phase="prefill", batch=1) for c in (64, 128)]
    assert Kernels().draw(figure, {"rows": [*ROWS, *prefill]})
    decode, other = figure.axes
    lines = {line.get_label(): line.get_xdata(orig=True) for line in decode.get_lines()}
    assert {"fa2 16", "fa2 256", "fa2 ordinary"} <= set(lines)
    assert np.asarray(lines["fa2 256"]).tolist() == [128, 512, 2048]
    assert other.get_title().startswith("prefill")
    # One context at many batches, as the paper has decodes.
    figure = Figure()
    by_batch = [row(1024, {"16": 1.0}, batch=batch) for batch in (1, 4, 8)]
    Kernels().draw(figure, {"rows": by_batch})
    assert np.asarray(figure.axes[0].get_lines()[0].get_xdata()).tolist() == [1, 4, 8]
    assert not Kernels().draw(Figure(), {"rows": []})


# Contiguous forms ---------------------------------------------------------------------------------

MODEL = Model(2, 4, 2, 8, torch.float32)


def slots(order: str) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (4, 2, 96, 8) if order == "head" else (4, 96, 2, 8)
    k, v = (torch.randn(shape) for _ in range(2))
    return (k.transpose(1, 2), v.transpose(1, 2)) if order == "head" else (k, v)


@pytest.mark.parametrize("queries", [1, 5, 40])
def test_sdpa_reads_neighbours_of_one_length_in_one_call(queries: int) -> None:
    k, v = slots("head")
    lengths = [40, 40, 90, 64]
    problem = Problem(torch.randn(4, queries, 4, 8), [2, 3, 1, 0], lengths)
    (call,) = of_sdpa(attention_spec(MODEL))(problem, [(k, v)])
    torch.testing.assert_close(call(), reference(problem, k, v))


@pytest.mark.parametrize("queries", [1, 3])
def test_flashinfer_reads_a_slot_as_pages_that_follow_each_other(queries: int) -> None:
    class AnySize(Blocks):
        block_multiple = 1

    problem = Problem(torch.randn(2, queries, 4, 8), [3, 1], [70, 33])
    layers = [slots("token") for _ in range(2)]
    calls = pages_of_slots(AnySize)(problem, layers)
    for call, (k, v) in zip(calls, layers, strict=True):
        torch.testing.assert_close(call(), reference(problem, k, v))
    with pytest.raises(RuntimeError, match="view size is not compatible"):
        pages_of_slots(AnySize)(problem, [slots("head")])  # never a copy


def test_flashinfer_prompts_go_to_its_ragged_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    class Ragged:
        def __init__(self, workspace: torch.Tensor, layout: str) -> None:
            assert (workspace.dtype, layout) == (torch.uint8, "NHD")

        def plan(
            self,
            qo_indptr: torch.Tensor,
            kv_indptr: torch.Tensor,
            num_qo_heads: int,
            num_kv_heads: int,
            head_dim_qk: int,
            causal: bool = False,
            sm_scale: float | None = None,
            q_data_type: Any = "float16",
            kv_data_type: Any = None,
        ) -> None:
            assert causal
            assert (num_qo_heads, num_kv_heads, head_dim_qk) == (4, 2, 8)
            assert q_data_type == kv_data_type == torch.float32
            assert sm_scale is not None
            self.lengths = [int(qo_indptr[-1]), int(kv_indptr[-1])]
            self.scale = sm_scale

        def run(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            assert [len(q), len(k)] == self.lengths
            return attend(q, torch.tensor([0, len(q)]), [(k, v)], self.scale)

    module: Any = types.ModuleType("flashinfer")
    module.BatchPrefillWithRaggedKVCacheWrapper = Ragged
    monkeypatch.setitem(sys.modules, "flashinfer", module)
    k, v = slots("token")
    for asked, lengths in (([3], [70]), ([3, 1], [70, 33])):
        problem = Problem(torch.randn(len(asked), 9, 4, 8), asked, lengths)
        (call,) = ragged_prompt(attention_spec(MODEL))(problem, [(k, v)])
        torch.testing.assert_close(call(), reference(problem, k, v))


def test_a_flashinfer_without_what_is_needed_is_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flashinfer", types.ModuleType("flashinfer"))
    with pytest.raises(Unavailable, match="has no BatchPrefillWithRaggedKVCacheWrapper"):
        ragged_prompt(attention_spec(MODEL))
