"""One launch that writes the new K and V of a step into their slots.

What PyTorch has, ``index_put_``, takes a launch for K and another for V, per layer and step. This
module needs ``triton`` and is imported only where it will run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# Elements of K that one program copies, and as many of V: 4 KiB in half precision.
_BLOCK = 2048
# Elements of one thread: 16 bytes in half precision.
_EACH = 8


# Strides and alignments change from step to step and would each time compile another kernel.
@triton.jit(  # type: ignore[untyped-decorator]
    do_not_specialize=[
        "key_token",
        "key_head",
        "value_token",
        "value_head",
        "slot_stride",
        "token_stride",
        "head_stride",
    ],
    do_not_specialize_on_alignment=["slots", "positions"],
)
def append_kernel(  # type: ignore[no-untyped-def]
    key,
    value,
    k,
    v,
    slots,
    positions,
    key_token,
    key_head,
    value_token,
    value_head,
    slot_stride,
    token_stride,
    head_stride,
    heads: tl.constexpr,
    head_dim: tl.constexpr,
    block_heads: tl.constexpr,
    block_dim: tl.constexpr,
    unit: tl.constexpr,
):
    """Copies some heads of one token's K and V. Grid: tokens, blocks of heads.

    All strides are in units of so many elements, which tells the compiler how they are aligned.
    """
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token).to(tl.int64)
    position = tl.load(positions + token).to(tl.int64)
    head = tl.program_id(1) * block_heads + tl.arange(0, block_heads)[:, None]
    at = tl.arange(0, block_dim)[None, :]
    inside = (head < heads) & (at < head_dim)
    head = head.to(tl.int64)
    # A slot may be 2^31 elements long.
    target = (slot * slot_stride + position * token_stride + head * head_stride) * unit + at
    from_key = (token * key_token + head * key_head) * unit + at
    from_value = (token * value_token + head * value_head) * unit + at
    new_key = tl.load(key + from_key, mask=inside)
    new_value = tl.load(value + from_value, mask=inside)
    tl.store(k + target, new_key, mask=inside)
    tl.store(v + target, new_value, mask=inside)


def blocks(heads: int, head_dim: int) -> tuple[int, int, int]:
    """How the heads of a token are divided: heads and elements of one program, and its warps."""
    block_dim = triton.next_power_of_2(head_dim)
    block_heads = min(triton.next_power_of_2(heads), max(1, _BLOCK // block_dim))
    return block_heads, block_dim, max(1, min(8, block_heads * block_dim // (32 * _EACH)))


def append_kv(
    key: torch.Tensor,
    value: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    slots: torch.Tensor,
    positions: torch.Tensor,
) -> None:
    """Writes T tokens' K and V to the slots, on the current stream.

    May be captured in a CUDA graph once it has run with the same types and sizes. Where several
    tokens go to one place, one of them is there in the end.

    Args:
        key: ``[T, kv_heads, head_dim]``, with any strides.
        value: the same of V.
        k: ``[slots, tokens, kv_heads, head_dim]``, of the same dtype; the last stride is 1.
        v: like ``k``, with the same strides.
        slots: int32 or int64 ``[T]``, contiguous: where each token goes.
        positions: the same of its place in the slot.

    Raises:
        ValueError: dtypes or shapes differ.
    """
    tokens, heads, head_dim = key.shape
    if key.dtype != k.dtype or value.dtype != v.dtype:
        raise ValueError(
            f"K and V are {key.dtype} and {value.dtype}, and the cache holds {k.dtype}; "
            "give the cache the model's dtype"
        )
    if value.shape != key.shape or (heads, head_dim) != k.shape[2:]:
        raise ValueError(
            f"K and V of shapes {tuple(key.shape)} and {tuple(value.shape)} do not fit a cache of "
            f"{k.shape[2]} heads of {k.shape[3]}"
        )
    if tokens == 0:
        return
    if key.stride(2) != 1:
        key = key.contiguous()
    if value.stride(2) != 1:
        value = value.contiguous()
    if k.dtype.itemsize == 1:
        # Bits are copied, and not every GPU knows every 8-bit type.
        key, value, k, v = (x.view(torch.uint8) for x in (key, value, k, v))
    strides = (*key.stride()[:2], *value.stride()[:2], *k.stride()[:3])
    unit = _EACH if all(stride % _EACH == 0 for stride in strides) else 1
    block_heads, block_dim, warps = blocks(heads, head_dim)
    append_kernel[tokens, triton.cdiv(heads, block_heads)](
        key,
        value,
        k,
        v,
        slots,
        positions,
        *(stride // unit for stride in strides),
        heads,
        head_dim,
        block_heads,
        block_dim,
        unit,
        num_warps=warps,
        enable_fp_fusion=True,
    )
