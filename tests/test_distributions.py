"""What samplers draw, against exact distributions: chi-square with fixed seeds, set by set."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from vattn.attention.upload import Uploader
from vattn.engine.draw import derive_seed, stream_keys, uniforms
from vattn.engine.filters import Filters
from vattn.engine.sampler import Sampler
from vattn.request import Request
from vattn.sampling_params import SamplingParams

DRAWS = 20_000
EMPTY = -math.inf
# Sums of squares beyond this have a probability of about 1e-6 under the right distribution; the
# seeds are fixed, so a test fails always or never.
SIGMAS = 4.75


# References ---------------------------------------------------------------------------------------


def reference(row: np.ndarray[Any, Any], params: SamplingParams) -> np.ndarray[Any, Any]:
    """The distribution of a row, one token after another, in double precision."""
    logits = row.astype(np.float64)
    if params.greedy:
        return np.where(np.arange(len(row)) == np.argmax(row), 1.0, 0.0)
    weights = np.exp((logits - logits.max()) / params.temperature)
    kept = [i for i in range(len(row)) if weights[i] >= params.min_p * weights.max()]
    kept.sort(key=lambda i: (-row[i], i))
    if params.top_k > 0:
        last = row[kept[min(params.top_k, len(kept)) - 1]]
        kept = [i for i in kept if row[i] >= last]
    if params.top_p < 1:
        total, before = sum(weights[i] for i in kept), 0.0
        for i in kept:
            last = row[i]
            before += weights[i]
            if before >= params.top_p * total:
                break
        kept = [i for i in kept if row[i] >= last]
    probs = np.zeros(len(row))
    probs[kept] = weights[kept] / weights[kept].sum()
    return probs


def assert_distribution(counts: np.ndarray[Any, Any], probs: np.ndarray[Any, Any]) -> None:
    """Pearson's chi-square, by Wilson and Hilferty's normal approximation."""
    assert not counts[probs == 0].any()
    expected = probs[probs > 0] * counts.sum()
    seen = counts[probs > 0]
    if len(expected) == 1:
        return
    assert expected.min() >= 5, "too few draws for the test"
    freedom = len(expected) - 1
    square = float(((seen - expected) ** 2 / expected).sum())
    z = ((square / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))
    assert abs(z) < SIGMAS, (z, counts, expected)


ROW = [1.5, -0.7, 0.2, 2.1, 0.2, -2.0, 1.1, 0.9, -0.1, EMPTY, 0.4, 1.3]
TRANSFORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "hot": {"temperature": 1.7},
    "cold": {"temperature": 0.6},
    "top_k": {"top_k": 4},
    "top_k_tie": {"top_k": 7},
    "top_p": {"top_p": 0.8},
    "min_p": {"min_p": 0.2},
    "both": {"temperature": 0.8, "top_k": 6, "top_p": 0.7},
    "all": {"temperature": 1.3, "min_p": 0.12, "top_k": 8, "top_p": 0.9},
    "greedy": {"temperature": 0.0},
}


# Distributions ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("along", ["seeds", "positions"])
def test_draws_follow_the_distribution(name: str, along: str) -> None:
    params = SamplingParams(**TRANSFORMS[name])
    rows = 400
    sampler = Sampler(len(ROW), "cpu")
    counts = np.zeros(len(ROW))
    requests = [Request(str(i), [1], params, 10**6, seed=i) for i in range(rows)]
    for step in range(DRAWS // rows):
        if along == "seeds":
            requests = [Request("r", [1], params, 10**6, seed=step * rows + i) for i in range(rows)]
        tokens = sampler.sample(torch.tensor([ROW]).repeat(rows, 1), requests).to_host().token_ids
        counts += np.bincount(tokens, minlength=len(ROW))
        for each, token in zip(requests, tokens, strict=True):
            each.tokens.append(token)
    assert counts.sum() == DRAWS
    assert_distribution(counts, reference(np.array(ROW, np.float32), params))


# What changes the logits before, as plain arithmetic on single tokens, and what it makes of ROW.
OUTPUT = [3, 7, 3, 0]
CHANGES: dict[str, tuple[dict[str, Any], dict[int, float]]] = {
    "repetition": (
        {"repetition_penalty": 1.5},
        {1: -0.7 * 1.5, 3: 2.1 / 1.5, 7: 0.9 / 1.5, 0: 1.5 / 1.5},
    ),
    "frequency": ({"frequency_penalty": 0.4}, {3: 2.1 - 0.8, 7: 0.9 - 0.4, 0: 1.5 - 0.4}),
    "presence": ({"presence_penalty": -0.5}, {3: 2.1 + 0.5, 7: 0.9 + 0.5, 0: 1.5 + 0.5}),
    "bias": ({"logit_bias": {5: 2.5, 9: 7.0, 0: -1.0}}, {5: 0.5, 0: 0.5}),
    "allowed": (
        {"allowed_token_ids": [0, 1, 2, 3, 4, 6, 9]},
        dict.fromkeys([5, 7, 8, 10, 11], EMPTY),
    ),
    "min_tokens": ({"min_tokens": 5}, {2: EMPTY, 6: EMPTY}),
    "all": (
        {
            "presence_penalty": 0.2,
            "frequency_penalty": 0.1,
            "repetition_penalty": 2.0,
            "logit_bias": {3: 1.9},
        },
        {1: -0.7 * 2, 3: 4.0 / 2 - 0.4, 7: 0.9 / 2 - 0.3, 0: 1.5 / 2 - 0.3},
    ),
}


@pytest.mark.parametrize(
    ("change", "name"),
    [(change, name) for change in CHANGES for name in ("plain", "all")]
    + [("all", name) for name in ("hot", "top_k", "top_p", "min_p")],
)
def test_draws_follow_the_distribution_after_processors(change: str, name: str) -> None:
    given, changed = CHANGES[change]
    params = SamplingParams(**given, **TRANSFORMS[name])
    rows, counts = 400, np.zeros(len(ROW))
    wanted = [changed.get(token, logit) for token, logit in enumerate(ROW)]
    sampler = Sampler(len(ROW), "cpu")
    for step in range(DRAWS // rows):
        requests = [Request("r", [1], params, 10**6, seed=step * rows + i) for i in range(rows)]
        for each in requests:
            each.tokens += OUTPUT
            each.stop_ids = frozenset([2, 6])
        tokens = sampler.sample(torch.tensor([ROW]).repeat(rows, 1), requests).to_host().token_ids
        counts += np.bincount(tokens, minlength=len(ROW))
    assert counts.sum() == DRAWS
    assert_distribution(counts, reference(np.array(wanted, np.float32), params))


def test_draws_at_drafts_are_those_of_the_steps_that_they_save() -> None:
    params = SamplingParams(temperature=1.2, top_k=30)
    logits = torch.randn(5, 200, generator=torch.Generator().manual_seed(4))
    one, other = (Request("r", [1, 2], params, 10**6, seed=seed) for seed in (8, 9))
    rows, offsets = [one, one, one, other, other], [0, 1, 2, 0, 1]
    sampler = Sampler(200, "cpu")
    together = sampler.sample(logits.clone(), rows, offsets).to_host().token_ids
    for i, (each, offset) in enumerate(zip(rows, offsets, strict=True)):
        later = Request("r", [1, 2], params, 10**6, seed=each.seed)
        later.tokens += [5] * offset
        (token,) = sampler.sample(logits[i : i + 1].clone(), [later]).to_host().token_ids
        assert token == together[i], i
    # The same rows with other drafts are another batch.
    again = sampler.sample(logits.clone(), rows, [0, 1, 2, 1, 0]).to_host().token_ids
    assert again[:3] == together[:3]
    flat = torch.zeros(2, 200)
    first = sampler.sample(flat.clone(), [one, one], [0, 1]).to_host().token_ids
    second = sampler.sample(flat.clone(), [one, one], [1, 0]).to_host().token_ids
    assert first == second[::-1] != second


@pytest.mark.parametrize(
    ("given", "warper"),
    [
        ({"top_k": 5}, TopKLogitsWarper(5)),
        ({"top_k": 200}, TopKLogitsWarper(200)),
        ({"top_p": 0.3}, TopPLogitsWarper(0.3)),
        ({"top_p": 0.95}, TopPLogitsWarper(0.95)),
        ({"min_p": 0.1}, MinPLogitsWarper(0.1)),
        ({"min_p": 0.7}, MinPLogitsWarper(0.7)),
    ],
    ids=["top_k", "large_top_k", "top_p", "large_top_p", "min_p", "large_min_p"],
)
@pytest.mark.parametrize("temperature", [0.4, 1.0, 2.5])
def test_filters_and_temperature_are_transformers(
    given: dict[str, Any], warper: Any, temperature: float
) -> None:
    logits = torch.randn(40, 3000, generator=torch.Generator().manual_seed(12)) * 2
    no_ids: Any = None
    scaled = TemperatureLogitsWarper(temperature)(no_ids, logits)
    wanted = warper(no_ids, scaled.clone())
    ours = logits * torch.tensor(1 / temperature)
    torch.testing.assert_close(ours, scaled)
    params = [SamplingParams(temperature=temperature, **given)] * 40
    lowest = Filters(params, 3000, Uploader("cpu")).lowest(scaled, scaled.softmax(1))
    assert torch.equal(torch.where(scaled >= lowest, scaled, EMPTY), wanted)


def test_a_wrong_distribution_is_noticed() -> None:
    counts = np.array([1000.0, 1000.0, 1000.0])
    with pytest.raises(AssertionError):
        assert_distribution(counts, np.array([0.4, 0.3, 0.3]))
    with pytest.raises(AssertionError):
        assert_distribution(counts, np.array([0.5, 0.5, 0.0]))


def test_uniforms_are_uniform_and_independent_of_their_neighbours() -> None:
    seeds, positions = np.meshgrid(np.arange(200), np.arange(200))
    keys = stream_keys(seeds.ravel().tolist())
    values = uniforms(keys, positions.ravel()).reshape(200, 200)
    assert 0 <= values.min() < 1e-3 < 1 - 1e-3 < values.max() < 1
    counts = np.histogram(values, bins=50, range=(0, 1))[0]
    assert_distribution(counts.astype(float), np.full(50, 1 / 50))
    for other in (np.roll(values, 1, 0), np.roll(values, 1, 1), values.T):
        off = ~np.eye(200, dtype=bool)
        assert abs(np.corrcoef(values[off], other[off])[0, 1]) < 0.03


def test_uniforms_are_splitmix64() -> None:
    # Vigna's splitmix64.c from state 1234567 gives 6457827717110365317 and 3203168211198807973.
    keys = np.array([1234567, 1234567], np.uint64)
    wanted = [6457827717110365317, 3203168211198807973]
    seen = uniforms(keys, np.array([0, 1]))
    assert (seen * 2**53).astype(np.uint64).tolist() == [value >> 11 for value in wanted]


def test_derived_seeds() -> None:
    seeds = [derive_seed(seed, i) for seed in (0, 1, 7, 2**63 - 1) for i in range(500)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert derive_seed(7, 0) == 7
    assert derive_seed(7, 3) == derive_seed(7, 3)
