"""VirtualCache in generate(): token for token what the stock cache gives."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from transformers import LogitsProcessor

from tests.models import (
    FAMILIES,
    MODES,
    NEW,
    arguments,
    one_thread,
    prompts,
    run,
    stock_cache,
    strict_cache,
    tiny_model,
)
from vattn import VirtualCache


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


class Wipe(LogitsProcessor):
    """After the prompt, zeroes K and V of one token in the middle layer of every row."""

    def __init__(self, cache: VirtualCache, token: int) -> None:
        self.cache, self.token = cache, token

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        # Prompt lookup asks the processors about its draft before anything is cached.
        if self.cache.kv is not None and self.token >= 0:
            for row in range(self.cache.batch_size):
                first = self.cache.kv.first_token(row, 1)
                for states in self.cache.kv.view(row, 1):
                    assert states[self.token - first].count_nonzero() > 0
                    states[self.token - first].zero_()
            self.token = -1
        return scores


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_equal_the_stock_cache(family: str, mode: str) -> None:
    model = tiny_model(family)
    expected = run(model, stock_cache(model.config), mode)
    cache = strict_cache(model.config)
    with mock.patch.object(cache, "crop", wraps=cache.crop) as crop:
        assert torch.equal(run(model, cache, mode), expected)
    crops = [call.args[0] for call in crop.call_args_list]
    # The comparison means something: the text varies, and rows and rejected drafts are there.
    assert all(len(set(row[-NEW:].tolist())) > 8 for row in expected)
    assert cache.batch_size == {"beam": 3, "sample": 3, "padded": 3}.get(mode, 1)
    assert (min(crops, default=0) < 0) == (mode == "lookup")
    if mode == "sample":
        assert len({tuple(row.tolist()) for row in expected}) == 3


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", FAMILIES)
def test_wiping_one_cached_token_changes_the_text(family: str, mode: str) -> None:
    model = tiny_model(family)
    expected = run(model, strict_cache(model.config), mode)
    given = arguments(mode)["input_ids"].shape[1]

    def text_without(token: int) -> torch.Tensor:
        cache = strict_cache(model.config)
        return run(model, cache, mode, logits_processor=[Wipe(cache, token)])

    # Not every token is looked at by the 40 that follow; that of the last few none is, is unlikely.
    assert any(not torch.equal(text_without(given - i), expected) for i in range(1, 9))


@pytest.mark.parametrize("family", FAMILIES)
def test_beams_of_a_padded_batch_and_an_assistant(family: str) -> None:
    model, config = tiny_model(family), tiny_model(family).config
    beams = {"num_beams": 4, "num_return_sequences": 2}
    expected = run(model, stock_cache(config), "padded", **beams)
    assert torch.equal(run(model, strict_cache(config), "padded", **beams), expected)
    helper = {"assistant_model": tiny_model("llama")}
    expected = run(model, stock_cache(config), **helper)
    assert torch.equal(run(model, strict_cache(config), **helper), expected)


@pytest.mark.parametrize("layers_per_region", [1, 2, None])
@pytest.mark.parametrize("order", ["token", "head"])
@pytest.mark.parametrize("mode", ["beam", "lookup", "padded"])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_every_layout_gives_the_same_tokens(
    family: str, mode: str, order: Any, layers_per_region: int | None
) -> None:
    model = tiny_model(family)
    cache = strict_cache(model.config, order=order, layers_per_region=layers_per_region)
    assert torch.equal(run(model, cache, mode), run(model, stock_cache(model.config), mode))


@pytest.mark.parametrize("tile", [32, (48, 64)])
def test_tiles_are_covered(tile: Any) -> None:
    model = tiny_model("mistral")
    cache = strict_cache(model.config, kv_tile_tokens=tile, order="token", layers_per_region=1)
    assert torch.equal(run(model, cache, "padded"), run(model, stock_cache(model.config), "padded"))
    assert cache.stats().cover_bytes > 0


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_bfloat16(family: str) -> None:
    model = tiny_model(family, torch.bfloat16)
    cache = strict_cache(model.config)
    assert torch.equal(run(model, cache, "padded"), run(model, stock_cache(model.config), "padded"))
    assert cache.kv is not None
    assert cache.kv.specs[0].dtype == torch.bfloat16


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_a_conversation_goes_on(family: str) -> None:
    model = tiny_model(family)
    cache, other = strict_cache(model.config), stock_cache(model.config)
    ids = prompts(2)
    for turn in range(3):
        given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        ids = run(model, cache, "greedy", **given)
        assert torch.equal(ids, run(model, other, "greedy", **given))
        assert cache.get_seq_length() == ids.shape[1] - 1
        ids = torch.cat([ids, prompts(2, 9, seed=turn)], 1)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prefix_is_copied_for_several_texts(family: str) -> None:
    model = tiny_model(family)
    prefix, mask = prompts(2, 70), torch.ones(2, 70)
    cache, other = strict_cache(model.config), stock_cache(model.config)
    with torch.inference_mode():
        for ids in torch.chunk(prefix, 2, dim=1):
            model(ids, past_key_values=cache)
            model(ids, past_key_values=other)
    for seed in range(2):
        ids = torch.cat([prefix, prompts(2, 5, seed=seed)], 1)
        mask = torch.ones_like(ids)
        mine = copy.deepcopy(cache)
        got = run(model, mine, input_ids=ids, attention_mask=mask)
        theirs = copy.deepcopy(other)
        assert torch.equal(got, run(model, theirs, input_ids=ids, attention_mask=mask))
        assert cache.get_seq_length() == 70
        cache.check()
