"""`vattn generate` as a user meets it: text, figures, maps; and the command as a whole."""

import io
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

import vattn
from tests.cli_helpers import (
    LIMIT,
    PROMPT,
    ROOT,
    Cli,
    assert_refused,
    copy_without,
    read_json,
    start,
    write_prompts,
)
from vattn.cli import progress
from vattn.cli.console import Words
from vattn.cli.memory_map import MARKS
from vattn.models import tiny_path

pytest_plugins = ("tests.cli_fixtures",)
pytestmark = pytest.mark.usefixtures("plain_environment")

needs_embedded = pytest.mark.skipif(
    not (tiny_path() / "model.safetensors").exists(), reason="the embedded model is not there yet"
)

# What it prints ------------------------------------------------------------------------


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
    for name in ("kept", "pooled", "prefix hits", "preemptions", "addresses"):
        assert name in result.stderr
    assert re.search(r"budget .* in pages of 4\.0 KiB", result.stderr)
    assert re.search(r"driver calls +1 reserve, \d+ create, \d+ map", result.stderr)
    rows = [line for line in result.stderr.splitlines() if line.startswith("slot ")]
    assert len(rows) == 1
    # The last token is never cached, and with the one before it the text has ended.
    assert rows[0].endswith(f"{len(PROMPT) + 18} tokens")
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


def test_more_prompts_than_run_at_once(generate: Cli, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("one\n\ntwo and more\nthree\n" + "four is the longest of all\n" + "five\n")
    args = ("--prompts", file, "--max-num-seqs", 2, "--max-tokens", 9, "--memory-map")
    result = generate(*args, "--json", tmp_path / "out.json")
    assert result.exit_code == 0, result.stderr
    record = read_json(tmp_path / "out.json")
    outputs = record["outputs"]
    assert [o["prompt"] for o in outputs] == file.read_text().replace("\n\n", "\n").splitlines()
    assert [o["prompt_index"] for o in outputs] == [0, 1, 2, 3, 4]
    assert all(len(o["token_ids"]) == 9 for o in outputs)
    assert result.stdout == "\n\n".join(o["text"] for o in outputs) + "\n"
    assert "5 of 5 prompts" in result.stderr
    assert record["max_num_seqs"] == record["cache"]["open_slots"] == 2
    assert record["engine"]["finished"]["length"] == 5
    # The two that run when most tokens are live have others before them, whose text is kept.
    rows = [line for line in result.stderr.splitlines() if line.startswith("slot ")]
    assert sum(line.endswith(" tokens") for line in rows) == 2
    assert any(re.search(rf"{MARKS[vattn.PageState.KEPT].character}.* \d+ kept$", r) for r in rows)


def test_prompts_do_not_change_each_other(generated: Cli, tmp_path: Path) -> None:
    greedy = ("--max-tokens", 16, "--temperature", 0)
    prompts = ("ab", PROMPT, "x" * 100)
    file = write_prompts(tmp_path / "prompts.txt", *prompts)
    alone = [generated("-p", prompt, *greedy)["outputs"][0]["token_ids"] for prompt in prompts]
    for how in ((), ("--max-num-seqs", 2), ("--max-num-batched-tokens", 16)):
        together = generated("--prompts", file, *greedy, *how)["outputs"]
        assert [o["token_ids"] for o in together] == alone, how


def test_texts_come_in_the_order_of_their_prompts(generate: Cli, tmp_path: Path) -> None:
    """The second prompt is full long before the first one's text has its length."""
    file = write_prompts(tmp_path / "prompts.txt", "short", "x" * 250)
    result = generate("--prompts", file, "--max-tokens", 60, "--json", tmp_path / "out.json")
    assert result.exit_code == 0, result.stderr
    first, second = read_json(tmp_path / "out.json")["outputs"]
    assert (len(first["token_ids"]), len(second["token_ids"])) == (60, LIMIT - 250)
    assert result.stdout == f"{first['text']}\n\n{second['text']}\n"
    assert f"as few as {LIMIT - 250} instead of 60" in result.stderr


def test_prefix_hits(generate: Cli, tmp_path: Path) -> None:
    """Prompts that begin alike share what the first of them has computed."""
    file = write_prompts(tmp_path / "prompts.txt", *(f"{'A' * 64} and {i}" for i in range(3)))
    args = ("--prompts", file, "--max-num-seqs", 1, "--max-tokens", 4, "--temperature", 0)
    texts = []
    for options, hits in (((), 2 * 69), (("--no-prefix-caching",), 0)):
        result = generate(*args, *options, "--json", tmp_path / "out.json")
        assert result.exit_code == 0, result.stderr
        record = read_json(tmp_path / "out.json")
        assert record["engine"]["prefix_cache_hits"] == hits
        assert record["engine"]["prefix_cache_queries"] == 3 * 70
        assert sum(o["cached_tokens"] for o in record["outputs"]) == hits
        assert f"{hits} of {3 * 70} prompt tokens" in result.stderr
        texts.append(result.stdout)
    assert texts[0] == texts[1]


def test_sequences_give_way_when_memory_is_short(generate: Cli, tmp_path: Path) -> None:
    """Four texts of 100 tokens need 4 pages in each of 8 runs; there are 10 for all of them."""
    file = write_prompts(tmp_path / "prompts.txt", *(c * 40 for c in "abcd"))
    args = ("--prompts", file, "--max-tokens", 60, "--temperature", 0)
    texts = []
    for options in ((), ("--budget", "320KiB"), ("--budget", "320KiB", "--swap-space", 0.01)):
        result = generate(*args, *options, "--json", tmp_path / "out.json")
        assert result.exit_code == 0, result.stderr
        engine = read_json(tmp_path / "out.json")["engine"]
        assert (engine["num_preemptions"] > 0) == ("--budget" in options)
        assert (engine["requests_swapped_out"] > 0) == ("--swap-space" in options)
        assert ("swapped to host memory" in result.stderr) == ("--swap-space" in options)
        texts.append(result.stdout)
    assert texts[0] == texts[1] == texts[2]


def test_figures_are_those_of_the_fullest_moment(generated: Cli) -> None:
    """At the end nothing is live."""
    record = generated("-p", PROMPT, "-n", 3, "--max-tokens", 20)
    assert record["cache"]["open_slots"] == 3
    # The first sample is a step ahead of those that wait for its prompt.
    assert record["cache"]["tokens"] == pytest.approx(3 * (len(PROMPT) + 18), abs=3)
    assert record["engine"]["cache"]["open_slots"] == 0
    assert record["timing"]["tokens"] == record["engine"]["generation_tokens"] == 60


def test_prompts_from_standard_input(generate: Cli) -> None:
    whole = generate("-", "--max-tokens", 4, stdin="a text\nof two lines\n")
    assert whole.exit_code == 0
    assert "a text\nof two lines" in whole.stderr
    lines = generate("--prompts", "-", "--max-tokens", 4, stdin="one\ntwo\n")
    assert "2 prompts" in lines.stderr


def test_stop_strings_end_a_text(generate: Cli, tmp_path: Path) -> None:
    args = ("-p", PROMPT, "--max-tokens", 60, "--temperature", 0, "--json", tmp_path / "out.json")
    whole = generate(*args).stdout.rstrip("\n")
    stop = whole[20:23]
    result = generate(*args, "--stop", "never to be seen", "--stop", stop)
    assert result.exit_code == 0, result.stderr
    assert result.stdout == whole[: whole.index(stop)] + "\n"
    (output,) = read_json(tmp_path / "out.json")["outputs"]
    assert (output["finish_reason"], output["stop_reason"]) == ("stop", stop)


def test_least_probability(generated: Cli) -> None:
    """With --min-p 1 only the likeliest token is left, however hot the sampling."""
    args = ("-p", PROMPT, "--max-tokens", 20)
    (greedy,) = generated(*args, "--temperature", 0)["outputs"]
    record = generated(*args, "--temperature", 5, "--top-p", 1, "--min-p", 1)
    assert record["sampling"]["min_p"] == 1
    assert record["outputs"][0]["token_ids"] == greedy["token_ids"]
    (hot,) = generated(*args, "--temperature", 5, "--top-p", 1)["outputs"]
    assert hot["token_ids"] != greedy["token_ids"]


def test_equal_prompts_get_texts_of_their_own(generated: Cli, tmp_path: Path) -> None:
    file = write_prompts(tmp_path / "prompts.txt", PROMPT, PROMPT)
    one, two = generated("--prompts", file, "--max-tokens", 20)["outputs"]
    assert one["text"] != two["text"]


def test_defaults_of_sampling_are_the_models_own(cli: Cli, model_dir: Path, tmp_path: Path) -> None:
    own = copy_without(model_dir, tmp_path / "own")
    config = json.loads((own / "generation_config.json").read_text())
    config |= {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.9}
    (own / "generation_config.json").write_text(json.dumps(config))
    out = tmp_path / "out.json"
    for options, expected in (
        (("-m", own), {"temperature": 0.6, "top_p": 0.9, "top_k": 20}),
        (("-m", own, "--top-k", 0), {"temperature": 0.6, "top_p": 0.9, "top_k": 0}),
        (("-m", model_dir), {"temperature": 0.8, "top_p": 0.95, "top_k": 0}),
    ):
        result = cli("generate", *options, "-p", PROMPT, "--max-tokens", 2, "--json", out)
        assert result.exit_code == 0, result.stderr
        assert read_json(out)["sampling"] == {"min_p": 0.0, "stop": [], **expected}


@pytest.mark.parametrize("samples", [True, False, None])
def test_what_else_the_model_asks_for_is_followed_or_named(
    cli: Cli, model_dir: Path, tmp_path: Path, samples: bool | None
) -> None:
    own = copy_without(model_dir, tmp_path / "own")
    config = json.loads((own / "generation_config.json").read_text())
    asked = {"do_sample": samples, "repetition_penalty": 1.9, "no_repeat_ngram_size": 2}
    config |= {name: value for name, value in asked.items() if value is not None}
    (own / "generation_config.json").write_text(json.dumps(config))
    args = ("generate", "-m", own, "-p", PROMPT, "--max-tokens", 20, "--json", tmp_path / "o.json")
    chance = {True: (1.0, 1.0), False: (0.0, 1.0), None: (0.8, 0.95)}[samples]
    for options, penalty in (((), 1.9), (("--repetition-penalty", 1.1), 1.1)):
        result = cli(*args, *options)
        assert result.exit_code == 0, result.stderr
        sampling = read_json(tmp_path / "o.json")["sampling"]
        assert sampling["repetition_penalty"] == penalty
        assert (sampling["temperature"], sampling["top_p"]) == chance
        assert "note:" in result.stderr
        assert "no_repeat_ngram_size=2, which is not served" in result.stderr
    assert cli(*args, "--temperature", 0.3).exit_code == 0
    assert read_json(tmp_path / "o.json")["sampling"]["temperature"] == 0.3


def test_what_the_model_asks_for_may_be_impossible(
    cli: Cli, model_dir: Path, tmp_path: Path
) -> None:
    own = copy_without(model_dir, tmp_path / "own")
    config = json.loads((own / "generation_config.json").read_text())
    (own / "generation_config.json").write_text(json.dumps(config | {"repetition_penalty": 1e39}))
    result = cli("generate", "-m", own, "-p", PROMPT, "--max-tokens", 2)
    assert (result.exit_code, result.stdout) == (2, "")
    error = result.stderr.splitlines()[-1]
    for part in ("error: ", "generation config", "--repetition-penalty 1e+39", "choose for"):
        assert part in error
    args = ("--repetition-penalty", 1.2, "--max-tokens", 2)
    assert cli("generate", "-m", own, "-p", PROMPT, *args).exit_code == 0


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


def test_bar_is_there_until_text_comes() -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=80)
    with progress.Bar(console, 7) as bar:
        bar.update(3, 0.5, 120.4)
        bar.hide()
        text = out.getvalue()
        assert "3 of 7 prompts" in text
        assert "120 tokens/s" in text
        bar.update(4, 0.6, 99.0)
        assert len(out.getvalue()) > len(text)  # it comes back
    assert out.getvalue().endswith("\x1b[2K")  # and leaves no trace


def test_lines_are_not_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(100))
    monkeypatch.setattr("time.monotonic", lambda: next(clock) * 0.3)
    out = io.StringIO()
    with progress.Lines(Console(file=out, width=80), 10) as lines:
        for done in range(11):
            lines.update(done, done / 10, 50.0)
    told = [int(line.split()[0]) for line in out.getvalue().splitlines()]
    assert told == [1, 5, 9, 10]
    assert progress.LINE_EVERY_S == 1.0


def test_words_are_shown_whole() -> None:
    words = Words(limit=10)
    assert [words.add(piece) for piece in ("to", " be", " or\nno", "t t")] == [
        "",
        "to ",
        "be or\n",
        "not ",
    ]
    assert words.rest() == "t"
    assert words.rest() == ""
    assert words.add("a-word-without-end") == "a-word-without-end"


@needs_embedded
def test_demo() -> None:
    """What `make demo` runs, with both streams in one file, as in a log."""
    options = re.search(r"vattn generate (.*)", (ROOT / "Makefile").read_text())
    assert options is not None
    process = start("generate", *options[1].split(), stderr=subprocess.STDOUT)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0, out
    rows = [line for line in out.splitlines() if line.startswith("slot ")]
    assert len(rows) == 3
    assert all(MARKS[vattn.PageState.SHARED].character in row for row in rows)
    assert max(map(len, rows)) <= 80
    text = out.split("writers.")[1].split("sample 2")[0]
    words = re.findall(r"[A-Za-z]+", text)
    assert len(words) >= 100
    pairs = list(zip(words, words[1:], words[2:], strict=False))
    assert len(set(pairs)) > 0.8 * len(pairs), "the demo's text loops"


# The command as a whole --------------------------------------------------------------------------


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
    for option in ("--min-p", "--stop", "--max-num-seqs", "--swap-space", "--no-prefix-caching"):
        assert option in text
    for option in ("--logit-bias", "--json-schema", "--beam-width", "--speculative-config"):
        assert option in text


def test_unknown_command(cli: Cli) -> None:
    assert_refused(cli("frobnicate"), "frobnicate", "--help")


def test_command_line_does_not_import_transformers() -> None:
    """Help must not wait for it."""
    code = "import sys, vattn.cli; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
