"""A model of next tokens for beams, and the search over it that is plainest to read."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from vattn.engine.beams import BeamGroup, Candidates
from vattn.request import FinishReason, Request
from vattn.sampling_params import BeamSearchParams, SamplingParams

VOCABULARY = 50


def log_probs(content: Sequence[int], seed: int) -> list[float]:
    """What the model thinks of each token after ``content``."""
    value = seed
    for token in content:
        value = (value * 31 + token + 7) % 10_007
    weights = [1 + (value * (t + 3) * 7919 + t * 104_729) % 997 for t in range(VOCABULARY)]
    total = sum(weights)
    return [math.log(weight / total) for weight in weights]


def best(rows: Iterable[tuple[float, Sequence[int]]], seed: int, most: int) -> Candidates:
    """The best continuations of beams, each with its score so far."""
    found = sorted(
        (-(score + new), rank, token)
        for rank, (score, content) in enumerate(rows)
        for token, new in enumerate(log_probs(content, seed))
    )[:most]
    return Candidates([-s for s, _, _ in found], [r for _, r, _ in found], [t for _, _, t in found])


def beam_candidates(
    contents: Mapping[Request, Sequence[int]],
) -> list[tuple[BeamGroup, Candidates]]:
    """Of the groups of a step, whose slots hold these tokens."""
    groups: dict[BeamGroup, None] = dict.fromkeys(beam.group for beam in contents)
    found = []
    for group in groups:
        assert all(len(contents[beam]) == len(beam.tokens) for beam in group.ranked)
        assert all(list(contents[beam]) == beam.tokens for beam in group.ranked)
        rows = [(s, contents[beam]) for s, beam in zip(group.scores, group.ranked, strict=True)]
        found.append((group, best(rows, group.lead.seed, group.candidates)))
    return found


def make_search(
    name: str,
    prompt: Sequence[int],
    new: int,
    params: BeamSearchParams | None = None,
    *,
    width: int = 3,
    eos_ids: Iterable[int] = (),
    **options: Any,
) -> BeamGroup:
    """A group of beams whose sequences end after ``new`` tokens."""
    params = params or BeamSearchParams(beam_width=width, max_tokens=new)
    settings = SamplingParams(temperature=0, max_tokens=new)
    lead = Request(name, list(prompt), settings, len(prompt) + new, **options)
    return BeamGroup(lead, params, frozenset(eos_ids))


def expected_search(group: BeamGroup) -> tuple[list[tuple[list[int], float]], FinishReason]:
    """Sequences with their scores, and why the search ends, if nobody disturbs it."""
    params, lead = group.params, group.lead
    most = lead.limit - len(lead.prompt_ids)
    beams: list[tuple[float, list[int]]] = [(0.0, [])]
    done: list[tuple[float, list[int]]] = []
    for length in range(1, most + 1):
        rows = [(score, [*lead.prompt_ids, *tokens]) for score, tokens in beams]
        found = best(rows, lead.seed, group.candidates)
        going: list[tuple[float, list[int]]] = []
        options = zip(found.scores, found.beams, found.tokens, strict=True)
        for place, (score, rank, token) in enumerate(options):
            tokens = [*beams[rank][1], token]
            if token not in group.eos_ids and length < most:
                going.append((score, tokens))
            elif place < params.beam_width:
                done.append((score / length**params.length_penalty, tokens))
        done = sorted(done, key=lambda each: -each[0])[: params.beam_width]
        beams = going[: params.beam_width]
        if length == most:
            return [(tokens, score) for score, tokens in done], FinishReason.LENGTH
        reach = most if params.early_stopping == "never" and params.length_penalty > 0 else length
        full = len(done) == params.beam_width
        hopeless = full and beams[0][0] / reach**params.length_penalty <= done[-1][0]
        if full and (params.early_stopping is True or hopeless):
            return [(tokens, score) for score, tokens in done], FinishReason.STOP
    raise AssertionError("unreachable")


def found_search(group: BeamGroup) -> list[tuple[list[int], float]]:
    """Sequences and scores of one that has ended."""
    return [(each.token_ids, each.score) for each in group.results()]
