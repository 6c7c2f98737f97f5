"""``make gpu-check`` where there is no GPU: stages, limits, signals, files, and a rehearsal."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from bench.__main__ import parse
from bench.gpu import check, written
from bench.gpu.check import Outcome, Run
from bench.gpu.stages import GROUPS, STAGES, TOTAL_S, Stage, asked_for, limit_of
from bench.levels import registry
from bench.provenance import ROOT, git_commit

KEYS = {
    *("stage", "status", "note", "seconds", "limit_s", "command", "rehearsal", "time", "versions"),
    *("commit", "machine", "attention_backends", "log", "results"),
}


def python(name: str, code: str, *words: str, limit_s: float = 60) -> Stage:
    return Stage(name, 0, limit_s, command=("-c", code, *words))


def read(path: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(path.read_text())
    assert set(document) == KEYS
    assert document["stage"] == path.stem
    assert document["versions"]["python"]
    assert document["machine"]["cpus"] >= 1
    return document


def statuses(outcomes: list[Outcome]) -> list[tuple[str, str]]:
    return [(o.stage, o.status) for o in outcomes]


# The table of stages ------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [(), *GROUPS.values()], ids=["all", *GROUPS])
def test_every_stage_has_its_time_whatever_came_before(names: tuple[str, ...]) -> None:
    stages = asked_for(names)
    assert sum(stage.least_s for stage in stages) <= TOTAL_S - 60 <= 475
    left = TOTAL_S
    for i, stage in enumerate(stages):  # each takes all it gets
        limit = limit_of(stage, stages[i + 1 :], left)
        assert stage.least_s <= limit, stage.name
        assert limit <= stage.most_s or i == len(stages) - 1, stage.name
        left -= limit
    assert left >= 0


def test_the_groups_and_what_is_compiled_leave_no_stage_out() -> None:
    grouped = {name for names in GROUPS.values() for name in names}
    alone = {"compile", "level-allocator"}
    assert grouped | alone == {stage.name for stage in STAGES}
    for names in GROUPS.values():
        assert [stage.name for stage in asked_for(names)] == sorted(names, key=_order)
    assert all(names[0] == "build" for names in GROUPS.values())


def _order(name: str) -> int:
    return [stage.name for stage in STAGES].index(name)


def test_prefill_has_time_for_the_compiler() -> None:
    (prefill,) = asked_for(["prefill"])
    words = prefill.words("f", prefill.least_s)
    # bench.prefill begins a compiled mode with 60 s left of its budget.
    assert float(words[words.index("--budget-s") + 1]) >= 60 + 20


@pytest.mark.parametrize("stage", [s for s in STAGES if "--budget-s" in s.command], ids=str)
def test_a_benchmark_says_where_its_measurements_are(stage: Stage) -> None:
    assert stage.rows


def test_time_left_over_goes_to_later_stages() -> None:
    first, second = Stage("first", 10, 20), Stage("second", 10, 50)
    assert limit_of(first, [second], 40) == 20
    assert limit_of(first, [second], 25) == 15
    assert limit_of(second, [], 38) == 38
    assert limit_of(second, [], 530) == 530  # asked for alone


def test_every_file_of_gpu_tests_belongs_to_one_stage() -> None:
    found = [path for stage in STAGES for p in stage.tests for path in ROOT.glob(p)]
    assert len(found) == len(set(found))
    assert set((ROOT / "tests/gpu").glob("test_*.py")) <= set(found)


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name)
def test_what_a_stage_runs_exists(stage: Stage) -> None:
    words = stage.words("results.json", 100)
    module = words[words.index("-m") + 1]
    if module == "bench":  # a level: its arguments are read as there, its rows are its own
        level = registry.load(words[2])
        assert stage.rows == level.rows
        args = parse(level, words[3:])
        assert args.json == Path("results.json")
        assert stage.name == "-".join(["level", level.name, *filter(None, [args.preset])])
    elif module.startswith("bench."):
        assert ROOT.joinpath(*module.split(".")).with_suffix(".py").exists()
        assert "{json}" not in words
        assert "results.json" in words
    else:
        assert module in ("pip", "pytest")
    mark = "*" if stage.alone else " "
    assert f"\n{stage.name:<9}{mark} " in (check.__doc__ or "")


def test_a_benchmark_is_told_to_end_before_its_limit_does() -> None:
    stage = Stage("x", 0, 100, command=("--budget-s", "{budget}", "--json", "{json}"))
    assert stage.words("f", 100) == ["--budget-s", "70", "--json", "f"]
    assert Stage("x", 0, 100, command=("--limit-s", "{limit}")).words("f", 180)[1] == "160"
    assert stage.words("f", 30)[1] == "10"
    assert stage.words("f", 100, rehearse=True)[1] == "20"


def test_tests_that_do_not_exist_fail_the_stage(tmp_path: Path) -> None:
    stage = Stage("gone", 0, 60, tests=("tests/gpu/test_no_such_*.py",))
    (outcome,) = Run(tmp_path).all([stage])
    assert (outcome.status, outcome.note) == ("failed", "no file is tests/gpu/test_no_such_*.py")


# Without a GPU ------------------------------------------------------------------------------------


def test_without_a_gpu_every_stage_is_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(check, "gpu_missing", lambda: "no GPU in this test")
    assert check.main(["--out", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.strip().splitlines()
    asked, alone = asked_for([]), [stage for stage in STAGES if stage.alone]
    assert [line.split()[0] for line in lines] == [stage.name for stage in (*asked, *alone)]
    for line, stage in zip(lines, (*asked, *alone), strict=True):
        why = f"not asked for: --only {stage.name}" if stage.alone else "no GPU in this test"
        assert "skipped" in line
        assert why in line
    assert not any((tmp_path / f"{stage.name}.json").exists() for stage in alone)
    for stage in asked:
        document = read(tmp_path / f"{stage.name}.json")
        assert (document["status"], document["note"]) == ("skipped", "no GPU in this test")


def test_only_some_stages(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(check, "gpu_missing", lambda: "no GPU in this test")
    assert check.main(["--only", "vmm", "--only", "decode"]) == 0
    lines = capsys.readouterr().out.strip().splitlines()
    assert [line.split()[0] for line in lines] == ["decode", "vmm"]
    assert check.main(["--group", "decode"]) == 0
    lines = capsys.readouterr().out.strip().splitlines()
    assert [line.split()[0] for line in lines] == ["build", "decode", "prefill", "allocator-bench"]
    with pytest.raises(SystemExit):
        check.main(["--only", "vmm", "--group", "decode"])
    with pytest.raises(SystemExit):
        check.main(["--only", "decoding"])
    assert "'decoding'" in capsys.readouterr().err


# Outcomes -----------------------------------------------------------------------------------------


def test_each_stage_leaves_its_file(tmp_path: Path) -> None:
    results = {"targets": [{"met": True}, {"met": False}], "x": 1}
    write = f"import sys; open(sys.argv[1], 'w').write({json.dumps(results)!r})"
    slow = write + "; print('began', flush=True); import time; time.sleep(600)"
    stages = [
        python("good", write, "{json}"),
        python("bad", "raise SystemExit(3)"),
        python("partial", slow, "{json}", limit_s=15),
        python("last", "print(1)"),
    ]
    outcomes = Run(tmp_path).all(stages)
    assert [o.status for o in outcomes] == ["passed", "failed", "timeout", "passed"]
    good, bad, partial = (read(tmp_path / f"{name}.json") for name in ("good", "bad", "partial"))
    assert good["results"] == partial["results"] == results
    assert good["note"] == "1 of 2 targets met"
    assert good["command"] == ["python", "-c", write, "FILE"]
    assert (bad["note"], bad["results"]) == ("exit code 3", None)
    assert "began" in partial["log"]
    assert partial["rehearsal"] is False
    assert not list(tmp_path.glob(".*"))


def test_a_stage_that_does_not_listen_is_killed_with_what_it_started(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    code = (
        "import os, signal, subprocess, sys, time; signal.signal(signal.SIGINT, signal.SIG_IGN); "
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']); "
        f"open({str(pid_file)!r}, 'w').write(str(child.pid)); "
        "os.kill(os.getppid(), signal.SIGTERM); time.sleep(600)"
    )
    made = Run(tmp_path)
    (outcome,) = made.all([python("deaf", code)])
    assert outcome.status == "cut"
    stat = Path(f"/proc/{pid_file.read_text()}/stat")
    assert not stat.exists() or stat.read_text().split()[2] == "Z"  # nobody may have reaped it yet


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_run_and_keeps_what_there_is(
    tmp_path: Path, number: signal.Signals
) -> None:
    code = (
        "import os, sys, time; open(sys.argv[1], 'w').write('{}'); print('began', flush=True); "
        f"os.kill(os.getppid(), {int(number)}); time.sleep(600)"
    )
    stages = [python("first", "print(1)"), python("second", code, "{json}"), python("third", "")]
    before = signal.getsignal(number)
    made = Run(tmp_path)
    outcomes = made.all(stages)
    assert signal.getsignal(number) is before
    assert made.ended_by == number
    expected = [("first", "passed"), ("second", "cut"), ("third", "skipped")]
    assert statuses(outcomes) == expected
    second = read(tmp_path / "second.json")
    assert second["results"] == {}
    assert "began" in second["log"]
    assert f"signal {int(number)}" in read(tmp_path / "third.json")["note"]


def test_a_run_that_was_cut_says_so_in_its_exit_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = "import os, signal; os.kill(os.getppid(), signal.SIGTERM); import time; time.sleep(600)"
    monkeypatch.setattr(check, "STAGES", (python("only", code),))
    assert check.main(["--rehearse", "--out", str(tmp_path)]) == 128 + signal.SIGTERM


def test_nothing_runs_after_a_failed_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "native_module_problem", lambda: "vattn._core is not built")
    stages = [python("build", "raise SystemExit(1)"), python("vmm", "")]
    outcomes = Run(tmp_path).all(stages)
    assert statuses(outcomes) == [("build", "failed"), ("vmm", "skipped")]
    assert "see the stage build" in outcomes[1].note


def test_a_module_that_is_up_to_date_is_not_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check, "native_module_problem", lambda: None)
    made = Run(tmp_path)
    outcomes = made.all([python("build", "raise SystemExit(1)"), python("vmm", "")])
    assert statuses(outcomes) == [("build", "passed"), ("vmm", "passed")]
    document = read(tmp_path / "vmm.json")  # the kernels found after the build stand in it
    assert document["attention_backends"]["sdpa"] is None
    assert set(document["attention_backends"]) >= {"flash_attn_3", "torch", "sdpa"}


def test_a_stage_without_time_is_not_begun(tmp_path: Path) -> None:
    stages = [python("first", ""), Stage("second", 20, 60, command=("-c", ""))]
    outcomes = Run(tmp_path, total_s=25).all(stages)
    assert statuses(outcomes) == [("first", "skipped"), ("second", "passed")]
    assert outcomes[0].note == "no time left of 25 s"


def test_a_stage_that_is_skipped_keeps_what_an_earlier_run_found(tmp_path: Path) -> None:
    Run(tmp_path).all([python("first", "")])
    Run(tmp_path, total_s=1).all([python("first", ""), python("second", "")])
    assert read(tmp_path / "first.json")["status"] == "passed"
    assert read(tmp_path / "second.json")["status"] == "skipped"


def test_tests_of_a_run_that_was_cut_are_counted() -> None:
    log = "tests/a.py::test_x PASSED [ 10%]\ntests/a.py::test_y[1] FAILED\ntests/a.py::test_z "
    assert written.count_tests(log) == "1 passed, 1 failed"
    assert written.count_tests("") == "no test ran"


def test_tests_that_all_skip_do_not_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU: nothing would have been shown."""
    monkeypatch.setattr("bench.gpu.stages.ROOT", tmp_path)
    monkeypatch.setattr("bench.gpu.child.ROOT", tmp_path)
    skipped = "import pytest\n@pytest.mark.gpu\ndef test_x(): pytest.skip('why')\n"
    (tmp_path / "test_x.py").write_text(skipped)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu: x\n")
    stage = Stage("x", 0, 60, tests=("test_x.py",))
    (outcome,) = Run(tmp_path / "out").all([stage])
    assert (outcome.status, outcome.note) == ("failed", "no test passed, 1 skipped")
    (tmp_path / "test_x.py").write_text(skipped + "@pytest.mark.gpu\ndef test_y(): pass\n")
    (outcome,) = Run(tmp_path / "out").all([stage])
    assert (outcome.status, outcome.note) == ("passed", "1 passed, 1 skipped")


def test_a_benchmark_that_wrote_nothing_has_not_passed(tmp_path: Path) -> None:
    stages = [
        python("silent", "", "{json}"),
        python("sorry", "print('skipped: no compute-sanitizer')", "{json}"),
    ]
    silent, sorry = Run(tmp_path).all(stages)
    assert (silent.status, silent.note) == ("failed", "it wrote no result")
    assert (sorry.status, sorry.note) == ("skipped", "no compute-sanitizer")
    assert Run(tmp_path, rehearse=True).all(stages)[0].status == "passed"


ROW = {"mode": "eager"}
PART = {"part": "steps graphs 1x1", "why": "RuntimeError: x"}


@pytest.mark.parametrize(
    ("results", "code", "status", "note"),
    [
        ({"steps": [ROW]}, 0, "passed", ""),
        (
            {"steps": [], "weights": {"layers": 3}, "cut_for_time": ["a", "b", "c", "d"]},
            *(0, "failed", "measured nothing, no time for a; b; c and 1 more"),
        ),
        ({"engine": [ROW], "cut_for_time": ["x"]}, 0, "passed", "no time for x"),
        ({"steps": [ROW], "failed": [PART]}, 1, "partial", "failed: steps graphs 1x1"),
        (
            {"steps": [], "failed": [PART]},
            *(1, "failed", "exit code 1, measured nothing, failed: steps graphs 1x1"),
        ),
        # It ended otherwise than after its last part.
        ({"steps": [ROW]}, 1, "failed", "exit code 1"),
        (
            {"steps": [ROW], "failed": [PART]},
            *(3, "failed", "exit code 3, failed: steps graphs 1x1"),
        ),
        ({"steps": [ROW]}, 124, "timeout", ""),  # of its own limit
    ],
)
def test_a_benchmark_is_judged_by_what_it_measured(
    tmp_path: Path, results: dict[str, Any], code: int, status: str, note: str
) -> None:
    document = json.dumps({"benchmark": "x", "results": results})
    write = f"import sys; open(sys.argv[1], 'w').write({document!r}); sys.exit({code})"
    stage = Stage("x", 0, 60, command=("-c", write, "{json}"), rows=("steps", "engine"))
    (outcome,) = Run(tmp_path).all([stage])
    assert (outcome.status, outcome.note) == (status, note)
    assert read(tmp_path / "x.json")["results"]["results"] == results


def test_half_a_result_file_is_none(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    assert written.read_results(path) is None
    path.write_text('{"a": ')
    assert written.read_results(path) is None


def test_the_table_comes_last_and_names_what_missed(capsys: pytest.CaptureFixture[str]) -> None:
    target = {"name": "step", "measured": 1.7, "limit": 1.5, "unit": "x", "at_least": False}
    results = {"targets": [target | {"met": False}]}
    outcomes = [Outcome("decode", "passed", "0 of 1 targets met", 3.25, results=results)]
    check.print_outcomes([*outcomes, Outcome("vmm", "skipped", "why")])
    lines = capsys.readouterr().out.strip().splitlines()
    assert lines[0] == "decode    step: 1.7 (<= 1.5 x, MISSED)"
    assert lines[-2].split() == ["decode", "passed", "3.2", "s", "0", "of", "1", "targets", "met"]
    assert lines[-1].split() == ["vmm", "skipped", "0.0", "s", "why"]


# Where the tree has no history --------------------------------------------------------------------


def test_a_copy_without_git_is_told_its_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bench.provenance.ROOT", tmp_path)
    monkeypatch.delenv("VATTN_COMMIT", raising=False)
    assert git_commit() == "unknown"
    monkeypatch.setenv("VATTN_COMMIT", "0123abc-dirty")
    assert git_commit() == "0123abc-dirty"
    monkeypatch.setenv("VATTN_COMMIT", "main")
    with pytest.raises(ValueError, match="VATTN_COMMIT='main'"):
        git_commit()
    with pytest.raises(ValueError, match="VATTN_COMMIT='main'"):  # before any work
        check.main(["--out", str(tmp_path)])


# Rehearsals ---------------------------------------------------------------------------------------


def test_a_rehearsal_is_no_measurement(tmp_path: Path) -> None:
    assert check.main(["--rehearse", "--only", "vmm", "--out", str(tmp_path)]) == 0
    document = read(tmp_path / "vmm.json")
    assert document["rehearsal"] is True
    assert document["results"]["benchmark"] == "vmm"
    assert document["command"][:3] == ["python", "-m", "bench.vmm"]
    assert str(tmp_path) not in json.dumps(document["command"])
    assert sys.executable not in document["command"]
