"""Prompt lookup: which drafts are proposed, and that an index that grows finds the same."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.scheduler_model import make_request
from vattn.engine.speculation.ngram import NgramIndex, NgramProposer


def wanted(tokens: list[int], least: int, most: int, count: int) -> list[int]:
    """The continuation of the latest occurrence of the longest n-gram, looked for one by one."""
    length = len(tokens)
    for size in range(most, least - 1, -1):
        for end in range(length - 1, size - 1, -1):
            if tokens[end - size : end] == tokens[length - size :]:
                drafts = list(tokens)
                for at in range(end, end + count):
                    drafts.append(drafts[at])
                return drafts[length:]
    return []


@pytest.mark.parametrize(
    ("tokens", "drafts"),
    [
        ([1, 2, 3, 4, 9, 1, 2, 3], [4, 9, 1]),
        ([5, 2, 3, 7, 8, 2, 3, 9, 9, 2, 3], [9, 9, 2]),  # the latest of the two
        ([1, 2, 3, 7, 6, 6, 3, 8, 1, 2, 3], [7, 6, 6]),  # a longer one before a later one
        ([7, 7, 7], [7, 7, 7]),  # into the end of the text and on
        ([1, 4, 5, 4, 5], [4, 5, 4]),
        ([1, 2, 3, 4], []),
        ([1], []),
    ],
)
def test_examples(tokens: list[int], drafts: list[int]) -> None:
    assert NgramIndex(1, 3).propose(tokens, 3) == drafts


def test_shorter_ngrams_than_the_least_do_not_count() -> None:
    text = [1, 2, 3, 4, 9, 9, 2, 3]
    assert NgramIndex(2, 4).propose(text, 2) == [4, 9]
    assert NgramIndex(3, 4).propose(text, 2) == []


sizes = st.tuples(st.integers(1, 5), st.integers(0, 4)).map(lambda s: (s[0], s[0] + s[1]))


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(
    pieces=st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=90), min_size=1, max_size=6),
    sizes=sizes,
    count=st.integers(1, 7),
)
def test_a_growing_text_finds_what_a_search_finds(
    pieces: list[list[int]], sizes: tuple[int, int], count: int
) -> None:
    """In pieces of any length: long ones are learned at once, short ones token by token."""
    index = NgramIndex(*sizes)
    tokens: list[int] = []
    for piece in pieces:
        tokens += piece
        assert index.propose(tokens, count) == wanted(tokens, *sizes, count)


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(
    tokens=st.lists(st.integers(0, 200_000).map(lambda n: n % 5 * 49_999), min_size=1, max_size=150)
)
def test_large_token_ids(tokens: list[int]) -> None:
    """Keys overflow 64 bits; both ways of making them agree."""
    at_once, one_by_one = NgramIndex(1, 6), NgramIndex(1, 6)
    for end in range(1, len(tokens) + 1):
        one_by_one.propose(tokens[:end], 1)
    at_once.propose(tokens, 1)
    assert at_once._ends == one_by_one._ends
    assert at_once.propose(tokens, 4) == wanted(tokens, 1, 6, 4)


def test_ngrams_with_one_key_are_told_apart() -> None:
    index = NgramIndex(2, 2)
    text = [1, 2, 3, 4, 1, 2]
    index.propose(text, 2)
    # As if another n-gram before had the key of the last one.
    (key,) = index._keys_at(text, 5)
    index._ends[0][key] = 4
    assert index.propose(text, 2) == []


def test_each_request_has_an_index_of_its_own_until_it_ends() -> None:
    proposer = NgramProposer(5, 1, 2)
    first, second = make_request("a", [1, 2, 1], new=4), make_request("b", [2, 3, 2], new=20)
    proposer.propose([first, second])
    assert first.drafts == [2, 1, 2]  # its limit has no use for more
    assert second.drafts == [3, 2, 3, 2, 3]
    proposer.check()
    assert proposer.live_pages() == proposer.held_bytes() == proposer.fixed_pages == 0
    assert not proposer.relieve()
    proposer.let_go(first)
    proposer.let_go(first)
    assert list(proposer._indices) == [second]
    proposer.lose_all()
    proposer.propose([second])
    assert second.drafts == [3, 2, 3, 2, 3]
    proposer.close()
    assert not proposer._indices
