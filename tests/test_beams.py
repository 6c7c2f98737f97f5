"""What a group of beams decides from a step's candidates, against transformers' own search."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GenerationMixin, LlamaConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from tests.beam_model import make_search
from vattn.engine.beam_scores import BeamScorer
from vattn.engine.beams import BeamGroup, Candidates, check_search
from vattn.engine.sampled import Sampled
from vattn.outputs import KVUsage
from vattn.request import FinishReason, Request, Status
from vattn.sampling_params import BeamSearchParams

VOCABULARY = 13
FILL = 99  # in place of a token, where transformers' sequences have ended


class TableModel(PreTrainedModel, GenerationMixin):  # type: ignore[no-untyped-call]
    """A model whose next token depends on the last one and on the length."""

    config_class = LlamaConfig

    def __init__(self, table: torch.Tensor) -> None:
        super().__init__(LlamaConfig(vocab_size=VOCABULARY))
        self.table = torch.nn.Parameter(table)

    def forward(self, input_ids: torch.Tensor, **_: Any) -> CausalLMOutput:
        return CausalLMOutput(logits=self.logits(input_ids))

    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        """``[rows, tokens, V]``."""
        return self.table[torch.arange(ids.shape[1]) % len(self.table), ids]


def wanted(
    model: TableModel, prompt: list[int], new: int, params: BeamSearchParams, eos: list[int]
) -> list[tuple[list[int], float]]:
    """Sequences and scores of transformers."""
    generate: Any = model.generate  # type: ignore[misc]
    out = generate(
        input_ids=torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
        num_beams=params.beam_width,
        num_return_sequences=params.beam_width,
        max_new_tokens=new,
        do_sample=False,
        use_cache=False,
        eos_token_id=eos or None,
        pad_token_id=FILL,
        length_penalty=params.length_penalty,
        early_stopping=params.early_stopping,
        return_dict_in_generate=True,
        output_scores=True,
    )
    rows = out.sequences[:, len(prompt) :].tolist()
    if params.beam_width == 1:
        scores = [math.nan]
    else:
        scores = out.sequences_scores.tolist()
    return [
        ([token for token in row if token not in (FILL, -1)], score)
        for row, score in zip(rows, scores, strict=True)
    ]


def searched(model: TableModel, groups: list[BeamGroup]) -> None:
    """Runs groups of beams together until all have ended, as an engine does."""
    scorer = BeamScorer("cpu")
    going = list(groups)
    while going:
        requests = [beam for group in going for beam in group.members]
        logits = torch.stack([model.logits(torch.tensor([r.tokens]))[0, -1] for r in requests])
        beams = scorer.score(logits.detach(), requests)
        sampled = no_tokens(len(requests)).with_beams(beams).to_host()
        assert {group for group, _ in sampled.beams} == set(going)
        for group, candidates in sampled.beams:
            reason = group.choose(candidates)
            if reason is None:
                group.commit()
                group.check()
            else:
                end(group, reason)
        going = [group for group in going if not group.lead.finished]


def no_tokens(rows: int) -> Sampled:
    """What a step samples for rows whose tokens nobody looks at."""
    return Sampled(torch.zeros(rows, dtype=torch.int64), torch.zeros(rows, dtype=torch.bool))


def end(group: BeamGroup, reason: FinishReason) -> None:
    group.lead.status, group.lead.finish_reason = Status.FINISHED, reason


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    seed=st.integers(0, 10_000),
    width=st.integers(2, 5),
    new=st.integers(1, 9),
    eos=st.lists(st.integers(0, VOCABULARY - 1), max_size=3, unique=True),
    length_penalty=st.sampled_from([1.0, 0.0, -1.5, 3.0]),
    early_stopping=st.sampled_from([False, True, "never"]),
    sharpness=st.sampled_from([0.5, 3.0]),
)
def test_the_sequences_are_those_of_transformers(
    seed: int,
    width: int,
    new: int,
    eos: list[int],
    length_penalty: float,
    early_stopping: bool | str,
    sharpness: float,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    model = TableModel(sharpness * torch.randn(16, VOCABULARY, VOCABULARY, generator=generator))
    params = BeamSearchParams(
        beam_width=width,
        max_tokens=new,
        length_penalty=length_penalty,
        early_stopping=early_stopping,
    )
    prompts = [[1, 2, 3], [7]]
    groups = [
        make_search(str(i), prompt, new, params, eos_ids=eos) for i, prompt in enumerate(prompts)
    ]
    searched(model, groups)
    for group, prompt in zip(groups, prompts, strict=True):
        found = group.results()
        reference = wanted(model, prompt, new, params, eos)
        assert [each.token_ids for each in found] == [tokens for tokens, _ in reference]
        scores = [score for _, score in reference]
        assert [each.score for each in found] == pytest.approx(scores, abs=1e-4)
        for each in found:
            stopped = each.token_ids[-1] in eos
            assert each.finish_reason == (FinishReason.STOP if stopped else FinishReason.LENGTH)
            scale = len(each.token_ids) ** length_penalty
            assert each.score == pytest.approx(each.cum_logprob / scale)


def test_one_beam_takes_the_likeliest_token() -> None:
    model = TableModel(torch.randn(16, VOCABULARY, VOCABULARY))
    group = make_search("a", [1, 2], 7, width=1)
    searched(model, [group])
    (found,) = group.results()
    params = BeamSearchParams(beam_width=1, max_tokens=7)
    assert found.token_ids == wanted(model, [1, 2], 7, params, [])[0][0]


def test_temperature_divides_the_logits() -> None:
    logits = torch.randn(1, VOCABULARY)
    groups = [
        make_search("a", [1], 4, BeamSearchParams(beam_width=3, max_tokens=4, temperature=t))
        for t in (0.0, 2.0)
    ]
    rows = logits.expand(2, -1).contiguous()
    (scores,) = BeamScorer("cpu").score(rows, [group.lead for group in groups])
    assert torch.equal(rows, logits.expand(2, -1)), "the logits stay as they are"
    for row, temperature in enumerate((1.0, 2.0)):
        best = (logits[0] / temperature).log_softmax(0).topk(6)
        torch.testing.assert_close(scores.scores[row], best.values)
        assert torch.equal(scores.ids[row], best.indices)


def test_groups_of_every_shape_are_scored_in_one_step() -> None:
    """Wide and narrow ones, with few and many ends, before and after the prompt, among others."""
    model = TableModel(torch.randn(16, VOCABULARY, VOCABULARY))
    groups = [
        make_search("a", [1], 5, width=3),
        make_search("b", [2, 5], 5, width=2),
        make_search("c", [3], 5, width=3, eos_ids=[1, 2, 4]),
        make_search("d", [4], 5, width=3),
    ]
    other = Request("e", [1], groups[0].lead.params, 9)
    scorer = BeamScorer("cpu")
    (first,) = scorer.score(torch.randn(1, VOCABULARY), [groups[0].lead])
    (_, found), *_ = (
        Sampled(torch.zeros(1), torch.zeros(1).bool()).with_beams((first,)).to_host().beams
    )
    groups[0].choose(found)
    groups[0].commit()
    rows = [groups[3].lead, other, *groups[0].members, groups[1].lead, groups[2].lead]
    logits = torch.stack([model.logits(torch.tensor([r.tokens]))[0, -1] for r in rows]).detach()
    scores = scorer.score(logits, rows)
    shapes = {tuple(each.groups): tuple(each.scores.shape) for each in scores}
    assert shapes == {
        (groups[3],): (1, 6),
        (groups[0],): (1, 6),
        (groups[1],): (1, 4),
        (groups[2],): (1, 12),
    }
    for group, candidates in no_tokens(len(rows)).with_beams(scores).to_host().beams:
        expected = sorted(
            (
                (score + value, rank, token)
                for rank, (score, beam) in enumerate(zip(group.scores, group.ranked, strict=True))
                for token, value in enumerate(logits[rows.index(beam)].log_softmax(0).tolist())
            ),
            reverse=True,
        )[: len(candidates.scores)]
        assert candidates.scores == pytest.approx([score for score, _, _ in expected], abs=1e-5)
        assert list(candidates.beams) == [rank for _, rank, _ in expected]
        assert list(candidates.tokens) == [token for _, _, token in expected]


def test_a_step_without_beams_costs_nothing() -> None:
    request = Request("a", [1], make_search("b", [1], 2).lead.params, 9)
    assert BeamScorer("cpu").score(torch.zeros(1, VOCABULARY), [request]) == ()


# Slots --------------------------------------------------------------------------------------------


def started(width: int = 4, new: int = 8) -> BeamGroup:
    """A group whose beams have the tokens 10, 11, ... after the prompt."""
    group = make_search("g", [1, 2], new, width=width)
    tokens = list(range(10, 10 + 2 * width))
    assert (
        group.choose(Candidates([-0.1 * i for i in range(2 * width)], [0] * 2 * width, tokens))
        is None
    )
    assert group.moves == []
    assert [beam.id for beam in group.commit()] == [f"g/{i}" for i in range(1, width)]
    group.check()
    assert [beam.tokens[-1] for beam in group.members] == tokens[:width]
    return group


def continued(group: BeamGroup, beams: list[int], tokens: list[int]) -> None:
    scores = [-1 - 0.1 * i for i in range(len(beams))]
    assert group.choose(Candidates(scores, beams, tokens)) is None


def test_the_first_child_keeps_the_slot_and_the_others_take_those_of_childless_beams() -> None:
    group = started()
    a, b, c, d = group.members
    continued(group, [2, 2, 0, 2, 1, 1, 1, 1], [20, 21, 22, 23, 24, 25, 26, 27])
    assert group.moves == [(b, c), (d, c)]
    assert group.commit() == []
    group.check()
    assert group.ranked == [c, b, a, d]
    assert [beam.tokens for beam in group.members] == [
        [1, 2, 10, 22],
        [1, 2, 12, 21],
        [1, 2, 12, 20],
        [1, 2, 12, 23],
    ]
    assert group.scores == [-1, -1.1, -1.2, -1.3]


def test_beams_that_all_go_on_do_not_move() -> None:
    group = started()
    a, b, c, d = group.members
    continued(group, [3, 1, 0, 2, 0, 0, 0, 0], [20, 21, 22, 23, 24, 25, 26, 27])
    assert group.moves == []
    group.commit()
    assert group.ranked == [d, b, a, c]
    assert [beam.tokens[-2:] for beam in (a, b, c, d)] == [[10, 22], [11, 21], [12, 23], [13, 20]]


def test_beams_are_siblings_of_their_lead() -> None:
    group = make_search("g", [1, 2], 8, width=2, priority=3, cache_salt="us")
    group.lead.order = 17
    group.choose(Candidates([-1.0, -2.0, -3.0, -4.0], [0] * 4, [5, 6, 7, 8]))
    (beam,) = group.commit()
    assert (beam.priority, beam.cache_salt, beam.order, beam.index) == (3, "us", 17, 1)
    assert (beam.source, beam.limit, beam.prompt_ids) == (group.lead, 10, [1, 2])
    assert beam.waits_for_tokens
    assert group.lead.waits_for_tokens
    assert beam.deadline_s is None


# Ends ---------------------------------------------------------------------------------------------


def test_an_end_that_is_not_among_the_first_is_no_sequence() -> None:
    group = make_search("g", [1], 9, width=2, eos_ids=[3])
    usage = KVUsage(pages=7)
    found = Candidates([-1.0, -2.0, -2.5, -3.0], [0] * 4, [5, 3, 6, 3])
    assert group.choose(found, lambda _: usage) is None
    group.commit()
    found = Candidates([-3.0, -3.1, -3.2, -3.3], [0, 1, 0, 1], [3, 7, 8, 3])
    assert group.choose(found, lambda _: usage) is None  # full, but the best beam may beat them
    group.commit()
    end(group, FinishReason.STOP)
    assert [(each.token_ids, each.score, each.kv) for each in group.results()] == [
        ([5, 3], -1.5, usage),
        ([3], -2.0, usage),
    ]


@pytest.mark.parametrize("reason", [FinishReason.ABORT, FinishReason.DEADLINE])
def test_a_search_that_is_cut_short_gives_what_it_has(reason: FinishReason) -> None:
    group = make_search("g", [1], 9, width=2, eos_ids=[3])
    group.choose(Candidates([-1.0, -2.0, -2.5, -3.0], [0] * 4, [5, 3, 6, 7]))
    group.commit()
    end(group, reason)
    assert [(each.token_ids, each.score, each.finish_reason) for each in group.results()] == [
        ([5], -1.0, reason),
        ([3], -2.0, FinishReason.STOP),
    ]


def test_a_search_that_was_cut_before_its_first_token_has_nothing() -> None:
    group = make_search("g", [1], 9)
    end(group, FinishReason.ABORT)
    assert group.results() == []


def test_a_search_that_failed_has_nothing() -> None:
    group = started()
    end(group, FinishReason.ERROR)
    assert group.results() == []


def test_continuations_that_cannot_be_end_the_search() -> None:
    """Where the model rules out all but the end."""
    group = make_search("g", [1], 9, width=2, eos_ids=[3])
    nothing = -math.inf
    assert group.choose(Candidates([-0.1, nothing, nothing, nothing], [0] * 4, [3, 0, 1, 2])) is (
        FinishReason.STOP
    )
    end(group, FinishReason.STOP)
    assert [each.token_ids for each in group.results()] == [[3]]


@pytest.mark.parametrize("penalty", [1e4, -1e4])
def test_a_length_penalty_beyond_numbers_is_refused(penalty: float) -> None:
    params = BeamSearchParams(beam_width=2, max_tokens=50, length_penalty=penalty)
    with pytest.raises(ValueError, match=r"length_penalty=-?10000 makes scores of 50 tokens"):
        check_search(params, 50)
    check_search(params, 1)  # 1 to any power
