"""The fused append against ``index_put_`` on slots of a real cache, on any device.

Run as a program with ``TRITON_INTERPRET=1`` it goes through all cases on a CPU, where a touch of
what is not mapped ends the process.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

import vattn
from vattn.kv.layout import Order

SLOT_LENGTHS = {5: 40, 0: 1, 2: 33}  # slot: tokens, in no order; others stay unmapped


@dataclass(frozen=True)
class Case:
    """``form`` is how the new K and V lie: see :func:`new_rows`."""

    order: Order
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    form: str = "own"
    index: torch.dtype = torch.int64

    def __str__(self) -> str:
        parts = (self.order, self.kv_heads, self.head_dim, self.dtype, self.form, self.index)
        return "-".join(str(part).removeprefix("torch.") for part in parts)


SHAPES = ((1, 8), (2, 128), (3, 24), (8, 64), (40, 80), (5, 256))
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn)
FORMS = ("own", "packed", "transposed", "spread", "shifted")


def cases() -> Iterator[Case]:
    for order in ("token", "head"):
        for heads, dim in SHAPES:
            yield Case(order, heads, dim, torch.bfloat16)
        for dtype, index in itertools.product(DTYPES, (torch.int32, torch.int64)):
            yield Case(order, 3, 48, dtype, "packed", index)
        for form in FORMS:
            yield Case(order, 2, 64, torch.float16, form, torch.int32)


def random(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.randn(*shape).to(dtype).to(device)


def new_rows(case: Case, tokens: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V ``[tokens, kv_heads, head_dim]``: tensors of their own, or parts of others."""
    heads, dim = case.kv_heads, case.head_dim
    if case.form == "packed":  # as a model's joint projection leaves them
        packed = random((tokens, 4 * heads, dim), case.dtype, device)
        return packed[:, 2 * heads : 3 * heads], packed[:, 3 * heads :]
    if case.form == "transposed":  # as after a rotation in transformers
        key, value = (random((heads, tokens, dim), case.dtype, device) for _ in range(2))
        return key.transpose(0, 1), value.transpose(0, 1)
    if case.form == "spread":  # elements apart: copied first
        key, value = (random((tokens, heads, 2 * dim), case.dtype, device) for _ in range(2))
        return key[..., ::2], value[..., 1::2]
    if case.form == "shifted":  # strides and addresses that nothing divides
        key, value = (random((tokens, heads, dim + 3), case.dtype, device) for _ in range(2))
        return key[..., 1:-2], value[..., 3:]
    key, value = (random((tokens, heads, dim), case.dtype, device) for _ in range(2))
    return key, value


def check(case: Case, device: torch.device) -> None:
    """Writes a chunk, decodes, and padding that all goes to one place; compares with before."""
    from vattn.attention.append import index_put
    from vattn.attention.triton_append import append_kv

    spec = vattn.LayerSpec(case.kv_heads, case.head_dim, case.dtype)
    caches = [
        vattn.KVCache(
            [spec] * 3,
            max_seqs=6,
            max_tokens=64,
            device=device,
            order=case.order,
            strict=device.type == "cpu",
        )
        for _ in range(2)
    ]
    for cache in caches:
        for slot, tokens in SLOT_LENGTHS.items():
            cache.open(slot=slot)
            cache.ensure(slot, tokens)
    places = [(5, at) for at in range(29, 40)] + [(2, 32), (0, 0)]
    slots, positions = torch.tensor(places, dtype=case.index, device=device).T.contiguous()
    for layer in (0, 2):
        key, value = new_rows(case, len(places), device)
        (k, v), (wanted_k, wanted_v) = (cache.layer(layer) for cache in caches)
        append_kv(key, value, k, v, slots, positions)
        index_put(key, value, wanted_k, wanted_v, slots, positions)
        # Padding rows of a step that is shorter than its bucket: one of them stays, whole.
        key, value = new_rows(case, 9, device)
        zeros = torch.zeros(9, dtype=case.index, device=device)
        append_kv(key, value, k, v, zeros, zeros)
        assert any(torch.equal(bits(k[0, 0]), bits(row)) for row in key), case
        assert any(torch.equal(bits(v[0, 0]), bits(row)) for row in value), case
        for own, wanted in ((k, wanted_k), (v, wanted_v)):
            for slot, tokens in SLOT_LENGTHS.items():
                if slot != 0:
                    same = torch.equal(bits(own[slot, :tokens]), bits(wanted[slot, :tokens]))
                    assert same, (case, layer, slot)
        append_kv(key[:0], value[:0], k, v, zeros[:0], zeros[:0])
    for cache in caches:
        for slot in SLOT_LENGTHS:
            cache.release(slot)
        cache.check()
        cache.close()


def check_far_slots(device: torch.device) -> None:
    """Slots more than 2^31 elements apart: offsets have to be 64 bits wide."""
    from vattn.attention.triton_append import append_kv

    spec = vattn.LayerSpec(8, 128, torch.bfloat16)
    with vattn.KVCache(
        [spec] * 32,
        max_seqs=4,
        max_tokens=40_000,
        device=device,
        order="token",
        layers_per_region=32,
        page_bytes=2 << 20,
        strict=device.type == "cpu",
    ) as cache:
        slot = cache.open(slot=3)
        cache.ensure(slot, 5)
        k, v = cache.layer(31)
        assert k.stride(0) > 2**31
        key, value = (random((1, 8, 128), torch.bfloat16, device) for _ in range(2))
        at = torch.tensor([3, 4], dtype=torch.int32, device=device)
        append_kv(key, value, k, v, at[:1], at[1:])
        assert torch.equal(k[3, 4], key[0])
        assert torch.equal(v[3, 4], value[0])
        cache.release(slot)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


if __name__ == "__main__":
    torch.manual_seed(0)
    for each in cases():
        check(each, torch.device("cpu"))
        print(each, flush=True)
    check_far_slots(torch.device("cpu"))
    print("far-slots", flush=True)
