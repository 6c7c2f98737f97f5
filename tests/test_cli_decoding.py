"""`vattn generate` with penalties, sets of tokens, log probabilities, structure, beams, drafts."""

from __future__ import annotations

import io
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from tests.cli_helpers import LIMIT, PROMPT, Cli, assert_refused, read_json, write_prompts
from vattn.cli.decoding import with_option_names
from vattn.cli.report import print_results, write_json
from vattn.cli.run import Output, Timing
from vattn.outputs import CompletionOutput, Logprob

pytest_plugins = ("tests.cli_fixtures",)
pytestmark = pytest.mark.usefixtures("plain_environment")

GREEDY = ("-p", PROMPT, "--max-tokens", 24, "--temperature", 0)
DRAFTS = '{"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 3}'
SCHEMA = {
    "type": "object",
    "properties": {"a": {"enum": [1, 2]}},
    "required": ["a"],
    "additionalProperties": False,
}


def tokenizer(model_dir: Path) -> Any:
    return PreTrainedTokenizerFast.from_pretrained(model_dir)


def tokens_of(record: Any, output: int = 0) -> list[int]:
    ids: list[int] = record["outputs"][output]["token_ids"]
    return ids


# Bad input -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        (["--presence-penalty", "3"], ["--presence-penalty 3", "at most 2"]),
        (["--frequency-penalty", "-2.5"], ["--frequency-penalty -2.5", "at least -2"]),
        (["--frequency-penalty", "much"], ["'much'", "not a number"]),
        (["--repetition-penalty", "0"], ["--repetition-penalty 0", "above 1 against"]),
        (["--repetition-penalty", "nan"], ["--repetition-penalty nan"]),
        (["--logit-bias", "5"], ["--logit-bias 5", "42=-5"]),
        (["--logit-bias", "a=5"], ["--logit-bias a=5", "42=-5"]),
        (["--logit-bias", "5=nan"], ["--logit-bias of token 5", "nan"]),
        (["--logit-bias", "5=1", "--logit-bias", "5=2"], ["twice for token 5"]),
        (["--bad-words", ""], ["--bad-words", "non-empty"]),
        (["--allowed-token-ids", "5,x"], ["--allowed-token-ids 5,x", "5,6,7"]),
        (["--allowed-token-ids", "5,-6"], ["--allowed-token-ids", "-6"]),
        (["--logprobs", "-2"], ["--logprobs -2", "at least -1"]),
        (["--prompt-logprobs", "9999"], ["--prompt-logprobs 9999", "at most"]),
        (["--truncate-prompt-tokens", "0"], ["--truncate-prompt-tokens 0", "leaves no prompt"]),
        (["--regex", ""], ["--regex ''", "empty"]),
        (["--choice", "a", "--choice", ""], ["--choice ''", "empty"]),
        (["--regex", "a", "--choice", "b"], ["--regex and --choice", "one of"]),
        (["--json-schema", "/nowhere/s.json"], ["/nowhere/s.json", "No such file"]),
        (["--json-schema", "{"], ["--json-schema", "no JSON"]),
        (["--grammar", "/nowhere/g.lark"], ["/nowhere/g.lark", "No such file"]),
        (["--length-penalty", "2"], ["--length-penalty 2", "--beam-width"]),
        (["--beam-width", "0"], ["--beam-width 0", "at least 1"]),
        (["--beam-width", "2", "--n", "2"], ["--n 2", "--beam-width 2", "drop one"]),
        (["--beam-width", "40"], ["--beam-width 40", "--max-num-seqs 32"]),
        (["--beam-width", "2", "--top-p", "0.5"], ["--top-p", "--beam-width", "drop"]),
        (["--beam-width", "2", "--stop", "x"], ["--stop", "--beam-width"]),
        (["--beam-width", "2", "--logprobs", "0"], ["--logprobs", "--beam-width"]),
        (["--beam-width", "2", "--regex", "a"], ["structured output", "--beam-width"]),
        (["--beam-width", "2", "--length-penalty", "inf"], ["--length-penalty inf", "finite"]),
        (["--speculative-config", "{"], ["--speculative-config {", "no JSON"]),
        (["--speculative-config", "5"], ["--speculative-config 5", "mapping"]),
        (["--speculative-config", "null"], ["--speculative-config", "leave it out"]),
        (["--speculative-config", "{}"], ["--speculative-config", "num_speculative_tokens"]),
        (
            ["--speculative-config", '{"method": "eagle", "num_speculative_tokens": 2}'],
            ["--speculative-config", "eagle", "ngram"],
        ),
        (
            ["--speculative-config", '{"model": "/nowhere", "num_speculative_tokens": 2}'],
            ["--speculative-config's model", "/nowhere"],
        ),
    ],
)
def test_bad_options(generate: Cli, args: list[str], parts: list[str]) -> None:
    assert_refused(generate("--prompt", PROMPT, *args), *parts)


@pytest.mark.parametrize(
    ("args", "part"),
    [
        (["--logit-bias", "99999=1"], "--logit-bias has [99999]"),
        (["--allowed-token-ids", "99999"], "--allowed-token-ids has [99999]"),
    ],
)
def test_what_only_the_model_can_refuse(generate: Cli, args: list[str], part: str) -> None:
    result = generate("--prompt", PROMPT, *args)
    assert result.exit_code == 1
    assert result.stdout == "\n"
    error = result.stderr.splitlines()[-1]
    assert error.startswith("error: ")
    assert "prompt 0" not in error
    assert part in error


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        (["--regex", "n=[0-9]("], ["cannot be compiled: --regex 'n=[0-9](': "]),
        (["--json-schema", '{"type": "no-such"}'], ["--json-schema '{", "no-such"]),
        (["--grammar", "start: missing_rule"], ["--grammar 'start", "missing_rule"]),
        (["--bad-words", "stop=ž"], ["--bad-words has 'stop=ž', which is", "leave it out"]),
    ],
)
def test_languages_are_refused_before_the_model_is_loaded(
    generate: Cli, monkeypatch: pytest.MonkeyPatch, args: list[str], parts: list[str]
) -> None:
    def load(*_: Any, **__: Any) -> None:
        pytest.fail("the model was loaded")

    monkeypatch.setattr("vattn.cli.job.open_engine", load)
    if "--bad-words" in args:  # which this tokenizer has tokens for, as for everything
        fast: Any = PreTrainedTokenizerFast
        monkeypatch.setattr(fast, "encode", lambda *_, **__: [])
    assert_refused(generate("--prompt", PROMPT, *args), *parts)


def test_messages_keep_the_users_own_text() -> None:
    for own in ("'n=3 top_p=2'", '"it\'s n=1"', "['n=', 'seed=']: in n=["):
        assert with_option_names(f"bad_words={own}") == f"--bad-words {own}"
    told = with_option_names("speculative_config's model and top_p=2 of 'top_p=2' and top_p=2")
    assert told == "--speculative-config's model and --top-p 2 of 'top_p=2' and top_p=2"


def test_messages_name_the_options() -> None:
    told = with_option_names("top_p=2 and n=0 and logit_bias; an n or a stop, --top-p, my_n=3")
    assert told == "--top-p 2 and --n 0 and --logit-bias; an n or a stop, --top-p, my_n=3"


# Choice of tokens ----------------------------------------------------------------------


def test_penalties_change_the_text(generated: Cli) -> None:
    plain = tokens_of(generated(*GREEDY))
    assert len(set(plain)) < len(plain)
    for name in ("presence", "frequency", "repetition"):
        record = generated(*GREEDY, f"--{name}-penalty", 2)
        tokens = tokens_of(record)
        assert tokens != plain, name
        assert len(set(tokens)) > len(set(plain))
        assert record["sampling"][f"{name}_penalty"] == 2


def test_sets_of_tokens(generated: Cli, model_dir: Path) -> None:
    record = generated(*GREEDY, "--logit-bias", "70=100", "--logit-bias", " 71 = -100 ")
    assert set(tokens_of(record)) == {70}
    assert record["sampling"]["logit_bias"] == {"70": 100, "71": -100}
    some = tokens_of(generated(*GREEDY, "--allowed-token-ids", "70,71", "--allowed-token-ids", 72))
    assert set(some) <= {70, 71, 72}
    plain = generated(*GREEDY)
    seen = {token for token in tokens_of(plain) if token < 90}
    words = [arg for t in seen for arg in ("--bad-words", tokenizer(model_dir).decode([t]))]
    assert words
    assert not seen & set(tokens_of(generated(*GREEDY, *words)))


def test_as_many_log_probabilities_as_are_asked_for(generate: Cli, tmp_path: Path) -> None:
    args = (*GREEDY, "--logprobs", 30, "--prompt-logprobs", -1)
    assert generate(*args, "--json", tmp_path / "out.json").exit_code == 0
    (output,) = read_json(tmp_path / "out.json")["outputs"]
    assert {len(entry) for entry in output["logprobs"]} == {30}
    assert {len(entry) for entry in output["prompt_logprobs"][1:]} == {259}  # the vocabulary


def test_log_probabilities(generate: Cli, tmp_path: Path) -> None:
    args = (*GREEDY, "-n", 2, "--logprobs", 3, "--prompt-logprobs", 0)
    result = generate(*args, "--json", tmp_path / "out.json")
    assert result.exit_code == 0, result.stderr
    first, second = read_json(tmp_path / "out.json")["outputs"]
    for output in (first, second):
        entries = output["logprobs"]
        assert [len(entry) for entry in entries] == [3] * 24
        values = [e[str(t)]["logprob"] for e, t in zip(entries, output["token_ids"], strict=True)]
        assert output["cumulative_logprob"] == pytest.approx(sum(values))
    known = first["prompt_logprobs"]
    assert known[0] is None
    assert [len(entry) for entry in known[1:]] == [1] * (len(PROMPT) - 1)
    assert second["prompt_logprobs"] is None
    assert re.search(rf"over {len(PROMPT) - 1} tokens, perplexity \d", result.stderr)
    lines = result.stderr.splitlines()
    columns = re.compile(r" +2 +-\d+\.\d\d +24 +length +\d+ \(\d+\)")
    row = next(line for line in lines if columns.match(line))
    assert f"{second['cumulative_logprob']:.2f}" in row
    assert max(map(len, lines)) <= 80


def test_lists_of_log_probabilities_grow_in_place() -> None:
    """Each token adds to the list; a copy for each would take a time that grows with the square."""
    first: list[dict[int, Logprob]] = [{1: Logprob(-1.0, 1, "a")}]
    output = Output(0, 0, "x", 1)
    output.add(CompletionOutput(0, "a", [1], first, None, None))
    entries = output.logprobs
    output.add(CompletionOutput(0, "b", [2], [{2: first[0][1]}], None, None))
    assert output.logprobs is entries
    assert entries == [first[0], {2: first[0][1]}]
    assert len(first) == 1
    output.add(CompletionOutput(0, "", [], None, "stop", None))
    assert output.logprobs is entries


def test_numbers_that_are_not_finite_are_null_in_the_file(tmp_path: Path) -> None:
    output = Output(0, 0, "x", 1, cumulative_logprob=-math.inf)
    output.logprobs = [{1: Logprob(-math.inf, 7, "a"), 2: Logprob(-0.5, 1, "b")}]
    output.prompt_logprobs = [None, {3: Logprob(math.nan, 1, "c")}]
    path = tmp_path / "out.json"
    write_json(path, {"bias": math.inf}, [output], None, None, Timing())

    def refuse(name: str) -> None:
        pytest.fail(f"{name} is no JSON")

    record = json.loads(path.read_text(), parse_constant=refuse)
    (entry,) = record["outputs"]
    assert record["bias"] is entry["cumulative_logprob"] is None
    assert entry["logprobs"][0]["1"]["logprob"] is None
    assert entry["logprobs"][0]["2"]["logprob"] == -0.5
    assert entry["prompt_logprobs"][0] is entry["prompt_logprobs"][1]["3"]["logprob"] is None


@pytest.mark.parametrize("logprob", [-1e4, -math.inf])
def test_a_perplexity_beyond_all_numbers(logprob: float) -> None:
    output = Output(0, 0, "x", 2, finish_reason="length")
    output.prompt_logprobs = [None, {3: Logprob(logprob, 1, "c")}]
    console = Console(file=io.StringIO(), width=80)
    print_results(console, [output], is_search=False)
    assert "perplexity inf" in console.file.getvalue()  # type: ignore[attr-defined]


def test_prompts_are_truncated(generated: Cli) -> None:
    long = "".join(chr(97 + i % 26) for i in range(LIMIT + 60))
    for keep, used in ((20, 20), (-1, LIMIT - 1)):
        (output,) = generated("-p", long, "--max-tokens", 1, "--truncate-prompt-tokens", keep)[
            "outputs"
        ]
        assert output["prompt_tokens"] == used
    args = ("--max-tokens", 9, "--temperature", 0)
    cut = tokens_of(generated("-p", long, *args, "--truncate-prompt-tokens", 30))
    assert cut == tokens_of(generated("-p", long[-30:], *args))


# Structured output ---------------------------------------------------------------------


def test_structured_output(generated: Cli, model_dir: Path, tmp_path: Path) -> None:
    space = tokenizer(model_dir).convert_tokens_to_ids(["Ġ", "Ċ", "ĉ", "č"])
    no_space = [arg for token in space for arg in ("--logit-bias", f"{token}=-100")]

    def text(*args: object) -> str:
        (output,) = generated("-p", PROMPT, "--max-tokens", 60, *no_space, *args)["outputs"]
        assert output["finish_reason"] == "stop"
        return str(output["text"])

    assert text("--choice", "yes", "--choice", "no") in ("yes", "no")
    assert re.fullmatch(r"[a-c]{3}-[0-9]", text("--regex", r"[a-c]{3}-[0-9]"))
    schema, grammar = tmp_path / "schema.json", tmp_path / "one.lark"
    schema.write_text(json.dumps(SCHEMA))
    grammar.write_text('start: "x" ("y" | "z") "!"')
    compact = {"type": "array", "items": {"enum": [7]}, "minItems": 2, "maxItems": 2}
    for given in (schema, json.dumps(SCHEMA)):
        assert json.loads(text("--json-schema", given))["a"] in (1, 2)
    assert json.loads(text("--json-schema", json.dumps(compact))) == [7, 7]
    for given in (grammar, grammar.read_text()):
        assert text("--grammar", given) in ("xy!", "xz!")


# Beams ---------------------------------------------------------------------------------


def test_beams_are_those_of_the_model(generate: Cli, model_dir: Path, tmp_path: Path) -> None:
    file = write_prompts(tmp_path / "prompts.txt", PROMPT, "another one")
    args = ("--prompts", file, "--beam-width", 3, "--max-tokens", 10, "--length-penalty", 0.5)
    result = generate(*args, "--json", tmp_path / "out.json", "--memory-map")
    assert result.exit_code == 0, result.stderr
    record = read_json(tmp_path / "out.json")
    model: Any = LlamaForCausalLM.from_pretrained(model_dir)
    for number, prompt in enumerate((PROMPT, "another one")):
        ids = tokenizer(model_dir)(prompt, return_tensors="pt")["input_ids"]
        expected = model.generate(
            ids,
            attention_mask=ids.new_ones(ids.shape),
            num_beams=3,
            num_return_sequences=3,
            max_new_tokens=10,
            length_penalty=0.5,
            do_sample=False,
            output_scores=True,
            return_dict_in_generate=True,
        )
        outputs = record["outputs"][3 * number : 3 * number + 3]
        wanted = expected.sequences[:, ids.shape[1] :].tolist()
        assert [output["token_ids"] for output in outputs] == wanted
        scores = [output["score"] for output in outputs]
        assert scores == pytest.approx(expected.sequences_scores.tolist(), abs=1e-4)
    assert result.stdout == "\n\n".join(o["text"] for o in record["outputs"]) + "\n"
    assert record["sampling"]["beam_width"] == 3
    assert record["timing"]["tokens"] == 60
    for part in ("beam 1 of 3", "score", "memory map", "prompt 2 of 2"):
        assert part in result.stderr
    assert f"{record['outputs'][4]['score']:.4f}" in result.stderr
    assert max(map(len, result.stderr.splitlines())) <= 80


def test_beams_without_memory(generate: Cli) -> None:
    """Three beams of 60 tokens are more than the budget of 64 tokens in two pages of each run."""
    args = ("-p", "x" * 40, "--beam-width", 3, "--max-tokens", 60, "--budget", "64KiB")
    result = generate(*args)
    assert result.exit_code == 1
    assert "pages" in result.stderr.splitlines()[-1]


# Speculation ---------------------------------------------------------------------------


def test_speculation_gives_the_same_text_and_tells_what_it_saved(
    generate: Cli, tmp_path: Path
) -> None:
    args = ("-p", "abcdabcdabcdabcd", "--max-tokens", 120, "--temperature", 0)
    plain = generate(*args, "--json", tmp_path / "plain.json")
    drafted = generate(*args, "--json", tmp_path / "out.json", "--speculative-config", DRAFTS)
    assert drafted.exit_code == 0, drafted.stderr
    assert drafted.stdout == plain.stdout
    record = read_json(tmp_path / "out.json")
    engine = record["engine"]
    accepted, drafts = (engine[f"spec_decode_num_{name}_tokens"] for name in ("accepted", "draft"))
    assert 0 < accepted <= drafts
    assert engine["num_steps"] < read_json(tmp_path / "plain.json")["engine"]["num_steps"]
    assert f"{accepted} of {drafts} drafts accepted" in drafted.stderr
    assert "speculation" not in plain.stderr
    assert record["speculative_config"] == json.loads(DRAFTS)
    assert generate("-p", "a", "--max-tokens", 1, "--speculative-config", DRAFTS).exit_code == 0
