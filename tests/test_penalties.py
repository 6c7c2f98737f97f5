"""Penalties against transformers and a plain loop: over steps, and over rows that change."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import RepetitionPenaltyLogitsProcessor

from vattn.attention.upload import Uploader
from vattn.engine import penalties
from vattn.engine.penalties import Penalties
from vattn.engine.sampler import Sampler
from vattn.request import FinishReason, Request, Status
from vattn.sampling_params import SamplingParams

VOCABULARY = 30

some_params = st.builds(
    SamplingParams,
    presence_penalty=st.sampled_from([0.0, 0.7, -1.3]),
    frequency_penalty=st.sampled_from([0.0, 0.3, -0.4, 2.0]),
    repetition_penalty=st.sampled_from([1.0, 1.2, 0.8, 3.0]),
)
some_tokens = st.lists(st.integers(0, VOCABULARY - 1), max_size=40)


def request(prompt: list[int], output: list[int], params: SamplingParams) -> Request:
    made = Request("r", prompt, params, 100_000)
    made.tokens += output
    return made


def random_logits(rows: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 3


def plain(row: torch.Tensor, each: Request) -> torch.Tensor:
    """One token after another, in vLLM's order: repetition, frequency, presence."""
    out, params = row.double().tolist(), each.params
    for token in range(VOCABULARY):
        if token in each.tokens:
            factor = params.repetition_penalty
            out[token] = out[token] / factor if out[token] > 0 else out[token] * factor
        count = each.output_ids.count(token)
        out[token] -= params.frequency_penalty * count + params.presence_penalty * (count > 0)
    return torch.tensor(out, dtype=torch.float32)


def assert_right(processor: Penalties, rows: list[Request], seed: int, *, same: bool) -> None:
    """On the next step's logits; ``same``: of the rows that it has learnt before."""
    logits = random_logits(len(rows), seed)
    out = logits.clone()
    if same or processor.update(rows):
        processor.apply(out, rows)
        processor.check()
    for i, each in enumerate(rows):
        torch.testing.assert_close(out[i], plain(logits[i], each), rtol=1e-5, atol=1e-5)
        untouched = [t for t in range(VOCABULARY) if t not in each.tokens]
        assert torch.equal(out[i, untouched], logits[i, untouched])


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(some_tokens, some_tokens, some_params), min_size=1, max_size=6),
    st.integers(0, 99),
)
def test_any_rows_equal_a_plain_loop(rows: list[Any], seed: int) -> None:
    requests = [request([1, *prompt], output, params) for prompt, output, params in rows]
    assert_right(Penalties(VOCABULARY, Uploader("cpu")), requests, seed, same=False)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=40),
    st.integers(1, 30),
    st.sampled_from([1.2, 0.7, 5.0]),
    st.integers(0, 99),
)
def test_repetition_is_transformers(ids: list[int], prompt: int, factor: float, seed: int) -> None:
    each = request(ids[:prompt], ids[prompt:], SamplingParams(repetition_penalty=factor))
    logits = random_logits(1, seed)
    out = logits.clone()
    processor = Penalties(VOCABULARY, Uploader("cpu"))
    assert processor.update([each])
    processor.apply(out, [each])
    theirs: Any = RepetitionPenaltyLogitsProcessor(factor)
    assert torch.equal(out, theirs(torch.tensor([ids]), logits.clone()))


def mixed_requests(count: int = 20) -> list[Request]:
    rng = random.Random(4)
    made = []
    for i in range(count):
        params: dict[str, Any] = {"temperature": 0}
        if i % 4:
            params["presence_penalty"] = [0.0, 0.6, -0.6][i % 3]
            params["frequency_penalty"] = [0.25, 0.0, -1.0, 0.5][i // 3 % 4]
            params["repetition_penalty"] = [1.0, 1.3, 0.6][i // 2 % 3]
        prompt = [rng.randrange(VOCABULARY) for _ in range(1 + i % 9)]
        made.append(request(prompt, [], SamplingParams(**params)))
    return made


@pytest.mark.parametrize("room", [1, 2, 64])
def test_steps_of_the_same_rows_and_of_others(room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens come one by one, or several at once; rows leave, come back with more, and end."""
    monkeypatch.setattr(penalties, "_ROOM", room)
    rng = random.Random(room)
    requests, processor = mixed_requests(), Penalties(VOCABULARY, Uploader("cpu"))
    rows: list[Request] = []
    for step in range(150):
        same = bool(rows) and step % 5 != 0
        if not same:
            rows = [each for each in requests if not each.finished and rng.random() < 0.7]
            rows = rows or [each for each in requests if not each.finished][:1]
        if same and not any(each.params.has_penalties for each in rows):
            continue
        assert_right(processor, rows, step, same=same)
        for each in rows:
            each.tokens += rng.choices(range(VOCABULARY), k=rng.choice([0, 1, 1, 1, 3]))
        if step % 30 == 29:
            rows[0].status, rows[0].finish_reason = Status.FINISHED, FinishReason.STOP
            rows = []
    assert sum(each.finished for each in requests) == 5


def test_tokens_that_changed_are_read_again() -> None:
    """As those of a request that was given the tokens of another, with the rows as they were."""
    params = SamplingParams(frequency_penalty=0.5, repetition_penalty=1.5)
    each = request([1, 2], [3, 4, 4, 5], params)
    processor = Penalties(VOCABULARY, Uploader("cpu"))
    assert_right(processor, [each], 0, same=False)
    each.tokens = [1, 2, 3]
    assert_right(processor, [each], 1, same=True)
    each.tokens = [1, 2, 6, 7, 7]
    assert_right(processor, [each], 2, same=True)


def test_nothing_is_kept_of_those_that_ended() -> None:
    requests, processor = mixed_requests(), Penalties(VOCABULARY, Uploader("cpu"))
    assert processor.update(requests)
    for each in requests:
        each.status, each.finish_reason = Status.FINISHED, FinishReason.STOP
    assert not processor.update([])
    assert len(processor._histories) == 0


def test_a_new_token_costs_one_entry_and_an_old_one_none() -> None:
    """What goes to the device is what changed, not the rows' histories."""
    sent: list[int] = []

    class Counting(Uploader):
        def __call__(self, *arrays: Any) -> list[torch.Tensor]:
            sent.append(len(arrays[0]))
            return super().__call__(*arrays)

    rows = [request(list(range(20)), [], SamplingParams(repetition_penalty=1.1)) for _ in range(3)]
    rows.append(request([1], [], SamplingParams(frequency_penalty=0.1)))
    processor = Penalties(VOCABULARY, Counting("cpu"))
    processor.update(rows)
    sent.clear()
    for token, changed in ((3, 1), (3, 1), (25, 4), (25, 1)):
        for each in rows:
            each.tokens.append(token)
        processor.apply(torch.zeros(4, VOCABULARY), rows)
        assert sent == [changed], token
        sent.clear()
    rows.pop()
    processor.update(rows)
    sent.clear()
    for each in rows:
        each.tokens.append(25)
    processor.apply(torch.zeros(3, VOCABULARY), rows)
    assert sent == []


def test_only_new_rows_are_sent_when_rows_change() -> None:
    """Others move on the device, with what their tokens have changed since."""
    sent: list[int] = []

    class Counting(Uploader):
        def __call__(self, *arrays: Any) -> list[torch.Tensor]:
            sent.append(len(arrays[0]))
            return super().__call__(*arrays)

    params = SamplingParams(repetition_penalty=1.5, frequency_penalty=0.5)
    rows = [request(list(range(20 + i)), [], params) for i in range(5)]
    processor = Penalties(VOCABULARY, Counting("cpu"))
    assert_right(processor, rows[:4], 0, same=False)
    assert sent == [20 + 21 + 22 + 23]
    # One leaves, all others move; old tokens come again, and one has a new one.
    for step, (now, wanted) in enumerate(
        [(rows[1:4], [1, 1]), (rows[1:], [24, 2]), (rows[3:1:-1], [0, 2])]
    ):
        for each in now[:2]:
            each.tokens.append(25 if each is rows[1] else 3)
        sent.clear()
        assert_right(processor, now, 1 + step, same=False)
        assert sent == wanted, step
    assert not processor.update([])
    assert processor._at.numel() == 0


@pytest.mark.parametrize("same", [True, False])
def test_a_step_that_failed_leaves_nothing_old(same: bool) -> None:
    """Its tokens were read, and what they changed did not get to the device."""
    fails = False

    class Failing(Uploader):
        def __call__(self, *arrays: Any) -> list[torch.Tensor]:
            if fails:
                raise RuntimeError("out of memory")
            return super().__call__(*arrays)

    params = SamplingParams(frequency_penalty=0.5)
    rows = [request([1, 2], [3, 4], params) for _ in range(3)]
    processor = Penalties(VOCABULARY, Failing("cpu"))
    assert_right(processor, rows, 0, same=False)
    for each in rows:
        each.tokens += [4, 9]
    fails = True
    with pytest.raises(RuntimeError, match="out of memory"):
        processor.apply(random_logits(3, 1), rows)
    fails = False
    assert_right(processor, rows if same else rows[1:], 2, same=same)


def test_greedy_text_with_penalties_stops_repeating() -> None:
    logits = torch.linspace(1, 0, VOCABULARY)[None]
    params = SamplingParams(temperature=0, presence_penalty=2.0)
    each, sampler = request([0], [], params), Sampler(VOCABULARY, "cpu")
    for _ in range(VOCABULARY):
        each.tokens += sampler.sample(logits.clone(), [each]).to_host().token_ids
    assert each.output_ids == list(range(VOCABULARY))  # each once, the likeliest first


def test_logprobs_are_of_what_the_model_gave() -> None:
    params = SamplingParams(temperature=0, logprobs=2, repetition_penalty=4.0, logit_bias={7: 90.0})
    each = request([3], [3], params)
    logits = random_logits(1, 1)
    wanted = logits.log_softmax(1)[0]
    host = Sampler(VOCABULARY, "cpu").sample(logits.clone(), [each]).to_host()
    token = host.token_ids[0]
    entry = host.entry(0, token)
    assert entry is not None
    assert next(iter(entry)) == token == 7
    best = wanted.topk(2).indices.tolist()
    assert set(entry) == {token, *best}
    for other, value in entry.items():
        assert value.logprob == pytest.approx(float(wanted[other]), abs=1e-5)
        assert value.rank == int((wanted > wanted[other]).sum()) + 1


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("factor", [1e-20, 1e20])
@pytest.mark.parametrize("temperature", [0.0, 1e-5, 1.0])
def test_the_strongest_repetition_penalty_leaves_a_token(factor: float, temperature: float) -> None:
    for ids in ([1, 2], list(range(6))):
        params = SamplingParams(
            repetition_penalty=factor, temperature=temperature, allowed_token_ids=[1, 2]
        )
        row = request(ids, [2], params)
        logits = torch.tensor([[5.0, 1e4, -1e4, 0.0, 1.0, 2.0]])
        host = Sampler(6, "cpu").sample(logits, [row]).to_host()
        assert host.bad_rows() == []
        assert host.token_ids == [1]
