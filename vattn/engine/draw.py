"""Random numbers that depend on nothing but a seed and a position, and drawing tokens with them.

A token is drawn by inverting the cumulative distribution in the order of the vocabulary. With the
same uniform number, logits that differ in their last bits, as those of batches of different shapes
do, give the same token almost always; noise per token (Gumbel) or an order by probability would
not.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

Uint64 = npt.NDArray[np.uint64]

# SplitMix64: G. Steele, D. Lea, C. Flood, "Fast splittable pseudorandom number generators",
# OOPSLA 2014. State k of a stream is its key plus k times the golden ratio; the output is a mix.
_GAMMA = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB
_MASK = 2**64 - 1

_BLOCK = 128  # tokens that are summed in single precision before the sums are added in double


def derive_seed(seed: int, index: int) -> int:
    """The seed of sample ``index`` of a request; sample 0 has the request's own.

    Returns:
        At least 0 and below 2**63, as the seeds that users give.
    """
    if index == 0:
        return seed
    mixed = _mix_one(_mix_one(seed & _MASK) ^ _MIX_1)
    return _mix_one((mixed + index * _GAMMA) & _MASK) >> 1


def stream_keys(seeds: list[int]) -> Uint64:
    """uint64 ``[R]``: where the stream of each seed begins; neighbouring seeds lie far apart."""
    return _mix(np.array(seeds, np.uint64) + np.uint64(_GAMMA))


def uniforms(keys: Uint64, positions: npt.NDArray[np.integer]) -> npt.NDArray[np.float64]:
    """Number ``positions[i]`` of each stream, as float64 ``[R]`` in [0, 1) with 53 random bits."""
    z = positions.astype(np.uint64)
    z += np.uint64(1)
    z *= np.uint64(_GAMMA)
    z += keys
    return (_mix(z) >> np.uint64(11)).astype(np.float64) * np.float64(2.0**-53)


def pick(weights: torch.Tensor, uniform: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Draws one token per row; never one whose weight is zero.

    Args:
        weights: float32 ``[R, V]``, at least 0; they need not sum to 1.
        uniform: float64 ``[R]`` in [0, 1).

    Returns:
        int64 ``[R]`` tokens, within the vocabulary whatever the weights, and float64 ``[R]`` sums
        of the weights: not finite or 0 if the row has no distribution.
    """
    vocabulary = weights.shape[1]
    size = min(_BLOCK, vocabulary)
    whole = vocabulary - vocabulary % size
    sums = weights[:, :whole].view(len(weights), whole // size, size).sum(-1)
    if whole < vocabulary:
        sums = torch.cat([sums, weights[:, whole:].sum(-1, keepdim=True)], 1)
    ends = sums.to(torch.float64).cumsum(1)
    total = ends[:, -1:]
    # The first block that ends beyond the target: it adds something, so its sum is not zero.
    target = _below(uniform.unsqueeze(1) * total, total)
    block = (ends <= target).sum(1, keepdim=True).clamp_max_(ends.shape[1] - 1)
    before = ends.gather(1, (block - 1).clamp_min_(0)).mul_(block > 0)
    # The same within the block. Positions past the vocabulary weigh nothing.
    at = block * size + torch.arange(size, device=weights.device)
    inner = weights.gather(1, at.clamp_max(vocabulary - 1)).to(torch.float64)
    inner_ends = inner.mul_(at < vocabulary).cumsum_(1)
    target = _below(target - before, inner_ends[:, -1:])
    token = (block * size).add_((inner_ends <= target).sum(1, keepdim=True))
    return token.clamp_(0, vocabulary - 1).squeeze(1), total.squeeze(1)


def _below(value: torch.Tensor, limit: torch.Tensor) -> torch.Tensor:
    """At most the number before ``limit``: rounding may have brought it there."""
    return torch.minimum(value, torch.nextafter(limit, torch.zeros_like(limit)))


def _mix(z: Uint64) -> Uint64:
    """SplitMix64's output function, in place."""
    z ^= z >> np.uint64(30)
    z *= np.uint64(_MIX_1)
    z ^= z >> np.uint64(27)
    z *= np.uint64(_MIX_2)
    z ^= z >> np.uint64(31)
    return z


def _mix_one(z: int) -> int:
    z = ((z ^ (z >> 30)) * _MIX_1) & _MASK
    z = ((z ^ (z >> 27)) * _MIX_2) & _MASK
    return z ^ (z >> 31)
