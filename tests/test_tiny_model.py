"""The packaged model loads without a network, fits its size, and writes English."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from vattn.models import tiny_path

# From SQLite's documentation (public domain), held out of the training text.
HELD_OUT = Path(__file__).parent / "data" / "heldout.txt"

PROMPTS = ["The database", "When a function is called,", "A transaction"]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(tiny_path(), local_files_only=True)


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_path(), local_files_only=True)


def words(text: str) -> list[str]:
    return [w.lower().removesuffix("'s") for w in re.findall(r"[A-Za-z]+(?:'[a-z]+)?", text)]


def real_share(text: str) -> float:
    """Share of words that are among the frequent words of the training text."""
    known = set((tiny_path() / "words.txt").read_text().split())
    found = words(text)
    return sum(w in known for w in found) / len(found)


def test_files_are_small_and_complete() -> None:
    sizes = {p.name: p.stat().st_size for p in tiny_path().iterdir()}
    assert sizes["model.safetensors"] <= 2_000_000
    assert sizes["words.txt"] <= 60_000
    assert sum(sizes.values()) < 2_200_000
    assert {"config.json", "generation_config.json", "tokenizer.json", "README.md"} <= set(sizes)


def test_model_loads_in_float32(model: Any) -> None:
    # Stored as float8 to fit; config.json declares float32, so comparisons on a CPU are exact.
    config = json.loads((tiny_path() / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["hidden_size"] // config["num_attention_heads"] == config["head_dim"] == 32
    assert model.dtype == torch.float32
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_tokenizer_keeps_any_text(tokenizer: Any) -> None:
    text = 'Tabs\tand "quotes",\n\n  naïve 日本語 bytes; a CamelCase_name(x) -> 0.5'
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_tokenizer_pads_on_the_left(tokenizer: Any) -> None:
    batch = tokenizer(["A", "A longer prompt"], padding=True, return_tensors="pt")
    assert batch["input_ids"][0, 0] == tokenizer.pad_token_id
    assert batch["attention_mask"][0].tolist() == sorted(batch["attention_mask"][0].tolist())


def test_a_chat_is_its_paragraphs(tokenizer: Any) -> None:
    chat = [{"role": "system", "content": "One."}, {"role": "user", "content": "Two"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text == "<s>One.\n\nTwo\n\n"
    text = tokenizer.apply_chat_template(chat, tokenize=False, continue_final_message=True)
    assert text == "<s>One.\n\nTwo"


@pytest.mark.parametrize("prompt", PROMPTS)
def test_greedy_text_is_english(model: Any, tokenizer: Any, prompt: str) -> None:
    out = model.generate(
        **tokenizer(prompt, return_tensors="pt"),
        do_sample=False,
        min_new_tokens=220,
        max_length=240,
    )
    text = tokenizer.decode(out[0], skip_special_tokens=True)
    assert len(words(text)) >= 120
    assert real_share(text) >= 0.9, text


def test_sampled_text_is_english(model: Any, tokenizer: Any) -> None:
    torch.manual_seed(0)
    batch = tokenizer(PROMPTS, padding=True, return_tensors="pt")
    out = model.generate(
        **batch, do_sample=True, temperature=0.8, top_p=0.95, top_k=0, max_new_tokens=160
    )
    text = " ".join(tokenizer.batch_decode(out, skip_special_tokens=True))
    assert real_share(text) >= 0.9, text


@torch.no_grad()
def test_held_out_bits_per_byte(model: Any, tokenizer: Any) -> None:
    text = HELD_OUT.read_text()
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
    nats = 0.0
    for at in range(0, len(ids) - 1, 512):
        window = ids[at : at + 513]
        logits = model(window[None, :-1]).logits[0]
        nats += torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum").item()
    assert nats / len(text.encode()) / math.log(2) <= 1.3  # measured: 1.253
