"""The report: what is rendered from result files of GPUs, and that nothing else is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from bench import report
from bench.provenance import ROOT
from bench.report_files import collect, load, scrub
from bench.report_tables import UNMEASURED

COMMIT = "0123456789abcdef0123456789abcdef01234567"
README = f"# x\n\n{report.BEGIN}\nold\n{report.END}\nrest\n"


def stage(name: str, results: Any = None, targets: Any = (), **changes: Any) -> dict[str, Any]:
    """A stage's file as gpu-check writes it."""
    benchmark = {"benchmark": name, "settings": {}, "results": results, "targets": list(targets)}
    return {
        "stage": name,
        "status": "passed",
        "note": "",
        "seconds": 1.5,
        "limit_s": 60.0,
        "command": ["python", "-m", f"bench.{name}", "--json", "FILE"],
        "rehearsal": False,
        "time": "2026-11-21T00:00:00Z",
        "versions": {"torch": "2.11.0"},
        "commit": COMMIT,
        "machine": {"cpus": 16, "gpu": {"name": "NVIDIA H200"}},
        "attention_backends": {"torch": None},
        "log": "File /root/secret/place.py",
        "results": None if results is None else benchmark,
        **changes,
    }


def target(name: str, measured: float | None, limit: float, met: bool | None) -> dict[str, Any]:
    found = {"name": name, "measured": measured, "limit": limit, "unit": "x", "note": ""}
    return found | {"at_least": False, "met": met}


def speed(page_mib: int, fast: float, live: float) -> dict[str, Any]:
    layout = {"order": "token", "layers_per_region": None, "page_bytes": page_mib << 20}
    return layout | {"speed": fast, "worst": fast - 0.05, "live_share": live}


def operation(op: str, page_mib: int, run: int, us: float) -> dict[str, Any]:
    times = {"run_us_per_page": us, "single_us_per_page": 2 * us}
    return {"driver": "cuda", "op": op, "page_bytes": page_mib << 20, "run_pages": run} | times


DECODE_ROW = {"mode": "graphs", "batch": 64, "context": 2048, "flow_us": 5700.0, "ratio": 1.14}
SERVED_ROW = {
    "shape": "llama3-8b",
    "concurrency": 16,
    "tokens_per_s": 4321.0,
    "ttft_ms": {"p50": 31.0, "p99": 62.0},
    "tpot_ms": {"p50": 9.5, "p99": 9.9},
}
STAGES = [
    stage("contract", note="65 passed"),
    stage(
        "decode", {"steps": [DECODE_ROW | {"floor_us": 5000.0}]}, [target("step", 1.2, 1.5, True)]
    ),
    stage(
        "layout",
        {
            "suggestion": {
                "choice": speed(2, 0.99, 0.96),
                "front": [speed(32, 1.0, 0.91), speed(2, 0.99, 0.96)],
                "layouts": [speed(32, 1.0, 0.91), speed(2, 0.99, 0.96), speed(16, 0.9, 0.9)],
            }
        },
    ),
    stage("workload", {"served": [SERVED_ROW], "nano": SERVED_ROW | {"shape": "qwen3-0.6b"}}),
    stage(
        "vmm",
        {
            "operations": [
                *(operation("map", 2, 1, 9.0), operation("map", 2, 64, 3.0)),
                operation("create", 2, 64, 40.0) | {"driver": "host"},
            ],
            "beside_a_kernel": {
                "calls": [{"op": "map", "page_bytes": 2 << 20, "idle_us": 21, "beside_us": 34}],
                "launches": [
                    {"what": "alone", "page_bytes": 2 << 20, "median_us": 4.0, "p99_us": 7.0}
                ],
            },
        },
    ),
]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "README.md").write_text(README)
    (tmp_path / "bench/results/cpu").mkdir(parents=True)
    (tmp_path / "bench/results/cpu/vmm.json").write_text("{}")
    return tmp_path


def put(root: Path, documents: list[dict[str, Any]], folder: str = "nvidia-h200") -> Path:
    target = root / "bench/results" / folder
    target.mkdir(parents=True, exist_ok=True)
    for document in documents:
        (target / f"{document['stage']}.json").write_text(json.dumps(document))
    return target


def rendered(root: Path) -> str:
    assert report.main([], root) == 0
    return (root / "README.md").read_text()


def plots(root: Path) -> set[str]:
    return {path.name for path in (root / "docs/images").glob("*")}


# The repository -----------------------------------------------------------------------------------


def test_this_readme_is_what_the_results_say(capsys: pytest.CaptureFixture[str]) -> None:
    assert report.main(["--check"]) == 0, capsys.readouterr().out


# Rendering ----------------------------------------------------------------------------------------


def test_without_a_gpu_nothing_is_claimed(root: Path) -> None:
    assert rendered(root) == README.replace("old\n", UNMEASURED)
    assert plots(root) == set()
    assert report.main(["--check"], root) == 0


def test_every_row_names_its_source(root: Path) -> None:
    put(root, STAGES)
    text = rendered(root)
    rows = [line for line in text.splitlines() if line.startswith("|") and "---" not in line]
    assert "### NVIDIA H200" in text
    for line in (row for row in rows if not row.endswith(" source |")):
        (name,) = [s["stage"] for s in STAGES if f"{s['stage']}.json" in line]
        assert line.endswith(
            f"| [{name}.json](bench/results/nvidia-h200/{name}.json), NVIDIA H200, 0123456, "
            f"`python -m bench.gpu.check --only {name}` |"
        )
    for cells in (
        "| step | 1.2x | at most 1.5x | met |",
        "| model | graphs | 64 x 2K | 5.7 | 5 | 1.14x |",
        "| **token order, all a region, 2M** | 0.990x | 0.940x | 0.960 |",
        "| token order, all a region, 32M | 1.000x | 0.950x | 0.910 |",
        "| closed loop | llama3-8b | 16 | 4,321 | 31 | 62 | 9.5 | 9.9 |",
        "| nano-vllm's | qwen3-0.6b | 16 |",
        "| map | 2M | 64 | 3 | 6 | 21 / 34 |",
        "| alone | 2M | 4 | 7 |",
        "| contract | 65 passed |",
    ):
        assert cells in text
    assert "create" not in text  # of the host's driver
    assert text.startswith("# x\n")
    assert text.endswith("\nrest\n")


def test_plots_of_what_was_measured(root: Path) -> None:
    put(root, STAGES)
    text = rendered(root)
    names = {f"gpu-nvidia-h200-{name}.svg" for name in _PLOTS}
    assert plots(root) == names
    assert all(f"](docs/images/{name})" in text for name in names)
    before = {name: (root / "docs/images" / name).read_bytes() for name in names}
    assert rendered(root) == text
    assert {name: (root / "docs/images" / name).read_bytes() for name in names} == before
    assert all(b"<svg" in image and b"0123456" in image for image in before.values())


_PLOTS = ("layout", "decode", "throughput", "driver-calls")


def test_a_stage_that_is_missing_has_no_figure_and_no_plot(root: Path) -> None:
    folder = put(root, STAGES)
    rendered(root)
    (folder / "decode.json").unlink()
    assert report.main(["--check"], root) == 1
    text = rendered(root)
    assert "decode" not in text
    assert plots(root) == {f"gpu-nvidia-h200-{n}.svg" for n in _PLOTS if n != "decode"}


@pytest.mark.parametrize("status", ["failed", "cut", "skipped"])
def test_a_stage_that_failed_has_no_figure(root: Path, status: str) -> None:
    put(root, [STAGES[0], STAGES[1] | {"status": status}])
    text = rendered(root)
    assert "65 passed" in text
    assert "decode" not in text
    assert plots(root) == set()


@pytest.mark.parametrize("status", ["partial", "timeout"])
def test_figures_of_a_stage_that_is_not_complete_say_so(root: Path, status: str) -> None:
    put(root, [STAGES[1] | {"status": status}])
    text = rendered(root)
    assert "| model | graphs | 64 x 2K | 5.7 | 5 | 1.14x |" in text
    assert "| step | 1.2x | at most 1.5x | met |" in text
    rows = [line for line in text.splitlines() if "decode.json" in line]
    assert len(rows) == 2
    assert all(row.endswith(f"--only decode`, **{status}** |") for row in rows)
    assert plots(root) == {"gpu-nvidia-h200-decode.svg"}
    plot = root / "docs/images/gpu-nvidia-h200-decode.svg"
    assert f"0123456, {status}" in plot.read_text()


def test_figures_of_a_part_that_failed_do_not_appear(root: Path) -> None:
    step = DECODE_ROW | {"floor_us": 5000.0}
    rows = [step, step | {"mode": "eager", "context": 1024}, step | {"mode": "eager"}]
    failed = [{"part": "steps eager 64x2048", "why": "AssertionError: x"}]
    targets = [target("step", 1.2, 1.5, True)]
    put(root, [stage("decode", {"steps": rows, "failed": failed}, targets, status="partial")])
    text = rendered(root)
    assert "| model | graphs | 64 x 2K |" in text
    assert "| model | eager | 64 x 1K |" in text
    assert "| model | eager | 64 x 2K |" not in text
    assert "| step |" not in text  # it may be of the part that failed


@pytest.mark.parametrize(
    ("name", "part", "results", "left"),
    [
        ("prefill", "eager 8192", {"prefill": [{"mode": "eager", "tokens": 8192}]}, False),
        ("prefill", "compiled 8192", {"prefill": [{"mode": "eager", "tokens": 8192}]}, True),
        ("workload", "nano", {"nano": {"shape": "x"}, "served": [SERVED_ROW]}, True),
        ("workload", "nano", {"nano": {"shape": "x"}}, False),
        ("mapping", "steps", {"ways": {"ahead": {"p50": 1}}, "steady": True}, False),
    ],
)
def test_a_stage_of_which_every_part_failed_has_nothing_to_show(
    root: Path, name: str, part: str, results: dict[str, Any], left: bool
) -> None:
    failed = {"failed": [{"part": part, "why": "x"}]}
    folder = put(root, [stage(name, results | failed, status="partial")])
    found = load(folder, root)
    assert [file.stage for file in found] == ([name] if left else [])
    assert all("nano" not in file.results for file in found)


def test_a_stage_that_is_not_complete_and_measured_nothing_is_not_shown(root: Path) -> None:
    put(root, [STAGES[0] | {"status": "timeout"}, stage("decode", {"steps": []}, status="timeout")])
    assert rendered(root) == README.replace("old\n", UNMEASURED)


def test_a_gpu_without_a_stage_that_passed_is_not_named(root: Path) -> None:
    put(root, [STAGES[1] | {"status": "failed"}])
    assert rendered(root) == README.replace("old\n", UNMEASURED)


def test_what_was_not_measured_is_not_shown(root: Path) -> None:
    targets = [target("got", 1.2, 1.0, False), target("not got", None, 1.0, None)]
    put(root, [stage("compile", {}, targets)])
    text = rendered(root)
    assert "| got | 1.2x | at most 1x | **missed** |" in text
    assert "not got" not in text


def test_rows_without_what_a_table_needs_are_left_out(root: Path) -> None:
    rows = {"steps": [{"mode": "eager"}], "served": [], "operations": [], "engine": None}
    put(root, [stage(name, rows) for name in ("decode", "workload", "vmm", "layout", "jitter")])
    text = rendered(root)
    assert "eager" not in text
    assert "|" not in text


def test_two_gpus_stand_one_after_the_other(root: Path) -> None:
    other = {"cpus": 8, "gpu": {"name": "NVIDIA B200"}}
    put(root, [STAGES[0] | {"machine": other, "commit": "unknown"}], "nvidia-b200")
    put(root, [STAGES[0]])
    text = rendered(root)
    assert text.index("### NVIDIA B200") < text.index("### NVIDIA H200")
    assert "NVIDIA B200, unknown, `" in text


# --check ------------------------------------------------------------------------------------------


def test_check_finds_what_differs_and_writes_nothing(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    put(root, STAGES)
    assert report.main(["--check"], root) == 1
    out = capsys.readouterr().out
    assert "README.md is not what the results say" in out
    assert "docs/images/gpu-nvidia-h200-decode.svg is missing" in out
    assert (root / "README.md").read_text() == README
    assert not (root / "docs").exists()
    rendered(root)
    assert report.main(["--check"], root) == 0
    (root / "docs/images/gpu-nvidia-h100-decode.svg").write_text("<svg/>")
    assert report.main(["--check"], root) == 1
    assert "gpu-nvidia-h100-decode.svg has no result" in capsys.readouterr().out


@pytest.mark.parametrize(
    "readme", ["# none\n", f"{report.END}\n{report.BEGIN}\n", f"{report.BEGIN}\n" * 2 + report.END]
)
def test_a_readme_without_its_markers_is_refused(
    root: Path, readme: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (root / "README.md").write_text(readme)
    assert report.main([], root) == 1
    assert "once each, in this order" in capsys.readouterr().err
    assert (root / "README.md").read_text() == readme


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("decode", json.dumps({"benchmark": "decode"}), "is not the result of a stage"),
        ("decode", json.dumps(STAGES[2]), "is not the result of a stage"),
        ("layout", json.dumps(STAGES[2] | {"rehearsal": True}), "is of a rehearsal"),
    ],
)
def test_files_that_are_no_results_are_refused(
    root: Path, name: str, text: str, problem: str
) -> None:
    folder = put(root, [])
    (folder / f"{name}.json").write_text(text)
    with pytest.raises(ValueError, match=f"{name}.json {problem}"):
        load(folder, root)


# --collect ----------------------------------------------------------------------------------------


def test_collect_takes_over_what_passed_without_the_machine_s_paths(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = root / "results/somewhere"
    run.mkdir(parents=True)
    missing = {"flash_attn": "cannot open /opt/lib64/libx.so.1: no such file", "rate": "tok/s"}
    good = stage("decode", {"missing_kernels": missing, "trace": "bench/results/cpu"})
    for document in (good, stage("layout", {"cells": []}, status="timeout")):
        (run / f"{document['stage']}.json").write_text(json.dumps(document))
    assert report.main(["--collect", str(run)], root) == 0
    assert "left out: layout, which is timeout and has no figure" in capsys.readouterr().out
    folder = root / "bench/results/nvidia-h200"  # by the device's name
    assert [path.name for path in folder.iterdir()] == ["decode.json"]
    text = (folder / "decode.json").read_text()
    assert "secret" not in text
    assert "/opt" not in text
    found = json.loads(text)
    assert "log" not in found
    assert found["results"]["results"]["missing_kernels"] == {
        "flash_attn": "cannot open libx.so.1: no such file",
        "rate": "tok/s",
    }
    assert found["results"]["results"]["trace"] == "bench/results/cpu"
    (file,) = load(folder, root)
    assert (file.stage, file.commit) == ("decode", "0123456")


def test_collect_refuses_a_rehearsal_and_a_run_without_results(root: Path, capsys: Any) -> None:
    run = root / "results/rehearsal"
    run.mkdir(parents=True)
    (run / "decode.json").write_text(json.dumps(STAGES[1] | {"rehearsal": True}))
    assert report.main(["--collect", str(run)], root) == 1
    assert "rehearsal on a CPU" in capsys.readouterr().err
    (run / "decode.json").write_text(json.dumps(STAGES[1] | {"status": "failed"}))
    assert report.main(["--collect", str(run)], root) == 1
    assert "no stage that passed or has figures" in capsys.readouterr().err
    with pytest.raises(ValueError, match="no stage that passed or has figures"):
        collect(root / "nowhere", root / "bench/results")
    assert not (root / "bench/results/nvidia-h200").exists()


def test_scrub() -> None:
    assert scrub("at /a/b/c.py:3, not /dev or a/b or http://x/y/z") == (
        "at c.py:3, not /dev or a/b or http://x/y/z"
    )
    assert scrub({"/x/y/z": ["/home/me/dir/", 3, None]}) == {"z": ["dir", 3, None]}


# --suggest ----------------------------------------------------------------------------------------


def test_suggest_names_the_entry_of_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    path = ROOT / "bench/results/cpu/layout.json"
    assert report.main(["--suggest", str(path)]) == 0
    assert "LayoutDefault('head', None, 16384, ...)" in capsys.readouterr().out


def test_suggest_reads_a_stage_s_file_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    inner = json.loads((ROOT / "bench/results/cpu/layout.json").read_text())
    path = tmp_path / "layout.json"
    path.write_text(json.dumps(stage("layout") | {"results": inner}))
    assert report.main(["--suggest", str(path)]) == 0
    assert "LayoutDefault('head'" in capsys.readouterr().out
    shutil.copy(ROOT / "bench/results/cpu/vmm.json", path)
    assert report.main(["--suggest", str(path)]) == 1
    assert "is not a result of bench.layout" in capsys.readouterr().err
