"""The sides of `bench.serving`: programs of their own that generate when they are told to.

A side reads a line of JSON for each round and answers with one: ``seconds``, ``texts``,
``first_token_s`` of each stream and ``gaps_s`` between pieces of text, in seconds.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from bench.common import Json
from bench.offline_sides import DECISIVE
from bench.provenance import ROOT
from vattn.models import tiny_path

TOKENIZER = ("tokenizer.json", "tokenizer_config.json")


def save_model(folder: Path, layers: int, width: int, positions: int) -> int:
    """A random Llama in fp32 with the embedded model's tokenizer; returns its vocabulary's size."""
    for name in TOKENIZER:
        (folder / name).write_bytes((tiny_path() / name).read_bytes())
    vocabulary = json.loads((tiny_path() / "config.json").read_text())["vocab_size"]
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
        max_position_embeddings=positions,
        initializer_range=DECISIVE,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    return int(vocabulary)


class Program:
    """A Python module that runs beside this one; JSON lines go in and out."""

    def __init__(self, module: str, *arguments: str, threads: int) -> None:
        self._module = module
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": str(threads)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )

    @cached_property
    def hello(self) -> Json:
        """What it says first, when it is ready; several may start meanwhile."""
        return self._answer()

    @property
    def pid(self) -> int:
        return self._process.pid

    def ask(self, question: Json) -> Json:
        """One round."""
        assert self.hello["ready"]
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(question) + "\n")
        return self._answer()

    def _answer(self) -> Json:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self._module} ended: exit code {self._process.wait()}")
        answer: Json = json.loads(line)
        return answer

    def close(self) -> None:
        """Ends it; what it says no more matters."""
        self._process.communicate(timeout=60)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        try:
            self.close()
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            raise
