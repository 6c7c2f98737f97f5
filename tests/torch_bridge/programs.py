"""Programs with real PyTorch whose memory is vattn's; each is run in a process of its own.

``python -m tests.torch_bridge.programs NAME DRIVER`` runs one. They assert, and print nothing.
"""

from __future__ import annotations

import gc
from typing import Any

import torch

from tests.torch_bridge.world import MIB, PAGE, block, main, raised_by, world
from vattn import LLM, KVCache, OutOfPages, SamplingParams, VirtualCache, _core, allocator


def tiny_model() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config)


def train_and_generate() -> tuple[list[float], list[list[int]]]:
    """Losses of a few steps with varying lengths, and what the trained model says."""
    model = tiny_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for length in (16, 48, 32, 64, 8):
        tokens = torch.randint(0, 96, (4, length))
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    model.eval()
    prompt = torch.randint(0, 96, (3, 7))
    out = model.generate(prompt, max_new_tokens=12, do_sample=False, pad_token_id=0)
    return losses, out.tolist()


def program(kind: str) -> None:
    """Training and generation are the same, bit by bit, and give everything back."""
    torch.set_num_threads(1)
    expected = train_and_generate()
    gc.collect()
    with world(kind) as here:
        losses, tokens = train_and_generate()
        figures = here.allocator.figures()
        assert figures["all"]["allocation"]["allocated"] > 1000
        assert figures["all"]["allocated_bytes"]["peak"] > 4 * MIB
        here.check()
        gc.collect()
    assert (losses, tokens) == expected
    assert here.live_bytes() <= 64 * 1024, "tensors of the program are left"
    assert _core.torch_entry_errors() == dict.fromkeys(_core.torch_entry_errors(), 0)


def out_of_memory(kind: str) -> None:
    """PyTorch's own error, by type, in PyTorch's own way; the program goes on."""
    with world(kind, budget_bytes=64 * MIB) as here:
        before = _core.set_current_tag(_core.tag_id("weights"))
        weights = torch.full((24 * MIB,), 7, dtype=torch.uint8)
        _core.set_current_tag(before)
        held = [block(16 * MIB), block(16 * MIB)]
        try:
            torch.zeros(32 * MIB, dtype=torch.uint8)
            raise AssertionError("there was no memory for this")
        except torch.OutOfMemoryError as error:
            message = str(error)
        for part in ("out of memory", "32.00 MiB", "64.00 MiB", "weights: 24.00 MiB"):
            assert part in message, message
        assert issubclass(torch.OutOfMemoryError, RuntimeError)
        assert here.allocator.figures()["num_ooms"] == 1
        here.check()
        held.pop()
        assert int(torch.zeros(16 * MIB, dtype=torch.uint8).max()) == 0
        held.clear()
        assert int(torch.ones(32 * MIB, dtype=torch.uint8).min()) == 1
        assert int(weights.min()) == int(weights.max()) == 7
        del weights
        # In a backward pass, which runs in C++ and must bring the error out unharmed.
        x = torch.ones(2 * MIB, requires_grad=True)
        y = (x * 2).exp()
        filler = []
        try:
            while True:
                filler.append(block(2 * MIB))
        except torch.OutOfMemoryError:
            pass
        try:
            torch.autograd.backward(y.sum())
            raise AssertionError("there was no memory for the gradient")
        except torch.OutOfMemoryError:
            filler.clear()
        torch.autograd.backward((x * 3).sum())
        assert x.grad is not None
        assert float(x.grad[0]) == 3.0


def pause(kind: str) -> None:
    """A tag's tensors lose their memory and get it back, at the same addresses."""
    with world(kind, budget_bytes=64 * MIB):
        with allocator.pool("weights"):
            weights = [torch.randn(MIB) for _ in range(6)]  # 24 MiB
            small = torch.arange(100)
        other = torch.ones(MIB)
        copies = [w.numpy().copy() for w in weights]
        places = [w.data_ptr() for w in weights]
        allocator.pause("weights")
        room = torch.zeros(13 * MIB)  # 52 MiB: only there because the weights are away
        error = raised_by(lambda: allocator.resume("weights"))
        assert isinstance(error, _core.OutOfMemory), error
        del room
        allocator.resume("weights")
        assert [w.data_ptr() for w in weights] == places
        for w, copy in zip(weights, copies, strict=True):
            assert (w.numpy() == copy).all()
        assert small.tolist() == list(range(100))
        assert float(other.sum()) == MIB
        allocator.pause("weights", backup=False)
        error = raised_by(allocator.pool("weights").__enter__)
        assert isinstance(error, RuntimeError), error
        assert "paused" in str(error), error
        before = _core.set_current_tag(_core.tag_id("weights"))  # what was open all the time
        error = raised_by(lambda: block(MIB))
        _core.set_current_tag(before)
        assert isinstance(error, RuntimeError), error
        assert "paused" in str(error), error
        allocator.resume("weights")
        weights[0].fill_(5)
        assert float(weights[0].sum()) == 5 * MIB
        allocator.set_budget("weights", 32 * MIB)
        with allocator.pool("weights"):
            error = raised_by(lambda: block(16 * MIB))
        assert isinstance(error, torch.OutOfMemoryError), error
        assert "weights" in str(error), error


def one_pool(kind: str) -> None:
    """Tensors and a KV cache share the pool without a split; each takes what the other leaves."""
    with world(kind, budget_bytes=64 * MIB) as here:
        with KVCache(
            2,
            kv_heads=4,
            head_dim=64,
            dtype=torch.float32,
            max_seqs=4,
            max_tokens=4096,
            order="token",
        ) as cache:
            assert cache.pool.core is here.pool
            assert cache.pool.mapper is here.allocator.mapper
            slot = cache.open()
            cache.ensure(slot, 4096)  # 16 MiB
            keep = block(40 * MIB)
            second = cache.open()
            error = raised_by(lambda: cache.ensure(second, 4096))
            assert isinstance(error, OutOfPages), error
            del keep  # idle in the allocator's cache: the KV cache can have it
            cache.ensure(second, 4096)
            cache.release(slot, keep=True)
            cache.release(second, keep=True)
            # And back: kept prefixes give way to tensors before there is an error.
            big = torch.ones(60 * MIB, dtype=torch.uint8)
            assert int(big.min()) == 1
            assert cache.stats().kept_bytes <= 4 * MIB
            del big
            third = cache.open()
            cache.ensure(third, 4096)
            here.check()
        for given in ({"budget_bytes": 8 * MIB}, {"page_bytes": PAGE}, {"strict": True}):
            error = raised_by(
                lambda given=given: KVCache(  # type: ignore[misc]
                    1, 1, 64, torch.float32, max_seqs=1, max_tokens=64, **given
                )
            )
            assert isinstance(error, ValueError), error
            assert "vattn.allocator" in str(error), error


def served_tokens() -> tuple[Any, list[Any]]:
    """What an engine and `generate` with a virtual cache say, and the pools that they used."""
    model = tiny_model().eval()
    prompts: list[Any] = [{"prompt_token_ids": [3 + i, 5, 8, 13 + i]} for i in range(5)]
    params = SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True)
    with LLM(model, skip_tokenizer_init=True, max_model_len=64, max_num_seqs=4) as llm:
        outputs = llm.generate(prompts, params, use_tqdm=False)
        pools = [llm.engine.memory.cache.pool.core]
    model = tiny_model().eval()
    cache = VirtualCache(model.config, max_tokens=64)
    text = model.generate(
        torch.tensor([[3, 5, 8, 13]]),
        past_key_values=cache,
        max_new_tokens=20,
        do_sample=False,
        pad_token_id=0,
    )
    pool = cache._rows.pool
    assert pool is not None
    pools.append(pool.core)
    return ([list(o.outputs[0].token_ids) for o in outputs], text.tolist()), pools


def served(kind: str) -> None:
    """An engine and a virtual cache use the one pool, and say the same."""
    torch.set_num_threads(1)
    expected, apart = served_tokens()
    with world(kind) as here:
        found, pools = served_tokens()
        assert pools == [here.pool, here.pool]
        assert all(pool is not here.pool for pool in apart)
        assert found == expected
        error = raised_by(
            lambda: LLM(
                tiny_model(),
                skip_tokenizer_init=True,
                max_model_len=64,
                kv_cache_memory_bytes="8MiB",
            )
        )
        assert "kv_cache_memory_bytes='8MiB'" in str(error), error
        del error
        gc.collect()


if __name__ == "__main__":
    main(program, out_of_memory, pause, one_pool, served)
