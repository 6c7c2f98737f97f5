"""Fixtures of the command line's tests, for modules that name them in `pytest_plugins`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

from tests.cli_helpers import LIMIT, Cli, read_json
from vattn.cli import app


@pytest.fixture
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal of 80 columns, no network, no settings, no clock; for `usefixtures`."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # for child processes; read at import
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.delenv("VATTN_BUDGET", raising=False)
    monkeypatch.delenv("VATTN_LIBCUDA", raising=False)
    # The fullest moment of a run does not depend on how busy the machine is.
    monkeypatch.setattr("vattn.cli.run._LONG_LOOK_S", math.inf)


@pytest.fixture(scope="session")
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


@pytest.fixture
def generated(generate: Cli, tmp_path: Path) -> Cli:
    """As `generate`, but gives the record of the run, which must have ended well."""

    def call(*args: object) -> Any:
        result = generate(*args, "--json", tmp_path / "generated.json")
        assert result.exit_code == 0, result.stderr
        return read_json(tmp_path / "generated.json")

    return call
