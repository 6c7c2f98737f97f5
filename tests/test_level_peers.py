"""The peers level at its smallest, and peers that stand in for those that are not installed."""

from __future__ import annotations

import json
import os
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import bench.levels.peers.level as peers
from bench.__main__ import main, parse
from bench.levels.engines import EngineSettings
from bench.levels.peers.model import save_model, weight_bytes
from bench.levels.peers.process import PeerProcess, missing
from bench.levels.peers.sides import Turns, peer_settings
from bench.levels.peers.worker import NANO_TEMPERATURE
from bench.offline_sides import BatchSettings, GenerateBatch, Work, make_work, tune
from bench.provenance import ROOT
from bench.shapes import SHAPES, build_model
from tests.models import one_thread


@pytest.fixture(autouse=True, scope="module")
def single() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(scope="module")
def model() -> Any:
    return build_model(SHAPES["tiny-qwen3"], "cpu", torch.float32, 64)


# Stand-ins ----------------------------------------------------------------------------------------

# Each takes what the real one takes and nothing else, and "generates" the prompt's last token.
VLLM = """
    from dataclasses import dataclass
    from types import SimpleNamespace

    @dataclass
    class EngineArgs:
        model: str
        dtype: str = "auto"
        max_model_len: int | None = None
        max_num_seqs: int | None = None
        seed: int = 0
        skip_tokenizer_init: bool = False
        gpu_memory_utilization: float = 0.9
        kv_cache_memory_bytes: int | None = None

    @dataclass
    class SamplingParams:
        temperature: float = 1.0
        max_tokens: int | None = 16
        ignore_eos: bool = False
        detokenize: bool = True

    class LLM:
        def __init__(self, model, **options):
            args = EngineArgs(model, **options)
            assert args.skip_tokenizer_init
            if args.max_num_seqs == 13:
                raise ValueError("no luck with 13 sequences")
            print("a log line that is no message")

        def generate(self, prompts, sampling_params=None, *, use_tqdm=True, lora_request=None):
            assert not use_tqdm
            found = []
            for prompt, params in zip(prompts, sampling_params, strict=True):
                assert params.temperature == 0 and params.ignore_eos and not params.detokenize
                ids = prompt["prompt_token_ids"]
                if ids == [666]:
                    raise SystemExit("killed")
                text = tuple([ids[-1]] * params.max_tokens)
                found.append(SimpleNamespace(outputs=[SimpleNamespace(token_ids=text)]))
            return found
"""
NANO = """
    import os
    from dataclasses import dataclass
    from transformers import AutoTokenizer

    @dataclass
    class SamplingParams:
        temperature: float = 1.0
        max_tokens: int = 64
        ignore_eos: bool = False

        def __post_init__(self):
            assert self.temperature > 1e-10, "greedy sampling is not permitted"

    class LLM:
        def __init__(self, model, **kwargs):
            assert os.path.isdir(model)
            assert kwargs["max_num_batched_tokens"] >= kwargs["max_model_len"]
            self.tokenizer = AutoTokenizer.from_pretrained(model, use_fast=True)

        def generate(self, prompts, sampling_params, use_tqdm=True):
            texts = [
                [ids[-1]] * params.max_tokens
                for ids, params in zip(prompts, sampling_params, strict=True)
            ]
            return [{"text": self.tokenizer.decode(t), "token_ids": t} for t in texts]
"""


@pytest.fixture
def stand_ins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "stand_ins"
    folder.mkdir()
    (folder / "vllm.py").write_text(textwrap.dedent(VLLM))
    (folder / "nanovllm.py").write_text(textwrap.dedent(NANO))
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder), str(ROOT)]))


def settings_for(directory: Path, device: str = "cuda", sequences: int = 4) -> dict[str, Any]:
    return {
        "directory": str(directory),
        "device": device,
        "dtype": "float32",
        "max_model_len": 32,
        "max_num_seqs": sequences,
        "kv_bytes": 1 << 20,
        "share_of_own": 0.25,
        "share_of_all": 0.75,
    }


WORK = Work([[1, 2], [3, 4, 5]], [2, 3])


def open_peer(peer: str, settings: dict[str, Any]) -> PeerProcess:
    return PeerProcess(peer, settings, open_s=120, run_s=120)


@pytest.mark.usefixtures("stand_ins")
def test_vllm_as_its_stand_in(tmp_path: Path) -> None:
    side = open_peer("vllm", settings_for(tmp_path))
    try:
        assert side.about == {
            "version": "unknown",
            "options": {
                "dtype": "float32",
                "max_model_len": 32,
                "max_num_seqs": 4,
                "seed": 0,
                "skip_tokenizer_init": True,
                "gpu_memory_utilization": 0.25,
                "kv_cache_memory_bytes": 1 << 20,
            },
        }
        assert side.run(WORK) == [[2, 2], [5, 5, 5]]
        assert side.seconds > 0
        assert side.run(Work([[9]], [1])) == [[9]]
        with pytest.raises(RuntimeError, match=r"(?s)vllm has ended: .*killed"):
            side.run(Work([[666]], [1]))
        with pytest.raises(RuntimeError, match="vllm has ended"):
            side.run(WORK)
    finally:
        side.close()
        side.close()


@pytest.mark.usefixtures("stand_ins")
def test_a_peer_that_does_not_open_says_why(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="ValueError: no luck with 13 sequences"):
        open_peer("vllm", settings_for(tmp_path, "cpu", sequences=13))


@pytest.mark.usefixtures("stand_ins")
def test_nano_vllm_as_its_stand_in(tmp_path: Path, model: Any) -> None:
    save_model(model, tmp_path)
    side = open_peer("nano-vllm", settings_for(tmp_path))
    try:
        assert side.about["options"]["temperature"] == NANO_TEMPERATURE
        assert side.about["options"]["gpu_memory_utilization"] == 0.75
        assert side.run(WORK) == [[2, 2], [5, 5, 5]]
    finally:
        side.close()


def test_who_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.levels.peers.process.find_spec", lambda name: None)
    assert missing("nano-vllm") == "not installed: there is no module 'nanovllm'"
    monkeypatch.setattr("bench.levels.peers.process.find_spec", lambda name: name)
    assert missing("vllm") is None


def test_the_model_on_disk_is_the_model(tmp_path: Path, model: Any) -> None:
    save_model(model, tmp_path)
    again: Any = AutoModelForCausalLM.from_pretrained(tmp_path)
    theirs = again.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in model.state_dict().items())
    assert weight_bytes(model) == 4 * sum(p.numel() for p in model.parameters())
    tokenizer: Any = AutoTokenizer.from_pretrained(tmp_path)
    assert len(tokenizer) == model.config.vocab_size
    assert tokenizer.decode([5, 255]) == "t5 t255"


def test_shares_of_a_gpu(monkeypatch: pytest.MonkeyPatch, model: Any) -> None:
    gib = 1 << 30
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (60 * gib, 80 * gib))
    args = parse(peers.Peers(), ["--small", "--device", "cpu"])
    args.device = "cuda"
    told = peer_settings(args, model, "here", EngineSettings(32, 4, 12 * gib))
    assert (told["kv_bytes"], told["dtype"]) == (12 * gib, "float32")
    # Its own: K and V and 4 GiB for the rest; nano-vllm's share has those of the others in it.
    assert told["share_of_own"] == pytest.approx(16 / 80, abs=1e-3)
    assert told["share_of_all"] == pytest.approx(36 / 80, abs=1e-3)


# Turns --------------------------------------------------------------------------------------------


class Echo:
    """Generates zeros; fails in a round, or gives too few."""

    def __init__(self, name: str, seconds: float, fails: int = -1, short: int = 0) -> None:
        self.name, self.seconds, self.fails, self.short = name, seconds, fails, short
        self.rounds = 0
        self.closed = False

    def run(self, work: Work) -> list[list[int]]:
        self.rounds += 1
        if self.rounds == self.fails:
            raise OSError("gone")
        return [[0] * (n - self.short) for n in work.new_tokens]

    def close(self) -> None:
        self.closed = True


def test_turns() -> None:
    ours, slow = Echo("vattn", 1.0), Echo("single", 6.0)
    gone, short = Echo("manager", 2.0, fails=3), Echo("paged", 2.0, short=1)
    turns = Turns([ours, slow, gone, short], "cpu")
    for number in range(5):
        turns.round(number, WORK)
    turns.close()
    assert turns.failed == {
        "manager": "OSError: gone",
        "paged": "RuntimeError: paged gave other numbers of tokens than asked for",
    }
    assert all(side.closed for side in (ours, slow, gone, short))
    assert (ours.rounds, slow.rounds, gone.rounds, short.rounds) == (5, 2, 3, 1)
    ratio = turns.ratio("single")
    assert ratio is not None
    assert (ratio.ratio, ratio.repeats) == (6.0, (6.0,))
    assert turns.ratio("vattn") is None
    assert turns.ratio("paged") is None
    taken = turns.taken["vattn"]
    assert (taken.equal, taken.compared) == (10, 10)


def test_settings_that_do_not_work_are_not_chosen(
    monkeypatch: pytest.MonkeyPatch, model: Any
) -> None:
    def run(self: GenerateBatch, work: Work) -> list[list[int]]:
        if self.settings == good:
            return [[0] * n for n in work.new_tokens]
        raise RuntimeError("no kernel")

    bad, good = BatchSettings(16, 64, 4, flash=True), BatchSettings(16, 64, 4, flash=False)
    monkeypatch.setattr(GenerateBatch, "run", run)
    chosen, tried = tune(model, [bad, good], WORK)
    assert chosen == good
    assert tried[0]["why"] == "RuntimeError: no kernel"
    assert tried[1]["tokens_per_s"] > 0
    with pytest.raises(RuntimeError, match="no settings of generate_batch work; RuntimeError: no"):
        tune(model, [bad], WORK)


# The level ----------------------------------------------------------------------------------------


def run(tmp_path: Path, *arguments: str) -> dict[str, Any]:
    path = tmp_path / "peers.json"
    assert main(["peers", "--small", "--device", "cpu", "--json", str(path), *arguments]) == 0
    text = path.read_text()
    assert str(tmp_path) not in text
    document: dict[str, Any] = json.loads(text)
    assert document["benchmark"] == "peers"
    results: dict[str, Any] = document["results"]
    return results


def test_the_level(tmp_path: Path) -> None:
    results = run(tmp_path, "--plot", str(tmp_path / "peers.svg"))
    sides = {"vattn", "paged", "generate_batch", "manager", "padded", "padded-sorted", "single"}
    for name in ("equal", "trace"):
        rows = {row["side"]: row for row in results["throughput"] if row["workload"] == name}
        assert sides <= set(rows)
        for row in rows.values():
            assert row["equal_texts"] == row["compared_texts"] == 12, row
            assert (row["ratio"] is None) == (row["side"] == "vattn")
    # Nothing is replaced by something else: who is not there is in no table.
    for peer in ("vllm", "nano-vllm"):
        measured = any(row["side"] == peer for row in results["throughput"])
        assert measured != (peer in results["absent"])
    equal, trace = results["workloads"]
    assert (equal["num_prompts"], equal["total_output_tokens"]) == (6, 36)
    assert equal["generate_batch_settings"]["page_size"] == 16
    assert trace["sides"]["vattn"]["attention"] == "sdpa"
    paged = trace["sides"]["paged"]  # with a size that was measured
    (chosen,) = [row["block_tokens"] for row in paged["blocks"] if row["chosen"]]
    assert paged["block_tokens"] == chosen
    tables = peers.Peers().tables(results)
    assert len(tables) == 4
    assert all(table.markdown() for table in tables)
    assert (tmp_path / "peers.svg").read_text().startswith("<?xml")


@pytest.mark.usefixtures("stand_ins")
def test_stand_ins_take_part(tmp_path: Path) -> None:
    words = ["--sides", "vattn,vllm,nano-vllm", "--workloads", "equal"]
    results = run(tmp_path, *words)
    rows = {row["side"]: row for row in results["throughput"]}
    assert set(rows) == {"vattn", "vllm"}
    assert rows["vattn"]["equal_texts"] == 12
    assert rows["vllm"]["equal_texts"] == 0  # they only repeat the last token
    assert results["absent"] == {"nano-vllm": "RuntimeError: nano-vllm needs a GPU"}
    assert results["workloads"][0]["sides"]["vllm"]["options"]["dtype"] == "float32"
    assert "vllm unknown" in peers.Peers().tables(results)[0].note


def test_lengths_of_a_trace(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    rows = "".join(f"x,{64 * (3 + i)},{64 * (1 + i % 4)}\n" for i in range(6))
    path.write_text(f"TIMESTAMP,ContextTokens,GeneratedTokens\n{rows}")
    words = ["--trace", str(path), "--sides", "vattn,padded-sorted", "--workloads", "trace"]
    results = run(tmp_path, *words)
    (workload,) = results["workloads"]
    assert workload["total_output_tokens"] == 1 + 2 + 3 + 4 + 1 + 2
    assert workload["lengths"] == "trace.csv, lengths / 64"
    assert workload["generate_batch_settings"] is None  # nobody asked for it
    for row in results["throughput"]:
        assert row["equal_texts"] == row["compared_texts"]


def test_targets_are_of_the_cpu() -> None:
    results: dict[str, Any] = {
        "workloads": [{"workload": "equal"}],
        "throughput": [
            {"workload": "equal", "side": "vattn", "equal_texts": 3, "compared_texts": 4},
            {"workload": "equal", "side": "padded", "ratio": {"ratio": 1.2}},
        ],
    }
    level = peers.Peers()
    found = level.targets({"device": "cpu", "dtype": "float32"}, results)
    assert [(t.measured, t.met) for t in found] == [(None, None), (1.2, True), (0.75, False)]
    assert level.targets({"device": "cuda", "dtype": "bfloat16"}, results) == []


def test_work_is_new_in_every_round() -> None:
    args = parse(peers.Peers(), ["--small", "--device", "cpu", "--rounds", "2"])
    works, _ = peers.make_rounds("equal", args)
    assert len(works) == 3
    assert len({tuple(prompt[:2]) for work in works for prompt in work.prompts}) > 12
    assert works[0] == make_work([12] * 6, [6] * 6, 256, 0)
