"""Loading models for the engine: what is observed of them, and what is refused and why."""

from __future__ import annotations

import json
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    BloomConfig,
    GenerationConfig,
    LlamaConfig,
    Phi3Config,
)

from tests.models import _COMMON, ENGINE_CONFIGS, POSITIONS, VOCABULARY, WINDOW, engine_model
from vattn import hf
from vattn.hf.attention import NAME, OBSERVED, StepMissing, register
from vattn.hf.checks import longest_sequence
from vattn.hf.model import LoadedModel, ModelError, load_model, load_tokenizer
from vattn.models import tiny_path

generation_config: Any = GenerationConfig
FULL = [None, None, None]


# What is observed ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "kv_heads", "windows"),
    [
        ("llama", 2, FULL),
        ("qwen3", 2, FULL),
        ("gemma3", 2, [WINDOW, None, WINDOW]),
        ("mistral", 2, [WINDOW] * 3),
        ("gpt2", 4, FULL),
        ("mixtral", 2, FULL),
        ("gemma2", 2, [WINDOW, None, WINDOW]),
        ("gpt_oss", 2, [WINDOW, None, WINDOW]),
        ("multi_query", 1, FULL),
        ("stablelm", 2, FULL),
    ],
)
def test_layers_of_a_family(family: str, kv_heads: int, windows: list[int | None]) -> None:
    loaded = load_model(engine_model(family))
    assert [spec.window for spec in loaded.specs] == windows
    for spec, stored in zip(loaded.specs, loaded.layer_specs(), strict=True):
        assert (spec.heads, spec.kv_heads, spec.head_dim) == (4, kv_heads, 16)
        assert spec.dtype == torch.float32
        assert spec.scale == 0.25
        assert spec.softcap == (2.0 if family == "gemma2" else None)
        assert spec.sinks == (family == "gpt_oss")
        assert (stored.kv_heads, stored.head_dim) == (kv_heads, 16)
        assert (stored.dtype, stored.window) == (torch.float32, spec.window)
    assert loaded.layer_of == {0: 0, 1: 1, 2: 2}
    assert (loaded.vocab_size, loaded.max_positions) == (VOCABULARY, POSITIONS)
    assert loaded.keeps_logits
    assert (loaded.device, loaded.dtype) == (torch.device("cpu"), torch.float32)
    assert not loaded.model.training


def test_every_family_is_in_the_test_above() -> None:
    mark = test_layers_of_a_family.pytestmark[0]  # type: ignore[attr-defined]
    assert [case[0] for case in mark.args[1]] == list(ENGINE_CONFIGS)


def test_a_scale_of_its_own() -> None:
    loaded = load_model(engine_model("gemma3"))
    assert loaded.specs[0].scale == 0.25
    model = engine_model("gemma3")
    for layer in model.model.layers:
        layer.self_attn.scaling = 0.5
    assert load_model(model).specs[0].scale == 0.5


def test_end_of_text_and_sampling_defaults() -> None:
    model = engine_model("llama")
    assert load_model(model).eos_token_ids == frozenset()
    assert load_model(model).generation_defaults == {}
    model.config.eos_token_id = 3
    assert load_model(model).eos_token_ids == {3}
    model.generation_config = generation_config(
        eos_token_id=[5, 7], do_sample=True, temperature=0.6, top_k=20, max_new_tokens=9
    )
    loaded = load_model(model)
    assert loaded.eos_token_ids == {5, 7}
    assert loaded.generation_defaults == {"temperature": 0.6, "top_k": 20, "max_tokens": 9}
    model.generation_config = generation_config(
        do_sample=False, max_new_tokens=9, repetition_penalty=1.2
    )
    loaded = load_model(model)
    wanted = {"temperature": 0.0, "max_tokens": 9, "repetition_penalty": 1.2}
    assert (loaded.generation_defaults, loaded.generation_ignored) == (wanted, ())


def test_longrope_ends_where_its_factors_change() -> None:
    config = Phi3Config(
        max_position_embeddings=4096,
        original_max_position_embeddings=512,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "short_factor": [1.0] * 48,
            "long_factor": [2.0] * 48,
            "original_max_position_embeddings": 512,
        },
    )
    assert longest_sequence(config) == 512
    assert longest_sequence(Phi3Config(max_position_embeddings=4096)) == 4096
    assert longest_sequence(BloomConfig()) is None


def test_a_model_that_serves_an_engine_says_so() -> None:
    model = load_model(engine_model("llama")).model
    ids = torch.tensor([[1, 2]])
    with pytest.raises(StepMissing, match='set_attn_implementation\\("sdpa"\\)'):
        model.generate(ids, max_new_tokens=2)
    model.set_attn_implementation("sdpa")
    assert model.generate(ids, max_new_tokens=2, do_sample=False).shape == (1, 4)


def test_nothing_is_registered_by_an_import(monkeypatch: pytest.MonkeyPatch) -> None:
    for names in (AttentionInterface._global_mapping, AttentionMaskInterface._global_mapping):
        for name in (NAME, OBSERVED):
            monkeypatch.delitem(names, name, raising=False)
    for path in Path(hf.__file__).parent.glob("*.py"):
        runpy.run_path(str(path))
    known = (AttentionInterface._global_mapping, AttentionMaskInterface._global_mapping)
    assert not {NAME, OBSERVED} & {name for names in known for name in names}
    register()
    register()
    assert {NAME, OBSERVED} <= set(known[0])
    assert {NAME, OBSERVED} & set(known[1]) == {OBSERVED}  # NAME must have no mask


# From a directory ---------------------------------------------------------------------------------


def save(path: Path, family: str = "llama", shard: str = "50GB", **changes: Any) -> Any:
    model = engine_model(family)
    model.save_pretrained(path, max_shard_size=shard, **changes)
    return model


@torch.no_grad()
def logits_of(loaded: LoadedModel) -> torch.Tensor:
    """What the model computes with its attention given back."""
    loaded.model.set_attn_implementation("eager")
    logits: torch.Tensor = loaded.model(torch.arange(2, 40)[None]).logits
    return logits


@pytest.mark.parametrize("shard", ["50GB", "60KB"])
def test_a_directory(tmp_path: Path, shard: str) -> None:
    model = save(tmp_path, shard=shard)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard == "60KB")
    loaded = load_model(str(tmp_path))
    with torch.no_grad():
        wanted = model(torch.arange(2, 40)[None]).logits
    assert torch.equal(logits_of(loaded), wanted)


def test_the_embedded_model() -> None:
    loaded = load_model(tiny_path())
    assert len(loaded.specs) == loaded.config.num_hidden_layers
    assert loaded.eos_token_ids


def test_tied_weights(tmp_path: Path) -> None:
    config = LlamaConfig(**{**_COMMON, "tie_word_embeddings": True})
    model: Any = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    model.save_pretrained(tmp_path)
    loaded = load_model(tmp_path)
    embeddings = loaded.model.get_input_embeddings().weight
    assert loaded.model.get_output_embeddings().weight.data_ptr() == embeddings.data_ptr()
    assert torch.equal(embeddings, model.get_input_embeddings().weight)


@pytest.mark.parametrize(
    ("asked", "given"),
    [
        ("auto", torch.bfloat16),
        ("float32", torch.float32),
        ("half", torch.float16),
        (torch.float64, torch.float64),
    ],
)
def test_dtypes(tmp_path: Path, asked: Any, given: torch.dtype) -> None:
    engine_model("llama").to(torch.bfloat16).save_pretrained(tmp_path)
    loaded = load_model(tmp_path, dtype=asked)
    assert loaded.dtype == given
    assert {weight.dtype for weight in loaded.model.parameters()} == {given}
    assert load_model(engine_model("gpt2"), dtype=asked).dtype == (
        torch.float32 if asked == "auto" else given
    )


def test_bad_arguments(tmp_path: Path) -> None:
    save(tmp_path)
    with pytest.raises(ModelError, match="dtype='int8' is not one of auto, float16"):
        load_model(tmp_path, dtype="int8")
    with pytest.raises(ModelError, match=r"dtype=torch\.int32"):
        load_model(tmp_path, dtype=torch.int32)
    with pytest.raises(ValueError, match="device='tpu'"):
        load_model(tmp_path, device="tpu")
    with pytest.raises(ModelError, match="revision='main' is of a Hub model"):
        load_model(tmp_path, revision="main")
    with pytest.raises(ModelError, match="revision='main' is of a Hub model"):
        load_model(engine_model("llama"), revision="main")
    with pytest.raises(ModelError, match="int is no model"):
        load_model(5)  # type: ignore[arg-type]


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def drop_tensors(file: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(file)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, file, metadata={"format": "pt"})


def change_config(file: Path) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), "intermediate_size": 128}))


WEIGHTS = "model.safetensors"
DAMAGE: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "no config": ("config.json", Path.unlink, "has no config.json"),
    "broken config": ("config.json", lambda f: f.write_text("{"), "its configuration"),
    "no weights": (WEIGHTS, Path.unlink, "has no weights"),
    "truncated weights": (WEIGHTS, truncate, rf"{WEIGHTS} is damaged"),
    "empty weights": (WEIGHTS, lambda f: f.write_bytes(b""), rf"{WEIGHTS} is damaged"),
    "a pointer": (
        WEIGHTS,
        lambda f: f.write_text("version https://git-lfs.github.com/spec/v1\n"),
        rf"{WEIGHTS} is a git-lfs pointer",
    ),
    "missing tensors": (WEIGHTS, drop_tensors, "lack 1 tensors .* model.layers.1.mlp.up_proj"),
    "other shapes": ("config.json", change_config, "its weights cannot be read"),
    "an adapter": ("adapter_config.json", lambda f: f.write_text("{}"), "LoRA adapter"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_directory_that_is_not_whole(tmp_path: Path, damage: str) -> None:
    save(tmp_path)
    name, change, message = DAMAGE[damage]
    change(tmp_path / name)
    with pytest.raises(ModelError, match=message) as error:
        load_model(tmp_path)
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


def test_shards_that_are_not_there(tmp_path: Path) -> None:
    save(tmp_path, shard="60KB")
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ModelError, match=f"{shard} is damaged"):
        load_model(tmp_path)
    shard.unlink()
    with pytest.raises(ModelError, match=f"{shard} is missing"):
        load_model(tmp_path)
    (tmp_path / f"{WEIGHTS}.index.json").write_text("[]")
    with pytest.raises(ModelError, match=r"index\.json is not an index of weights"):
        load_model(tmp_path)


def test_names_of_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "file").touch()
    for name, message in (
        (tmp_path, "has no config.json"),
        (tmp_path / "missing", "there is no such directory"),
        (str(tmp_path / "missing"), "there is no such directory"),
        ("./missing", "there is no such directory"),
        (tmp_path / "file", "is a file"),
        ("", "name is empty"),
        ("nobody/nothing-at-all", "is no directory here and cannot be had from"),
    ):
        with pytest.raises(ModelError, match=message):
            load_model(name)


# Tokenizers ---------------------------------------------------------------------------------------


def test_tokenizers(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tiny_path())
    assert (
        tokenizer.decode(tokenizer("virtual memory").input_ids, skip_special_tokens=True)
        == "virtual memory"
    )
    assert load_tokenizer(tokenizer) is tokenizer
    loaded = load_tokenizer(AutoModelForCausalLM.from_pretrained(tiny_path()))
    assert loaded.get_vocab() == tokenizer.get_vocab()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    tokenizer.save_pretrained(tmp_path)
    chat = [{"role": "user", "content": "virtual memory"}]
    again = load_tokenizer(tmp_path)
    assert again.apply_chat_template(chat, tokenize=False) == "virtual memory"
    for name, message in (
        (tmp_path / "missing", "there is no such directory"),
        (engine_model("llama"), "was not loaded from anywhere"),
        (7, "int is no tokenizer"),
    ):
        with pytest.raises(ModelError, match=message):
            load_tokenizer(name)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match="its tokenizer cannot be read"):
        load_tokenizer(tmp_path)
