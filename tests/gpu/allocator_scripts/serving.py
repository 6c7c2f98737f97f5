"""An engine and PyTorch's tensors in one pool, under enable(): no split is chosen."""

from __future__ import annotations

from typing import Any

import torch

import vattn
from tests.gpu.allocator_scripts.begin import MIB, check, core, enabled, fill_up, main
from vattn import allocator

# 32 KiB of keys and values for each token in float32.
LAYERS, HEADS, HEAD_DIM = 4, 8, 128
TOKENS, NEW_TOKENS = 600, 16


def make_model() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=256,
        intermediate_size=256,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        head_dim=HEAD_DIM,
        max_position_embeddings=1024,
        bos_token_id=1,
        eos_token_id=None,
        pad_token_id=0,
    )
    model: Any = LlamaForCausalLM(config)
    return model.eval()


def make_engine(device: str, dtype: str, **options: Any) -> vattn.LLM:
    return vattn.LLM(
        make_model(),
        device=device,
        dtype=dtype,
        skip_tokenizer_init=True,
        max_model_len=1024,
        max_num_seqs=4,
        max_num_batched_tokens=256,
        swap_space=0,
        **options,
    )


def generate(llm: vattn.LLM) -> list[list[int]]:
    prompts: list[Any] = [
        {"prompt_token_ids": [3 + (i * 7 + k * 11) % 250 for i in range(TOKENS)]} for k in range(4)
    ]
    params = vattn.SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True)
    samples = [out.outputs[0] for out in llm.generate(prompts, params, use_tqdm=False)]
    assert not any(sample.error for sample in samples)
    llm.engine.check()
    return [list(sample.token_ids) for sample in samples]


def one_pool(device: str) -> None:
    """Tensors take the prefix cache's pages; then the engine grows again, with the same tokens."""
    budget = 1024 * MIB if device == "cuda" else 256 * MIB
    with enabled(device, budget):
        with make_engine(device, "float32") as llm:
            assert llm.engine.cache.pool.core is core().pool
            first = generate(llm)
            take_from(llm, budget, device)
            assert generate(llm) == first
            assert llm.engine.cache.stats().kept_bytes >= 8 * MIB, "the engine did not grow again"
        check(device)
        assert allocator.stats(0).budget_bytes == budget


def one_pool_with_graphs(device: str) -> None:
    """The same with decode steps that are CUDA graphs, in bf16, whose tokens may differ."""
    budget = 1024 * MIB
    with enabled(device, budget):
        with make_engine(device, "bfloat16", cudagraph_capture_sizes=[1, 2, 4]) as llm:
            for _ in range(3):
                assert [len(tokens) for tokens in generate(llm)] == [NEW_TOKENS] * 4
                take_from(llm, budget, device)
            assert llm.stats().steps_by_graph > 0
        check(device)


def take_from(llm: vattn.LLM, budget: int, device: str) -> None:
    """Tensors take all there is, the prefix cache's memory too, and give it back."""
    kept = llm.engine.cache.stats().kept_bytes
    assert kept >= 8 * MIB, f"only {kept} bytes are kept as prefix cache"
    held = fill_up(8 * MIB, device)
    left = llm.engine.cache.stats().kept_bytes
    assert left < kept // 2, f"tensors found no memory, and {left} bytes are kept"
    taken = sum(tensor.nbytes for tensor in held)
    assert taken >= budget // 2, f"only {taken} bytes of {budget}"


def swaps_with_pause(device: str) -> None:
    """A paused model leaves its memory to the other tenant of the pool."""
    budget = 512 * MIB if device == "cuda" else 128 * MIB
    with enabled(device, budget):
        with allocator.pool("model"):
            weights = torch.full((budget // 2,), 5, dtype=torch.uint8, device=device)
        cache = vattn.KVCache(
            LAYERS,
            kv_heads=HEADS,
            head_dim=HEAD_DIM,
            dtype=torch.bfloat16,
            max_seqs=1,
            max_tokens=budget * 3 // 4 // (16 << 10),
            device=device,
            order="token",
        )
        with cache:
            slot = cache.open()
            tokens = cache.max_tokens
            try:
                cache.ensure(slot, tokens)
                raise AssertionError("the weights are in half of the memory")
            except vattn.OutOfPages:
                pass
            allocator.pause("model")
            cache.ensure(slot, tokens)
            cache.release(slot)
            allocator.resume("model")
            assert bool((weights[::4096] == 5).all())
            del weights


if __name__ == "__main__":
    main(one_pool, one_pool_with_graphs, swaps_with_pause)
