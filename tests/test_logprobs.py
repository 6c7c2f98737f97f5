"""Log probabilities of sampled and of given tokens, and the search for the largest values."""

from __future__ import annotations

import math

import pytest
import torch

from tests.test_distributions import EMPTY
from tests.test_sampler import draw, request
from vattn.engine import logprobs
from vattn.engine.largest import Largest
from vattn.engine.sampler import Sampler

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
    assert host.entry(0, host.token_ids[0]) is None


@pytest.mark.parametrize("vocabulary", [1, 5, 63, 2047, 2048, 2100, 4096, 5001])
def test_the_largest_by_blocks_are_the_largest(vocabulary: int) -> None:
    generator = torch.Generator().manual_seed(vocabulary)
    values = torch.randn(7, vocabulary, generator=generator)
    values[1] = 3.0  # all equal
    values[2, vocabulary // 2 :] = 9.0
    values[3] = EMPTY
    values[4, -1] = 20.0
    values[5, 0] = 20.0
    values[6, vocabulary // 3] = math.nan
    largest = Largest(values)
    best, places = largest.first()
    wanted, first = values.max(1)
    torch.testing.assert_close(best, wanted, equal_nan=True)
    assert torch.equal(places[:6], first[:6])
    assert 0 <= int(places[6]) < vocabulary
    for count in {1, 2, 5, 8, 20, vocabulary}:
        if count > vocabulary:
            continue
        top, ids = largest.top(count)
        torch.testing.assert_close(top, values.topk(count, 1).values, equal_nan=True)
        torch.testing.assert_close(values.gather(1, ids), top, equal_nan=True)
        for row in ids.tolist():
            assert len(set(row)) == count


def test_logprobs_of_the_whole_vocabulary() -> None:
    generator = torch.Generator().manual_seed(8)
    logits = torch.randn(3, 5000, generator=generator) * 2
    wanted = logits.log_softmax(1)
    rows = [request(temperature=0, logprobs=-1), request(seed=1, logprobs=2), request()]
    host = Sampler(5000, "cpu").sample(logits.clone(), rows).to_host()
    whole = host.entry(0, host.token_ids[0])
    assert whole is not None
    assert len(whole) == 5000
    assert sorted(value.rank for value in whole.values()) == list(range(1, 5001))
    for token in (0, 17, 4999, *wanted[0].topk(3).indices.tolist()):
        assert whole[token].logprob == pytest.approx(float(wanted[0, token]), abs=1e-5)
    few = host.entry(1, host.token_ids[1])
    assert few is not None
    assert set(few) == {host.token_ids[1], *wanted[1].topk(2).indices.tolist()}
    assert host.entry(2, host.token_ids[2]) is None


@pytest.mark.parametrize("vocabulary", [10, 3000])
def test_ranks_by_a_search_of_every_row(vocabulary: int) -> None:
    """As on a GPU, which may not look which rows need one; many logits are equal."""
    generator = torch.Generator().manual_seed(vocabulary)
    logits = torch.randn(200, vocabulary, generator=generator).mul(2).round(decimals=1)
    logit = logits.gather(1, torch.randint(0, vocabulary, (200, 1), generator=generator))
    wanted = (logits > logit).sum(1) + 1
    assert torch.equal(logprobs._ranks_of_all(logits.clone(), logit), wanted)
    for count in (1, 5, vocabulary):
        top = logits.topk(count, 1).values
        assert torch.equal(logprobs._ranks(logits, logit, top), wanted)


def test_a_tie_has_the_rank_of_the_likeliest() -> None:
    logits = torch.zeros(1, 6)
    logits[0, 4] = EMPTY
    host = Sampler(6, "cpu").sample(logits, [request(seed=1, logprobs=6)]).to_host()
    entry = host.entry(0, host.token_ids[0])
    assert entry is not None
    assert entry[host.token_ids[0]].rank == 1
    assert (entry[4].rank, entry[4].logprob, len(entry)) == (6, EMPTY, 6)


# Scores -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vocabulary", [90, 3000])
def test_scores_of_given_tokens(vocabulary: int) -> None:
    generator = torch.Generator().manual_seed(9)
    # No two of a row alike, whose order would be open.
    order = torch.rand(40, vocabulary, generator=generator).argsort(1)
    logits = order * (12.0 / vocabulary)
    wanted = logits.log_softmax(1)
    targets = torch.randint(vocabulary, (40,), generator=generator).tolist()
    targets[3] = int(logits[3].argmax())
    counts = [(0, 3, 40, -1)[i % 4] for i in range(40)]
    sampler = Sampler(vocabulary, "cpu")
    scores = sampler.score(logits.clone(), targets, counts)
    rows = [request(temperature=0, logprobs=1), request(seed=2)]
    sampled = sampler.sample(logits[:2].clone(), rows).with_scored(scores).to_host()
    for host in (sampled, sampler.sample(logits[:0], []).with_scored(scores).to_host()):
        for i, (target, count) in enumerate(zip(targets, counts, strict=True)):
            entry = host.scored(i)
            asked = vocabulary if count < 0 else count
            assert next(iter(entry)) == target
            assert set(entry) == {target, *wanted[i].topk(asked).indices.tolist()}
            for token, value in entry.items():
                assert value.logprob == pytest.approx(float(wanted[i, token]), abs=1e-5)
                assert value.rank == int((logits[i] > logits[i, token]).sum()) + 1
    own = sampled.entry(0, sampled.token_ids[0])
    assert own is not None
    assert own[sampled.token_ids[0]].rank == 1
    assert sampled.token_ids == draw(logits[:2], rows)


def test_no_scores() -> None:
    sampler = Sampler(8, "cpu")
    none = sampler.score(torch.zeros(0, 8), [], [])
    host = sampler.sample(torch.zeros(1, 8), [request(temperature=0)]).with_scored(none).to_host()
    assert host.token_ids == [0]
    with pytest.raises(KeyError):
        host.scored(0)
    with pytest.raises(ValueError, match="2 targets and a vocabulary of 8"):
        sampler.score(torch.zeros(1, 8), [1, 2], [0, 0])
