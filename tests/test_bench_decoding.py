"""The benchmark of ways of decoding, at its smallest. Counts are asserted, times are not."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

import bench.decoding
from bench import decoding_beams, decoding_penalties
from bench.common import Target, summarize_pairs
from tests.test_bench import load


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def document(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Of a run of all sections."""
    path = tmp_path_factory.mktemp("bench") / "decoding.json"
    assert bench.decoding.main(["--small", "--json", str(path)]) == 0
    found = load(path, "decoding")
    assert str(path.parent) not in json.dumps(found)  # results name no folders
    assert found["targets"] == []
    return found


def targets_of(name: str, found: Any) -> dict[str, Target]:
    return {t.name: t for t in bench.decoding.SECTIONS[name].make_targets(found)}


def test_all_sections_run(document: dict[str, Any]) -> None:
    assert list(document["results"]) == document["settings"]["sections"]
    assert set(document["results"]) == {"structured", "speculation", "penalties", "beams"}
    for name, found in document["results"].items():
        assert found["settings"], name
        targets = targets_of(name, found).values()
        assert all(target.measured is not None for target in targets), name


def test_beams(document: dict[str, Any]) -> None:
    """Memory and copies are counted, so even a small run keeps what is asked of a large one."""
    found = document["results"]["beams"]
    settings, counts = found["settings"], found["counts"]
    assert found["equal"] == found["compared"] == 1 + settings["rounds"]
    # All steps between the prompt and the last token, at which the slots are free again.
    assert counts["steps"] == settings["new_tokens"] - 2
    assert counts["runs"] == 2 * settings["layers"]
    assert 1 < counts["physical_most"] < settings["width"]
    assert 0 < counts["received_mean"] <= counts["received_most"] < 1
    assert counts["staged_most"] == 0
    assert all(target.met for target in targets_of("beams", found).values())


def test_beams_that_share_nothing_miss_the_target() -> None:
    counts = {
        "physical_most": 8.0,
        "beside_tails_most": 7.5,
        "received_most": 0.8,
        "received_mean": 0.4,
        "staged_most": 0.3,
        "staged_mean": 0.1,
    }
    found = {"counts": counts, "equal": 2, "compared": 3}
    assert [target.met for target in decoding_beams.make_targets(found)] == [False] * 3


def test_penalties(document: dict[str, Any]) -> None:
    found = document["results"]["penalties"]
    settings = found["settings"]
    assert found["steps"]["pairs"] == settings["pairs"]
    assert list(found["sampler"]) == [*decoding_penalties.PARTS, "everything"]
    times = [found["steps"], *found["sampler"].values()]
    assert all(pairs["base_us"] > 0 and pairs["candidate_us"] > 0 for pairs in times)


def test_penalties_for_all_have_every_one() -> None:
    params = decoding_penalties.make_params(
        decoding_penalties.EVERYTHING, 3, decoding_penalties.SMALL, 5
    )
    assert params.greedy
    assert 0 not in (params.presence_penalty, params.frequency_penalty)
    assert params.repetition_penalty != 1
    assert params.logprobs == 5
    assert params.logit_bias is not None
    assert len(params.logit_bias) == decoding_penalties.BIASED_TOKENS


def test_the_target_of_penalties_is_of_engine_steps() -> None:
    steps = asdict(summarize_pairs([1.0, 1.0], [1.25, 1.25]))
    alone = asdict(summarize_pairs([1.0, 1.0], [5.0, 5.0]))
    (target,) = decoding_penalties.make_targets({"steps": steps, "sampler": {"everything": alone}})
    assert (target.measured, target.met) == (1.25, True)
    assert "5.0x" in target.note


def test_sections_are_chosen(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "beams.json"
    arguments = ["--small", "--section", "beams", "--section", "beams", "--json", str(path)]
    assert bench.decoding.main(arguments) == 0
    assert list(load(path, "decoding")["results"]) == ["beams"]
    assert "beam search, width 3" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["--small"], ["--section", "beams"]])
def test_only_the_whole_is_saved(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench.decoding.main(["--save", *arguments])
    assert "--json FILE" in capsys.readouterr().err
