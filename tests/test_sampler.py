"""Sampling against slow references: exact sets, seeds, batches, bad rows, log probabilities."""

from __future__ import annotations

import gc
import math
import sys
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.test_distributions import EMPTY, ROW, TRANSFORMS, reference
from vattn.attention.upload import Ring, Uploader
from vattn.engine import filters
from vattn.engine.draw import pick
from vattn.engine.filters import Filters
from vattn.engine.sampler import LogitsProcessor, Sampler
from vattn.request import Request, Status
from vattn.sampling_params import SamplingParams


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
    lowest = Filters(params, vocabulary, Uploader("cpu")).lowest(scaled, scaled.softmax(1))
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
    lowest = Filters(params, 5000, Uploader("cpu")).lowest(logits, logits.softmax(1))
    for i in range(5):
        kept = int((logits[i] >= lowest[i]).sum())
        wanted = int((reference(logits[i].numpy(), params[i]) > 0).sum())
        assert abs(kept - wanted) <= 1, i  # sums of thousands differ in the last bits
    assert int((logits[0] >= lowest[0]).sum()) == 5000  # all tie


@pytest.mark.parametrize("vocabulary", [10, 3000])
def test_a_search_of_all_tokens_finds_the_same(vocabulary: int) -> None:
    """As on a GPU, which may not look how many have to be looked at; many logits are equal."""
    generator = torch.Generator().manual_seed(vocabulary)
    logits = torch.randn(40, vocabulary, generator=generator).mul(2).round(decimals=1)
    probs, lowest = logits.softmax(1), torch.full((40, 1), -math.inf)
    lowest[::2] = logits[::2].topk(4, 1).values[:, -1:]
    left = probs.double().mul(logits >= lowest).sum(1, keepdim=True)
    for part in (0.01, 0.5, 0.999):
        given = logits, lowest, probs, left * part
        assert torch.equal(filters._search_all(*given), filters._search(*given)), part


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


@pytest.mark.parametrize("temperature", [1e37, 1e38, 1e39, 1e46, 1e308])
@pytest.mark.parametrize("alone", [True, False])
def test_a_temperature_beyond_single_precision_leaves_what_is_ruled_out(
    temperature: float, alone: bool
) -> None:
    rows = [
        request(seed=i, temperature=temperature, allowed_token_ids=[1, 3])
        for i in range(20 if alone else 1)
    ]
    rows += [] if alone else [request(temperature=0) for _ in range(3)]
    sampler = Sampler(5, "cpu")
    host = sampler.sample(logits_of(*([ROW[:5]] * len(rows))), rows).to_host()
    assert host.bad_rows() == []
    drawn = {host.token_ids[i] for i, row in enumerate(rows) if row.params.temperature}
    assert drawn <= {1, 3}
    assert not alone or drawn == {1, 3}
    assert float(sampler._batch.scale.min()) >= torch.finfo(torch.float32).tiny


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


# Transfers ----------------------------------------------------------------------------------------


def test_no_uploader_has_to_wait_for_the_step_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has eight buffers, and two steps are under way: four transfers a step are no wait."""
    made: list[Any] = []

    class Counting(Uploader):
        def __init__(self, device: Any) -> None:
            super().__init__(device)
            self.calls = 0
            made.append(self)

        def __call__(self, *arrays: Any) -> list[torch.Tensor]:
            self.calls += 1
            return super().__call__(*arrays)

    monkeypatch.setattr("vattn.engine.sampler.Uploader", Counting)
    sampler = Sampler(2000, "cpu")
    everything: dict[str, Any] = {"min_tokens": 3, "max_tokens": None, "frequency_penalty": 0.5}
    rows = [
        request(temperature=0, logprobs=2, allowed_token_ids=[3, 4], **everything),
        request(logprobs=100, allowed_token_ids=range(1, 2000), **everything),
        request(logprobs=-1, logit_bias={3: 1.0}, top_p=0.4, stop=(3,), **everything),
        request(top_k=4, top_p=0.4, **everything),
        request(top_k=4, min_p=0.1, temperature=0.3),
    ]
    rows[3].bad_words_ids = ((3,), (3, 4))
    logits = torch.randn(5, 2000, generator=torch.Generator().manual_seed(1))
    for step in range(3):
        some = rows[: 5 - step % 2]
        sampled = sampler.sample(logits[: len(some)].clone(), some)
        scores = sampler.score(logits.clone(), [1, 2, 3, 4, 5], [0, 50, -1, 2, 2])
        host = sampled.with_scored(scores).to_host()
        assert len(made) == 9
        assert max(each.calls for each in made) <= 4, step
        assert all(each.calls for each in made)
        for each in made:
            each.calls = 0
        for each, token in zip(some, host.token_ids, strict=True):
            each.tokens.append(token)


def test_arrays_that_travel_are_sampled_from_as_those_that_stay(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As on a GPU: through buffers that are written again, into views of one piece of memory."""

    class Done:
        def record(self) -> None: ...

        def synchronize(self) -> None: ...

    class Travelling(Uploader):
        def __init__(self, device: Any) -> None:
            ring = Ring(pin=lambda n: torch.zeros(n, dtype=torch.uint8), event=Done, buffers=2)
            super().__init__(device, ring)

    def requests() -> list[Request]:
        made = []
        for i in range(12):
            changes: dict[str, Any] = {
                "frequency_penalty": 0.5 * (i % 2),
                "repetition_penalty": 1 + 0.2 * (i % 3),
                "logit_bias": {i: 2.0} if i % 4 else None,
                "allowed_token_ids": range(5, 250) if i % 5 == 1 else None,
                "min_tokens": i % 4,
            }
            kind = {"logprobs": None, **KINDS[i % len(KINDS)]}
            made.append(request(i % 3, seed=i, stop=(4, 6), **changes, **kind))
        made[7].bad_words_ids = ((9,), (3, 11))
        return made

    def tokens() -> list[list[int]]:
        rows, sampler, found = requests(), Sampler(300, "cpu"), []
        generator = torch.Generator().manual_seed(3)
        for step in range(12):
            some = rows[step // 4 :]
            logits = torch.randn(len(some), 300, generator=generator) * 2
            found.append(sampler.sample(logits, some).to_host().token_ids)
            for each, token in zip(some, found[-1], strict=True):
                each.tokens.append(token)
        return found

    wanted = tokens()
    monkeypatch.setattr("vattn.engine.sampler.Uploader", Travelling)
    assert tokens() == wanted


def test_it_forgets_whom_it_has_served() -> None:
    one = request(
        repetition_penalty=1.3, logit_bias={1: 1.0}, allowed_token_ids=[1, 2], min_tokens=2
    )
    held = sys.getrefcount(one)
    sampler = Sampler(8, "cpu")
    sampler.sample(torch.zeros(1, 8), [one])
    assert sys.getrefcount(one) > held
    one.status = Status.FINISHED
    sampler.forget()
    gc.collect()
    assert sys.getrefcount(one) == held
