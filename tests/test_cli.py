"""`vattn generate` and `vattn doctor` as a user meets them: text, figures, errors, exit codes."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    BertConfig,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    PreTrainedTokenizerFast,
    T5Config,
)
from typer.testing import CliRunner

import vattn
from vattn.cli import app, probes, run
from vattn.cli.memory_map import MARKS
from vattn.models import tiny_path

ROOT = Path(__file__).resolve().parent.parent
FAKE_CUDA = Path(
    os.environ.get("VATTN_FAKE_CUDA", ROOT / "build" / "fake_cuda" / "libfake_cuda.so")
)
LIMIT = 256
PROMPT = "The pages of a slot are mapped when tokens come."

needs_embedded = pytest.mark.skipif(
    not (tiny_path() / "model.safetensors").exists(), reason="the embedded model is not there yet"
)


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # for child processes; read at import
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.delenv("VATTN_BUDGET", raising=False)
    monkeypatch.delenv("VATTN_LIBCUDA", raising=False)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of random weights whose tokens are bytes; a token is 128 bytes in each of 8 runs."""
    path = tmp_path_factory.mktemp("model")
    vocabulary = {c: i + 3 for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    bpe = Tokenizer(models.BPE({"<pad>": 0, "<s>": 1, "</s>": 2, **vocabulary}, []))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special: Any = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    fast: Any = PreTrainedTokenizerFast
    fast(tokenizer_object=bpe, **special).save_pretrained(path)
    torch.manual_seed(0)
    size: Any = {
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "vocab_size": len(vocabulary) + 3,
        "max_position_embeddings": LIMIT,
        "bos_token_id": 1,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    LlamaForCausalLM(LlamaConfig(**size)).save_pretrained(path)
    return path


Cli = Callable[..., Any]


@pytest.fixture
def cli() -> Cli:
    """Calls the command line in this process."""

    def call(*args: object, stdin: str | bytes | None = None) -> Any:
        result = CliRunner().invoke(app, [str(arg) for arg in args], input=stdin)
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    return call


@pytest.fixture
def generate(cli: Cli, model_dir: Path) -> Cli:
    """`vattn generate` with the random model in pages of 4 KiB, which hold 32 tokens."""

    def call(*args: object, stdin: str | bytes | None = None) -> Any:
        common = ("--model", model_dir, "--page-bytes", "4KiB")
        return cli("generate", *common, *args, stdin=stdin)

    return call


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())


def copy_without(model_dir: Path, path: Path, *patterns: str) -> Path:
    shutil.copytree(model_dir, path, ignore=shutil.ignore_patterns(*patterns))
    return path


# generate: what it prints ------------------------------------------------------------------------


def test_text_is_all_of_stdout(generate: Cli, tmp_path: Path) -> None:
    result = generate(PROMPT, "--max-tokens", 12, "--json", tmp_path / "out.json")
    assert result.exit_code == 0, result.stderr
    (output,) = read_json(tmp_path / "out.json")["outputs"]
    assert result.stdout == output["text"] + "\n"
    assert len(output["token_ids"]) == 12
    assert output["prompt"] == PROMPT
    assert output["finish_reason"] == "length"
    assert PROMPT in result.stderr
    assert "12 tokens in " in result.stderr


def test_figures_and_map_go_to_stderr(generate: Cli) -> None:
    result = generate("--prompt", PROMPT, "--max-tokens", 20, "--memory-map")
    assert result.exit_code == 0, result.stderr
    for name in ("tokens/s", "first token after", "live pages", "shared", "cover", "stale"):
        assert name in result.stderr
    assert re.search(r"budget .* in pages of 4\.0 KiB", result.stderr)
    assert re.search(r"driver calls +1 reserve, \d+ create, \d+ map", result.stderr)
    rows = [line for line in result.stderr.splitlines() if line.startswith("slot ")]
    assert len(rows) == 1
    assert rows[0].endswith(f"{len(PROMPT) + 19} tokens")  # the last one was not cached
    assert MARKS[vattn.PageState.LIVE].character in rows[0]
    assert MARKS[vattn.PageState.UNMAPPED].character in rows[0]
    assert max(len(line) for line in rows) <= 80
    assert "\x1b" not in result.stderr


def test_figures_can_be_left_out(generate: Cli) -> None:
    result = generate("--prompt", PROMPT, "--max-tokens", 3, "--no-stats")
    assert "tokens/s" not in result.stderr
    assert "slot 0" not in result.stderr


def test_samples_share_the_pages_of_their_prompt(generate: Cli, tmp_path: Path) -> None:
    prompt = "A" * 65  # 64 cached before the fork: two whole pages of each run
    args = ("-p", prompt, "-n", 3, "--max-tokens", 40, "--memory-map")
    result = generate(*args, "--json", tmp_path / "out.json")
    assert result.exit_code == 0, result.stderr
    record = read_json(tmp_path / "out.json")
    assert record["cache"]["shared_bytes"] == 2 * 8 * 4096
    assert len({output["text"] for output in record["outputs"]}) == 3
    assert [output["sample"] for output in record["outputs"]] == [0, 1, 2]
    shared, live = (MARKS[s].character for s in (vattn.PageState.SHARED, vattn.PageState.LIVE))
    rows = [line for line in result.stderr.splitlines() if line.startswith("slot ")]
    assert len(rows) == 3
    for row in rows:
        # Of the 8 pages of a run two are shared and two are the sample's own.
        assert row.count(shared) == pytest.approx(row.count(live), abs=1)


def test_sharing_does_not_change_the_text(generate: Cli, tmp_path: Path) -> None:
    greedy = ("-p", PROMPT, "--max-tokens", 30, "--temperature", 0)
    generate(*greedy, "--json", tmp_path / "one.json")
    generate(*greedy, "-n", 2, "--json", tmp_path / "two.json")
    (one,) = read_json(tmp_path / "one.json")["outputs"]
    assert [o["text"] for o in read_json(tmp_path / "two.json")["outputs"]] == [one["text"]] * 2


def test_text_is_that_of_the_model_alone(generate: Cli, model_dir: Path, tmp_path: Path) -> None:
    generate("-p", PROMPT, "--max-tokens", 30, "--temperature", 0, "--json", tmp_path / "out.json")
    (output,) = read_json(tmp_path / "out.json")["outputs"]
    tokenizer: Any = PreTrainedTokenizerFast.from_pretrained(model_dir)
    model: Any = LlamaForCausalLM.from_pretrained(model_dir)
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    expected = model.generate(ids, do_sample=False, max_new_tokens=30)[0, ids.shape[1] :]
    assert output["token_ids"] == expected.tolist()


def test_seed_decides_the_text(generate: Cli) -> None:
    def text(seed: int) -> str:
        return str(generate("-p", PROMPT, "--max-tokens", 30, "--seed", seed).stdout)

    assert text(1) == text(1) != text(2)


def test_many_prompts_in_batches(generate: Cli, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("one\n\ntwo and more\nthree\n" + "four is the longest of all\n" + "five\n")
    args = ("--prompts", file, "--batch-size", 2, "--max-tokens", 9, "--memory-map")
    result = generate(*args, "--json", tmp_path / "out.json")
    assert result.exit_code == 0, result.stderr
    outputs = read_json(tmp_path / "out.json")["outputs"]
    assert [o["prompt"] for o in outputs] == file.read_text().replace("\n\n", "\n").splitlines()
    assert [o["prompt_index"] for o in outputs] == [0, 1, 2, 3, 4]
    assert all(len(o["token_ids"]) == 9 for o in outputs)
    assert result.stdout == "\n\n".join(o["text"] for o in outputs) + "\n"
    assert "4 of 5 prompts" in result.stderr
    # The last batch has one prompt, so the other slot's pages are stale.
    assert re.search(rf"slot 1 .*{MARKS[vattn.PageState.STALE].character}.* free", result.stderr)


def test_batches_are_padded_on_the_left(generate: Cli, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text(f"ab\n{PROMPT}\n")
    greedy = ("--max-tokens", 16, "--temperature", 0, "--json", tmp_path / "out.json")
    generate("--prompts", file, *greedy)
    together = [o["token_ids"] for o in read_json(tmp_path / "out.json")["outputs"]]
    alone = []
    for prompt in ("ab", PROMPT):
        generate("-p", prompt, *greedy)
        alone += [o["token_ids"] for o in read_json(tmp_path / "out.json")["outputs"]]
    assert together == alone


def test_prompts_from_standard_input(generate: Cli) -> None:
    whole = generate("-", "--max-tokens", 4, stdin="a text\nof two lines\n")
    assert whole.exit_code == 0
    assert "a text\nof two lines" in whole.stderr
    lines = generate("--prompts", "-", "--max-tokens", 4, stdin="one\ntwo\n")
    assert "2 prompts" in lines.stderr


def test_end_token_ends_a_text(cli: Cli, model_dir: Path, tmp_path: Path) -> None:
    """The random model soon writes the letter e when sampling hot; make that its end token."""
    ends = copy_without(model_dir, tmp_path / "ends")
    config = json.loads((ends / "generation_config.json").read_text())
    config["eos_token_id"] = list(range(3, 40))
    (ends / "generation_config.json").write_text(json.dumps(config))
    args = ("-m", ends, "-p", "a", "--temperature", 5, "--top-p", 1, "-n", 4, "--max-tokens", 200)
    result = cli("generate", *args, "--json", tmp_path / "out.json")
    assert result.exit_code == 0, result.stderr
    record = read_json(tmp_path / "out.json")
    assert {o["finish_reason"] for o in record["outputs"]} == {"stop"}
    assert all(o["token_ids"][-1] in range(3, 40) for o in record["outputs"])
    assert record["timing"]["tokens"] == sum(len(o["token_ids"]) for o in record["outputs"])


def test_text_stops_at_the_models_limit(generate: Cli, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    result = generate("-p", "x" * 250, "--max-tokens", 100, "--json", out)
    assert result.exit_code == 0
    assert len(read_json(out)["outputs"][0]["token_ids"]) == LIMIT - 250
    assert f"{LIMIT - 250} instead of 100 new tokens" in result.stderr


@pytest.mark.parametrize("order", ["token", "head"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_layouts_and_dtypes(generate: Cli, tmp_path: Path, order: str, dtype: str) -> None:
    out = tmp_path / "out.json"
    args = ("--order", order, "--dtype", dtype, "--max-tokens", 5, "--json", out)
    result = generate("-p", PROMPT, *args)
    assert result.exit_code == 0, result.stderr
    assert read_json(out)["dtype"] == dtype


# generate: bad input -----------------------------------------------------------------------------


def assert_refused(result: Any, *parts: str) -> None:
    """One line on stderr that holds the parts, no text, exit code 2."""
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    for part in parts:
        assert part in line


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        (["--max-tokens", "0"], ["--max-tokens 0", "at least 1"]),
        (["--max-tokens", "-5"], ["--max-tokens -5", "at least 1"]),
        (["--max-tokens", "many"], ["--max-tokens", "'many'", "whole number"]),
        (["--n", "0"], ["--n 0"]),
        (["--batch-size", "0"], ["--batch-size 0"]),
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
    weights.write_bytes(weights.read_bytes()[:1000])
    assert_refused(
        cli("generate", "-m", damaged, "-p", "a"), str(damaged), "cannot read its weights"
    )
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


# generate: failures ------------------------------------------------------------------------------


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
    assert error.startswith("error: out of pages: 8 pages of 4096 bytes")
    assert "raise --budget (it is 64.0 KiB)" in error


class Interrupter(run.Collector):
    """Ctrl-C after the fifth step."""

    def put(self, value: torch.Tensor) -> None:
        super().put(value)
        if len(self._outputs[0].token_ids) == 5:
            raise KeyboardInterrupt


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
    monkeypatch.setattr(run, "Collector", Interrupter)
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


def test_threads_are_given_back(generate: Cli) -> None:
    before = torch.get_num_threads()
    generate("-p", PROMPT, "--max-tokens", 2)
    assert torch.get_num_threads() == before


# generate: in processes of their own -------------------------------------------------------------


def start(*args: object, **how: Any) -> subprocess.Popen[str]:
    def default_signals() -> None:  # a parent in the background may ignore Ctrl-C
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    command = [sys.executable, "-m", "vattn.cli", *map(str, args)]
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **how}
    return subprocess.Popen(command, text=True, preexec_fn=default_signals, cwd=ROOT, **pipes)


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


@needs_embedded
def test_demo() -> None:
    """What `make demo` runs, with both streams in one file, as in a log."""
    command = ("generate", "--max-tokens", 220, "--memory-map", "--stats")
    process = start(*command, stderr=subprocess.STDOUT)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0, out
    assert out.count("slot ") >= 3
    assert MARKS[vattn.PageState.SHARED].character in out
    assert max(len(line) for line in out.splitlines() if line.startswith("slot")) <= 80
    text = out.split("writers.")[1].split("sample 2")[0]
    words = re.findall(r"[A-Za-z]+", text)
    assert len(words) >= 100
    pairs = list(zip(words, words[1:], words[2:], strict=False))
    assert len(set(pairs)) > 0.8 * len(pairs), "the demo's text loops"


# the command as a whole --------------------------------------------------------------------------


def test_version(cli: Cli) -> None:
    result = cli("--version")
    assert (result.exit_code, result.stdout) == (0, f"vattn {vattn.__version__}\n")


def test_help(cli: Cli) -> None:
    for args in ((), ("--help",)):
        result = cli(*args)
        assert result.exit_code == 0
        assert "generate" in result.stdout
        assert "doctor" in result.stdout
    text = cli("generate", "--help").stdout
    for option in ("--model", "--prompts", "--max-tokens", "--budget", "--memory-map", "--json"):
        assert option in text


def test_unknown_command(cli: Cli) -> None:
    assert_refused(cli("frobnicate"), "frobnicate", "--help")


def test_command_line_does_not_import_transformers() -> None:
    """Help must not wait for it."""
    code = "import sys, vattn.cli; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


# doctor ------------------------------------------------------------------------------------------


def test_doctor_on_any_machine(cli: Cli) -> None:
    result = cli("doctor")
    assert result.exit_code == 0, result.output
    assert f"vattn {vattn.__version__}" in result.stdout
    for text in ("mapped, wrote, aliased and unmapped", "16.0 KiB", "vm.max_map_count", "SDPA"):
        assert text in result.stdout
    assert max(len(line) for line in result.stdout.splitlines()) <= 80


def test_doctor_in_json(cli: Cli) -> None:
    report = json.loads(cli("doctor", "--json").stdout)
    assert report["versions"]["torch"] == torch.__version__
    assert report["host"]["self_test"]["ok"] is True
    assert report["host"]["granularity_bytes"] == 4096
    assert 0 < report["host"]["default_budget_bytes"] <= report["host"]["free_bytes"]
    backends = {backend["name"]: backend for backend in report["attention"]}
    assert backends["SDPA"]["usable"] is True
    for backend in backends.values():
        assert backend["usable"] or backend["lacks"] or backend["remedy"]
        assert (backend["version"] is None) == (backend["remedy"] is not None)


def test_doctor_without_libcuda(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VATTN_LIBCUDA", "/nowhere/libcuda.so")
    result = cli("doctor")
    assert result.exit_code == 0
    assert "/nowhere/libcuda.so" in result.stdout
    assert "NVIDIA GPU and its driver" in " ".join(result.stdout.split())


def test_doctor_with_a_library_that_is_no_libcuda(
    cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VATTN_LIBCUDA", "libc.so.6")
    result = cli("doctor")
    assert result.exit_code == 0
    assert "cuInit" in result.stdout


@pytest.mark.skipif(not FAKE_CUDA.exists(), reason="no fake CUDA driver here; make fake builds it")
def test_doctor_with_the_fake_gpu() -> None:
    environment = {**os.environ, "VATTN_LIBCUDA": str(FAKE_CUDA)}
    process = start("doctor", "--json", env=environment)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    cuda = json.loads(out)["cuda"]
    assert cuda["found"] is True
    assert re.fullmatch(r"\d+\.\d+", cuda["driver_version"])
    for device in cuda["devices"]:
        assert device["capability"] == "9.0"
        assert device["self_test"]["ok"] is True
        assert device["granularity_bytes"] == 2 << 20


def test_bad_budget_in_the_environment(
    cli: Cli, generate: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VATTN_BUDGET", "lots")
    assert_refused(cli("doctor"), "VATTN_BUDGET='lots'", "512MiB")
    assert_refused(generate("-p", "a"), "VATTN_BUDGET='lots'", "512MiB")


def test_driver_that_fails(generate: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object, **how: object) -> None:
        raise vattn.DriverError("memfd_create: too many open files")

    monkeypatch.setattr(vattn, "PagePool", broken)
    result = generate("-p", "a")
    assert result.exit_code == 1
    assert result.stderr.startswith("error: the driver failed: memfd_create")


def test_doctor_fails_if_the_host_driver_fails(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ctypes.string_at", lambda address, size: bytes(size))
    result = cli("doctor")
    assert result.exit_code == 1
    assert "failed" in result.stdout
    assert "not seen at its alias" in " ".join(result.stdout.split())


@contextlib.contextmanager
def bindings(call: Callable[..., Any]) -> Iterator[None]:
    """A stand-in for cuda.bindings.driver, which machines without a GPU need not have."""
    attributes = {f"CU_DEVICE_ATTRIBUTE_{name}": name for name in ("MULTIPROCESSOR_COUNT",)}
    driver = types.SimpleNamespace(
        cuInit=lambda flags: (0,),
        cuDeviceGet=lambda index: (0, index),
        cuDeviceGetAttribute=call,
        CUdevice_attribute=types.SimpleNamespace(**attributes),
    )
    modules: Any = {
        "cuda": types.ModuleType("cuda"),
        "cuda.bindings": types.SimpleNamespace(driver=driver),
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, module in modules.items():
            patch.setitem(sys.modules, name, module)
        yield


def test_properties_by_cuda_bindings() -> None:
    with bindings(lambda which, device: (0, 132)):
        assert probes._properties(0) == {"multiprocessors": 132}
    with bindings(lambda which, device: (1, 0)):
        assert probes._properties(0) == {}

    def broken(which: str, device: int) -> None:
        raise RuntimeError("no libcuda")

    with bindings(broken):
        assert probes._properties(0) == {"error": "no libcuda"}


@pytest.mark.parametrize(
    ("gpu", "usable"),
    [(None, set()), ((7, 5), set()), ((8, 0), {"PyTorch FlashAttention", "FlashAttention-2"})],
)
def test_backends_need_their_gpu(
    monkeypatch: pytest.MonkeyPatch, gpu: tuple[int, int] | None, usable: set[str]
) -> None:
    installed = {"flash_attn": "2.8.0", "flash_attn_interface": "3.0.0"}
    monkeypatch.setattr(probes, "_package", lambda module, *_: installed.get(module))
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    found = {b["name"] for b in probes.attention(gpu) if b["usable"]}
    assert found == {"SDPA"} | usable
