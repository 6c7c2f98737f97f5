"""`vattn generate` when something is wrong: bad input, memory that runs out, Ctrl-C."""

import json
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, GPT2Config, MambaConfig, T5Config

import vattn
from tests.cli_helpers import (
    LIMIT,
    PROMPT,
    Cli,
    assert_refused,
    copy_without,
    read_json,
    start,
    write_prompts,
)
from vattn.engine.engine import Engine

pytest_plugins = ("tests.cli_fixtures",)
pytestmark = pytest.mark.usefixtures("plain_environment")

# Bad input -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        (["--max-tokens", "0"], ["--max-tokens 0", "at least 1"]),
        (["--max-tokens", "-5"], ["--max-tokens -5", "at least 1"]),
        (["--max-tokens", "many"], ["--max-tokens", "'many'", "whole number"]),
        (["--min-tokens", "-1"], ["--min-tokens -1", "0 and --max-tokens"]),
        (["--min-tokens", "9", "--max-tokens", "8"], ["--min-tokens 9", "8"]),
        (["--n", "0"], ["--n 0"]),
        (["--n", "5000"], ["--n 5000", "at most 4096"]),
        (["--max-num-seqs", "0"], ["--max-num-seqs 0"]),
        (["--max-num-batched-tokens", "0"], ["--max-num-batched-tokens 0"]),
        (["--n", "4", "--max-num-batched-tokens", "3"], ["--max-num-batched-tokens 3", "raise it"]),
        (["--batch-size", "2"], ["--batch-size"]),
        (["--swap-space", "-1"], ["--swap-space -1", "GiB"]),
        (["--swap-space", "nan"], ["--swap-space nan", "GiB"]),
        (["--min-p", "1.5"], ["--min-p 1.5", "between 0 and 1"]),
        (["--stop", ""], ["--stop ''", "empty"]),
        (["--max-model-len", "-1"], ["--max-model-len -1"]),
        (["--max-model-len", "999"], ["--max-model-len 999", str(LIMIT)]),
        (["--max-model-len", "40"], ["48 tokens", "40", "shorten"]),
        (["--temperature", "-1"], ["--temperature -1", "0 (greedy)"]),
        (["--temperature", "hot"], ["'hot'", "number"]),
        (["--top-p", "1.5"], ["--top-p 1.5", "at most 1"]),
        (["--top-k", "-2"], ["--top-k -2"]),
        (["--seed", "-1"], ["--seed -1"]),
        (["--page-bytes", "0"], ["--page-bytes", "'0'", "positive"]),
        (["--page-bytes", "5000"], ["--page-bytes=5000", "4096"]),
        (["--page-bytes", "big"], ["--page-bytes='big'", "512MiB"]),
        (["--budget", "0"], ["--budget", "positive"]),
        (["--budget", "100"], ["--budget=100", "one page"]),
        (["--order", "diagonal"], ["--order diagonal", "token or head"]),
        (["--dtype", "int3"], ["--dtype int3", "float32"]),
        (["--device", "tpu"], ["--device tpu", "cuda[:n]"]),
        (["--json", "/nowhere/out.json"], ["/nowhere", "make it first"]),
        (["--json", "/"], ["--json /", "directory"]),
        (["--trace", "/nowhere/t.json"], ["--trace /nowhere", "make it first"]),
        (["--trace", "/proc/t.json"], ["--trace /proc/t.json", "cannot be written to"]),
        (["--trace-kernels"], ["--trace-kernels", "--trace FILE"]),
        (["--trace", "/tmp/t", "--json", "/tmp/t"], ["--json and --trace", "/tmp/t"]),
        (["--nonsense"], ["--nonsense", "--help"]),
        (["--prompts", "/nowhere/prompts.txt"], ["/nowhere/prompts.txt", "No such file"]),
        (["--prompts", "/"], ["/", "Is a directory"]),
    ],
)
def test_bad_options(generate: Cli, args: list[str], parts: list[str]) -> None:
    prompt = [] if "--prompts" in args else ["--prompt", PROMPT]
    assert_refused(generate(*prompt, *args), *parts)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_cuda_without_a_gpu(generate: Cli) -> None:
    assert_refused(generate("-p", PROMPT, "--device", "cuda"), "--device cuda", "vattn doctor")


def test_bad_prompts(generate: Cli, tmp_path: Path) -> None:
    assert_refused(generate("--prompt", ""), "''", "empty")
    assert_refused(generate("--prompt", "  "), "'  '", "empty")
    assert_refused(generate("-", stdin=""), "empty")
    assert_refused(generate("text", "--prompt", "text"), "not several")
    assert_refused(generate("-p", "x" * LIMIT), f"{LIMIT} tokens", str(LIMIT))
    file = tmp_path / "prompts.txt"
    file.write_text("\n \n")
    assert_refused(generate("--prompts", file), str(file), "no prompt")
    file.write_bytes(b"ok\n\xff\n")
    assert_refused(generate("--prompts", file), str(file), "UTF-8")
    file.write_text("short\n" + "x" * LIMIT)
    assert_refused(generate("--prompts", file), "prompt 2", str(LIMIT))


@pytest.mark.parametrize(
    ("pattern", "part"),
    [("config.json", "config.json"), ("*.safetensors", "weights"), ("tok*", "tokenizer")],
)
def test_incomplete_model(
    cli: Cli, model_dir: Path, tmp_path: Path, pattern: str, part: str
) -> None:
    incomplete = copy_without(model_dir, tmp_path / "incomplete", pattern)
    result = cli("generate", "--model", incomplete, "-p", "a")
    assert_refused(result, str(incomplete), f"has no {part}", "save_pretrained")


def test_damaged_models(cli: Cli, model_dir: Path, tmp_path: Path) -> None:
    damaged = copy_without(model_dir, tmp_path / "damaged")
    weights = damaged / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:1000])
    assert_refused(
        cli("generate", "-m", damaged, "-p", "a"), str(damaged), "model.safetensors is damaged"
    )
    weights.write_bytes(whole)
    (damaged / "config.json").write_text("{")
    assert_refused(cli("generate", "-m", damaged, "-p", "a"), "cannot read its configuration")


def test_weights_of_another_model(cli: Cli, model_dir: Path, tmp_path: Path) -> None:
    other = copy_without(model_dir, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    assert_refused(cli("generate", "-m", other, "-p", "a"), "weights lack", "layers.2")


def test_models_that_are_not_there(cli: Cli, tmp_path: Path) -> None:
    assert_refused(cli("generate", "-m", tmp_path / "x"), str(tmp_path / "x"), "no such directory")
    assert_refused(cli("generate", "-m", "./x"), "./x", "no such directory")
    assert_refused(cli("generate", "-m", __file__), __file__, "is a file")
    assert_refused(cli("generate", "-m", ""), "--model is empty")


def test_hub_is_not_asked_when_offline(cli: Cli) -> None:
    result = cli("generate", "-m", "nobody/no-such-model", "-p", "a")
    assert result.exit_code == 2
    looking, error = result.stderr.splitlines()
    assert "nobody/no-such-model" in looking
    assert "nobody/no-such-model" in error
    assert "HF_HUB_OFFLINE" in error


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (MambaConfig(num_hidden_layers=1), "decoder-only"),
        (T5Config(num_layers=1), "encoder-decoder"),
        (GPT2Config(is_encoder_decoder=True), "encoder-decoder"),
        (BertConfig(num_hidden_layers=1), ""),
    ],
    ids=lambda value: getattr(value, "model_type", None),
)
def test_models_of_other_kinds(
    cli: Cli, model_dir: Path, tmp_path: Path, config: Any, reason: str
) -> None:
    other = copy_without(model_dir, tmp_path / "other", "config.json", "generation_config.json")
    config.save_pretrained(other)
    result = cli("generate", "-m", other, "-p", "a")
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    assert reason in line


# Failures ------------------------------------------------------------------------------


def test_exhausted_budget(generate: Cli, tmp_path: Path) -> None:
    """32 tokens fill a page in each of 8 runs, and the budget is two such: 64 tokens."""
    args = ("-p", "x" * 40, "--max-tokens", 100, "--budget", "64KiB", "--memory-map")
    result = generate(*args, "--json", tmp_path / "out.json")
    assert result.exit_code == 1
    (output,) = read_json(tmp_path / "out.json")["outputs"]
    assert len(output["token_ids"]) == 64 - 40 + 1  # what was generated stays
    assert result.stdout == output["text"] + "\n"
    assert "slot 0" in result.stderr
    error = result.stderr.splitlines()[-1]
    assert error.startswith("error: out of pages: its 65 tokens need 24 pages of 4096 bytes")
    assert "raise --budget (it is 64.0 KiB)" in error


def test_one_prompt_beyond_the_budget(generate: Cli, tmp_path: Path) -> None:
    """The others are generated all the same."""
    file = write_prompts(tmp_path / "prompts.txt", "a", "x" * 100, "b")
    args = ("--prompts", file, "--max-tokens", 5, "--budget", "64KiB")
    result = generate(*args, "--json", tmp_path / "out.json")
    assert result.exit_code == 1
    outputs = read_json(tmp_path / "out.json")["outputs"]
    assert [o["finish_reason"] for o in outputs] == ["length", "error", "length"]
    assert [len(o["token_ids"]) for o in outputs] == [5, 0, 5]
    assert "pages" in outputs[1]["error"]
    assert result.stdout == f"{outputs[0]['text']}\n\n\n\n{outputs[2]['text']}\n"
    error = result.stderr.splitlines()[-1]
    assert error.startswith("error: prompt 2: out of pages: its 100 tokens need")
    assert "raise --budget (it is 64.0 KiB)" in error


def interrupt_after(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C when so many steps of an engine have been told."""
    step, done = Engine.step, 0

    def interrupted(self: Engine) -> Any:
        nonlocal done
        if done == steps:
            signal.raise_signal(signal.SIGINT)
        done += 1
        return step(self)

    monkeypatch.setattr(Engine, "step", interrupted)


@pytest.mark.parametrize("many", [False, True])
def test_interruption_keeps_text_and_frees_memory(
    generate: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, many: bool
) -> None:
    pools = []

    class Pool(vattn.PagePool):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            pools.append(self)

    monkeypatch.setattr(vattn, "PagePool", Pool)
    interrupt_after(5, monkeypatch)
    file = tmp_path / "prompts.txt"
    file.write_text("one\ntwo\n")
    prompts = ("--prompts", file) if many else ("-p", PROMPT)
    result = generate(*prompts, "--max-tokens", 50, "--json", tmp_path / "out.json")
    assert result.exit_code == 130
    outputs = read_json(tmp_path / "out.json")["outputs"]
    assert [len(o["token_ids"]) for o in outputs] == [5] * (2 if many else 1)
    assert all(o["finish_reason"] is None for o in outputs)
    assert result.stdout.split("\n\n") == [o["text"] for o in outputs[:-1]] + [
        outputs[-1]["text"] + "\n"
    ]
    assert f"interrupted after {5 * len(outputs)} tokens" in result.stderr
    assert pools[0].stats().used_bytes == 0
    pools[0].trim()
    assert pools[0].stats().created_bytes == 0


def test_interruption_shows_what_waits_behind_an_earlier_prompt(
    generate: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    interrupt_after(20, monkeypatch)
    file = write_prompts(tmp_path / "prompts.txt", "short", "x" * 250, "never begun")
    args = ("--prompts", file, "--max-tokens", 100, "--max-num-seqs", 2)
    result = generate(*args, "--json", tmp_path / "out.json")
    assert result.exit_code == 130
    outputs = read_json(tmp_path / "out.json")["outputs"]
    assert [o["finish_reason"] for o in outputs][:2] == [None, "length"]
    assert result.stdout == "\n\n".join(o["text"] for o in outputs) + "\n"
    assert read_json(tmp_path / "out.json")["engine"] is None


def test_failed_step(generate: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object, **how: object) -> None:
        raise ValueError("a layer of the model\nis not what it seems")

    monkeypatch.setattr("vattn.engine.runner.ModelRunner.run", broken)
    result = generate("-p", "a")
    assert result.exit_code == 1
    error = result.stderr.splitlines()[-1]
    assert error.startswith("error: the step failed: ValueError: a layer of the model is not")


def test_driver_that_fails_for_good(generate: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Engine) -> None:
        raise vattn.DriverError("cuMemMap: an illegal memory access was encountered")

    monkeypatch.setattr(Engine, "step", broken)
    result = generate("-p", "a")
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1].startswith("error: the driver failed: cuMemMap")


def test_threads_are_given_back(generate: Cli) -> None:
    before = torch.get_num_threads()
    generate("-p", PROMPT, "--max-tokens", 2)
    assert torch.get_num_threads() == before


def test_driver_that_fails(generate: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object, **how: object) -> None:
        raise vattn.DriverError("memfd_create: too many open files")

    monkeypatch.setattr(vattn, "PagePool", broken)
    result = generate("-p", "a")
    assert result.exit_code == 1
    assert result.stderr.startswith("error: the driver failed: memfd_create")


def test_ctrl_c(model_dir: Path) -> None:
    process = start("generate", "-m", model_dir, "-p", PROMPT, "-n", "8", "--max-tokens", "200")
    assert process.stdout is not None
    first = process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert first + out
    assert re.search(r"interrupted after \d+ tokens", err)
    assert "Traceback" not in err


def test_ctrl_c_with_many_prompts(model_dir: Path, tmp_path: Path) -> None:
    file = write_prompts(tmp_path / "prompts.txt", *(f"prompt {i}" for i in range(40)))
    args = ("--prompts", file, "--max-tokens", "200", "--max-num-seqs", "4")
    process = start("generate", "-m", model_dir, *args)
    assert process.stderr is not None
    line = ""
    while "of 40 prompts" not in line:
        line = process.stderr.readline()
        assert line, "it ended before the first prompt was done"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert out
    assert re.search(r"interrupted after \d+ tokens", err)
    assert "Traceback" not in err


def test_a_reader_that_leaves(model_dir: Path) -> None:
    """As in `vattn generate | head -c 1`: no traceback."""
    process = start("generate", "-m", model_dir, "-p", PROMPT, "--max-tokens", "200")
    assert process.stdout is not None
    assert process.stderr is not None
    with process:
        process.stdout.read(1)
        process.stdout.close()
        err = process.stderr.read()
    assert process.returncode != 0
    assert "Traceback" not in err
