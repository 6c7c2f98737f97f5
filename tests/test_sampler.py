"""Sampling against slow references: exact sets, exact distributions, seeds, bad rows, log probs."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vattn.engine.draw import derive_seed, pick, stream_keys, uniforms
from vattn.engine.filters import Filters
from vattn.engine.sampler import LogitsProcessor, Sampler
from vattn.request import Request
from vattn.sampling_params import SamplingParams

DRAWS = 20_000
EMPTY = -math.inf
# Sums of squares beyond this have a probability of about 1e-6 under the right distribution; the
# seeds are fixed, so a test fails always or never.
SIGMAS = 4.75


def request(
    tokens: int = 0, *, seed: int = 0, stop: tuple[int, ...] = (), **params: Any
) -> Request:
    """A request with so many output tokens."""
    made = Request("r", [1, 2], SamplingParams(**params), 100_000, seed=seed)
    made.stop_ids = frozenset(stop)
    made.tokens += [3] * tokens
    return made


def logits_of(*rows: list[float]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float32)


def draw(logits: torch.Tensor, requests: list[Request]) -> list[int]:
    sampled = Sampler(logits.shape[1], "cpu").sample(logits.clone(), requests)
    return sampled.to_host().token_ids


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
        tokens = sampler.sample(logits_of(ROW).repeat(rows, 1), requests).to_host().token_ids
        counts += np.bincount(tokens, minlength=len(ROW))
        for each, token in zip(requests, tokens, strict=True):
            each.tokens.append(token)
    assert counts.sum() == DRAWS
    assert_distribution(counts, reference(np.array(ROW, np.float32), params))


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


# Picking ------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 700),
    st.floats(0, 1 - 2**-53),
    st.integers(0, 2**32 - 1),
    st.sampled_from([0.0, 0.5, 0.97, 1.0]),
)
def test_what_weighs_nothing_is_never_picked(
    vocabulary: int, uniform: float, seed: int, empty: float
) -> None:
    rng = np.random.default_rng(seed)
    weights = rng.random((3, vocabulary), np.float32) * 10.0 ** rng.integers(-30, 8)
    weights[rng.random(weights.shape) < empty] = 0
    weights[:, rng.integers(vocabulary)] = 1e-20
    given_ = torch.from_numpy(weights.astype(np.float32))
    for u in (uniform, 0.0, 1 - 2**-53):
        tokens, total = pick(given_, torch.full((3,), u, dtype=torch.float64))
        assert (given_.gather(1, tokens[:, None]) > 0).all()
        assert (total > 0).all()
        ends = given_.double().cumsum(1)
        slack = 1e-5 * ends[:, -1]
        at = ends.gather(1, tokens[:, None])[:, 0]
        weight = given_.double().gather(1, tokens[:, None])[:, 0]
        assert (at >= u * ends[:, -1] - slack).all()
        assert (at - weight <= u * ends[:, -1] + slack).all()


def test_rows_without_a_distribution_give_a_token_all_the_same() -> None:
    weights = torch.zeros(4, 300)
    weights[1] = math.nan
    weights[2, 299] = math.inf
    weights[3, 299] = 1
    tokens, total = pick(weights, torch.full((4,), 0.7, dtype=torch.float64))
    assert ((tokens >= 0) & (tokens < 300)).all()
    assert tokens[3] == 299
    assert (total.isfinite() & (total > 0)).tolist() == [False, False, False, True]


def test_small_differences_of_logits_change_no_token() -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(200, 2000, generator=generator) * 3
    noise = torch.randn(200, 2000, generator=generator) * 1e-6
    requests = [request(seed=i, top_p=0.9) for i in range(200)]
    assert draw(logits, requests) == draw(logits + noise, requests)


# Filters ------------------------------------------------------------------------------------------

some_params = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.3, 1.0, 1.9]),
    top_k=st.sampled_from([0, -1, 1, 2, 3, 7, 40, 1000]),
    top_p=st.sampled_from([1.0, 0.999, 0.9, 0.5, 0.1, 1e-6]),
    min_p=st.sampled_from([0.0, 0.01, 0.21, 0.77, 1.0]),
)


@settings(max_examples=150, deadline=None)
@given(st.lists(some_params, min_size=1, max_size=6), st.integers(1, 60), st.integers(0, 2**32 - 1))
def test_filters_keep_exactly_what_the_reference_keeps(
    params: list[SamplingParams], vocabulary: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    # Irregular steps so that no sum meets a limit by chance; some tokens tie, some are excluded.
    values = rng.standard_normal((len(params), vocabulary)).astype(np.float32) * 2
    ties = rng.integers(vocabulary, size=vocabulary // 3)
    values[:, ties] = values[:, rng.integers(vocabulary)][:, None]
    values[:, rng.integers(vocabulary, size=vocabulary // 4)] = EMPTY
    values[:, rng.integers(vocabulary)] = 1.0
    temperatures = torch.tensor([p.temperature for p in params])[:, None]
    scaled = torch.from_numpy(values) / temperatures
    lowest = Filters(params, vocabulary, torch.device("cpu")).lowest(scaled, scaled.softmax(1))
    for i, each in enumerate(params):
        alone = SamplingParams(
            temperature=1.0, top_k=each.top_k, top_p=each.top_p, min_p=each.min_p
        )
        wanted = reference(scaled[i].numpy(), alone) > 0
        if alone.greedy:
            wanted = scaled[i].numpy() == scaled[i].numpy().max()
        kept = ((scaled[i] >= lowest[i]) & (scaled[i] > EMPTY)).numpy()
        assert kept.tolist() == (wanted & np.isfinite(values[i])).tolist(), each


@pytest.mark.parametrize("top_k", [0, 1500])
def test_top_p_looks_further_where_many_tokens_are_needed(top_k: int) -> None:
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(5, 5000, generator=generator) * torch.tensor(
        [[0.0], [0.1], [1.0], [3.0], [9.0]]
    )
    params = [SamplingParams(top_p=0.95, top_k=top_k)] * 5
    lowest = Filters(params, 5000, torch.device("cpu")).lowest(logits, logits.softmax(1))
    for i in range(5):
        kept = int((logits[i] >= lowest[i]).sum())
        wanted = int((reference(logits[i].numpy(), params[i]) > 0).sum())
        assert abs(kept - wanted) <= 1, i  # sums of thousands differ in the last bits
    assert int((logits[0] >= lowest[0]).sum()) == 5000  # all tie


def test_greedy_takes_the_first_of_equals() -> None:
    logits = logits_of([1, 5, 5, 0], [7, 7, 7, 7])
    for params in ({"temperature": 0}, {"top_k": 1}, {"temperature": 1e-6}):
        assert draw(logits, [request(**params), request(**params)]) == [1, 0], params


# Seeds and batches --------------------------------------------------------------------------------

KINDS: list[dict[str, Any]] = [{"temperature": 0.0}, *TRANSFORMS.values(), {"logprobs": 2}]


@settings(max_examples=40, deadline=None)
@given(st.permutations(range(24)), st.integers(1, 24))
def test_a_row_depends_on_nothing_else_in_the_batch(order: list[int], count: int) -> None:
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(24, 300, generator=generator) * 2
    requests = [request(i % 5, seed=i, **KINDS[i % len(KINDS)]) for i in range(24)]
    alone = [draw(logits[i : i + 1], [requests[i]])[0] for i in range(24)]
    some = order[:count]
    assert draw(logits[some], [requests[i] for i in some]) == [alone[i] for i in some]


def test_one_sampler_follows_rows_that_come_and_go() -> None:
    generator = torch.Generator().manual_seed(6)
    requests = [request(seed=i, **KINDS[i % len(KINDS)]) for i in range(30)]
    sampler = Sampler(120, "cpu")
    for step in range(40):
        rows = requests[step % 7 : 20 + step % 11] if step % 3 else requests[:20]
        logits = torch.randn(len(rows), 120, generator=generator)
        wanted = [draw(logits[i : i + 1], [rows[i]])[0] for i in range(len(rows))]
        tokens = sampler.sample(logits, rows).to_host().token_ids
        assert tokens == wanted, step
        for each, token in zip(rows, tokens, strict=True):
            each.tokens.append(token)


def test_other_seeds_and_positions_give_other_tokens() -> None:
    logits = torch.zeros(1, 1000)
    tokens = {
        draw(logits, [request(position, seed=s)])[0] for s in range(8) for position in range(8)
    }
    assert len(tokens) > 55
    assert draw(logits, [request(3, seed=9)]) == draw(logits, [request(3, seed=9)])


def test_what_is_drawn_does_not_depend_on_the_length_of_the_prompt() -> None:
    logits, long = torch.zeros(1, 1000), request(seed=9)
    long.prompt_ids = [1] * 50
    long.tokens = [1] * 50
    assert draw(logits, [long]) == draw(logits, [request(seed=9)])


# Bad rows -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("wrong", [math.nan, math.inf, "empty"])
def test_a_bad_row_fails_alone(name: str, wrong: float | str) -> None:
    logits = logits_of(ROW).repeat(4, 1)
    if isinstance(wrong, str):
        logits[2] = EMPTY
    else:
        logits[2, 5] = wrong
    requests = [request(seed=i, logprobs=1 if i else None, **TRANSFORMS[name]) for i in range(4)]
    sampled = Sampler(len(ROW), "cpu").sample(logits.clone(), requests)
    host = sampled.to_host()
    assert host.bad_rows() == [2]
    assert host.token_ids[2] == -1
    assert 0 <= int(sampled.token_ids[2]) < len(ROW)  # it may be fed to the next step
    for i in (0, 1, 3):
        assert host.token_ids[i] == draw(logits[i : i + 1], [requests[i]])[0]


def test_logits_of_another_shape() -> None:
    sampler = Sampler(8, "cpu")
    for shape in ((1, 9), (2, 8), (8,)):
        with pytest.raises(ValueError, match="vocabulary of 8"):
            sampler.sample(torch.zeros(shape), [request()])


def test_no_rows() -> None:
    host = Sampler(8, "cpu").sample(torch.zeros(0, 8), []).to_host()
    assert (host.token_ids, host.bad_rows()) == ([], [])


def test_half_precision() -> None:
    logits = torch.randn(3, 64, generator=torch.Generator().manual_seed(2)).bfloat16()
    requests = [request(seed=1), request(temperature=0), request(seed=3, top_k=3)]
    assert draw(logits, requests) == draw(logits.float(), requests)


# Processors ---------------------------------------------------------------------------------------


def test_min_tokens_masks_what_would_end_it() -> None:
    row = [9.0, 8.0, 1.0, 0.0]
    early = request(2, stop=(0, 1, 77), min_tokens=3, max_tokens=9, temperature=0)
    late = request(3, stop=(0, 1), min_tokens=3, max_tokens=9, temperature=0)
    free = request(0, stop=(0,), temperature=0)
    drawn = request(0, stop=(0, 1), min_tokens=1, seed=4)
    sampler = Sampler(4, "cpu")
    rows = [early, late, free, drawn]
    first = sampler.sample(logits_of(row, row, row, row), rows).to_host().token_ids
    assert first[:3] == [2, 0, 0]
    assert first[3] in (2, 3)
    for each in rows:
        each.tokens.append(3)
    second = sampler.sample(logits_of(row, row, row, row), rows).to_host().token_ids
    assert second[:3] == [0, 0, 0]


def test_min_tokens_ends_for_each_row_in_its_time() -> None:
    options: dict[str, Any] = {"stop": (0,), "max_tokens": 9, "temperature": 0}
    rows = [request(min_tokens=n, **options) for n in (3, 1, 2)]
    sampler, seen = Sampler(2, "cpu"), []
    for _ in range(4):
        seen.append(sampler.sample(logits_of(*[[5.0, 1.0]] * 3), rows).to_host().token_ids)
        for each in rows:
            each.tokens.append(1)
    assert seen == [[1, 1, 1], [1, 0, 1], [1, 0, 0], [0, 0, 0]]


def test_min_tokens_with_nothing_else_to_say_is_bad() -> None:
    stuck = request(stop=(0, 1), min_tokens=1)
    assert Sampler(2, "cpu").sample(torch.zeros(1, 2), [stuck]).to_host().bad_rows() == [0]


def test_processors_change_logits_but_not_logprobs() -> None:
    class Favour:
        """Adds to the logit of a request's index."""

        def update(self, requests: Any) -> bool:
            return any(each.index for each in requests)

        def apply(self, logits: torch.Tensor, requests: Any) -> None:
            at = torch.tensor([each.index for each in requests])[:, None]
            logits.scatter_(1, at, 50.0)

    favour: LogitsProcessor = Favour()
    sampler = Sampler(6, "cpu", [favour])
    rows = [request(temperature=0, logprobs=0), request(seed=3, logprobs=0)]
    assert sampler.sample(logits_of(ROW[:6], ROW[:6]), rows).to_host().token_ids[0] == 3
    again = [request(temperature=0, logprobs=0), request(seed=3, logprobs=0)]
    again[0].index, again[1].index = 1, 4
    host = sampler.sample(logits_of(ROW[:6], ROW[:6]), again).to_host()
    assert host.token_ids == [1, 4]
    entry = host.entry(0, 1)
    assert entry is not None
    assert entry[1].logprob == pytest.approx(float(logits_of(ROW[:6]).log_softmax(1)[0, 1]))


# Log probabilities --------------------------------------------------------------------------------


def test_logprobs_are_of_the_raw_logits() -> None:
    generator = torch.Generator().manual_seed(8)
    logits = torch.randn(6, 500, generator=generator) * 2
    wanted = logits.double().log_softmax(1)
    rows = [
        request(seed=1, temperature=3.0, logprobs=4),
        request(seed=2),
        request(temperature=0, logprobs=0),
        request(seed=4, top_k=5, logprobs=700),
        request(seed=5, temperature=2.0, top_p=0.9, logprobs=1),
        request(temperature=0),
    ]
    host = Sampler(500, "cpu").sample(logits.clone(), rows).to_host()
    for i, each in enumerate(rows):
        token = host.token_ids[i]
        entry = host.entry(i, token)
        asked = each.params.logprobs
        if asked is None:
            assert entry is None
            continue
        assert entry is not None
        assert next(iter(entry)) == token
        best = wanted[i].topk(min(asked, 500)).indices.tolist()
        assert set(entry) == {token, *best}
        for other, value in entry.items():
            assert value.logprob == pytest.approx(float(wanted[i, other]), abs=1e-5)
            assert value.rank == int((logits[i] > logits[i, other]).sum()) + 1


def test_no_logprobs_no_entries() -> None:
    host = Sampler(4, "cpu").sample(torch.zeros(1, 4), [request()]).to_host()
    assert host.logprobs is None
    assert host.entry(0, host.token_ids[0]) is None
