"""The radix index over token ids, against a plain list of what every slot holds."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vattn.kv.prefix import PrefixIndex


def shares(slot: int, shared: int) -> tuple[int, int]:
    return (shared, -slot)


def common(a: list[int], b: list[int]) -> int:
    n = 0
    while n < min(len(a), len(b)) and a[n] == b[n]:
        n += 1
    return n


def test_the_longest_prefix_wins() -> None:
    index = PrefixIndex()
    index.insert(0, [1, 2, 3, 4])
    index.insert(1, [1, 2, 3, 4, 5, 6])
    index.insert(2, [1, 2, 9])
    index.check()
    assert index.match([1, 2, 3, 4, 5, 7], shares) == (1, (5, -1))
    assert index.match([1, 2, 3], shares) == (0, (3, 0))
    assert index.match([1, 2, 9, 9], shares) == (2, (3, -2))
    assert index.match([7], shares) is None


def test_a_slot_that_lost_its_pages_gives_way_to_a_shorter_one() -> None:
    index = PrefixIndex()
    index.insert(0, list(range(100)))
    index.insert(1, list(range(60)))
    held = {0: 10, 1: 50}

    def usable(slot: int, shared: int) -> tuple[int, ...] | None:
        n = min(shared, held[slot])
        return (n,) if n >= 20 else None

    assert index.match(list(range(100)), usable) == (1, (50,))
    held[1] = 5
    assert index.match(list(range(100)), usable) is None


def test_tenants_do_not_see_each_other() -> None:
    index = PrefixIndex()
    index.insert(0, [1, 2, 3], salt="a")
    assert index.match([1, 2, 3], shares, salt="b") is None
    assert index.match([1, 2, 3], shares) is None
    assert index.match([1, 2, 3], shares, salt="a") == (0, (3, 0))


def test_a_slot_holds_one_sequence() -> None:
    index = PrefixIndex()
    index.insert(4, [1, 2, 3], salt="a")
    index.insert(4, [5, 6])
    index.check()
    assert index.match([1, 2, 3], shares, salt="a") is None
    assert index.match([5, 6, 7], shares) == (4, (2, -4))
    assert (len(index), 4 in index, 5 in index) == (1, True, False)
    index.insert(4, [])
    assert len(index) == 0
    index.check()


def test_long_sequences_are_told_apart_at_every_token() -> None:
    base = list(range(1000, 2000))
    for cut in (1, 31, 32, 33, 95, 96, 97, 500, 999):
        index = PrefixIndex()
        index.insert(0, base)
        assert index.match([*base[:cut], 7, *base[cut:]], shares) == (0, (cut, 0))


TOKENS = st.lists(st.integers(0, 2), max_size=12)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("insert"), st.integers(0, 5), TOKENS, st.sampled_from(["", "x"])),
            st.tuples(st.just("remove"), st.integers(0, 5), st.just([]), st.just("")),
        ),
        max_size=40,
    ),
    st.lists(st.tuples(TOKENS, st.sampled_from(["", "x"])), max_size=5),
)
def test_it_agrees_with_a_list(
    changes: list[tuple[str, int, list[int], str]], queries: list[tuple[list[int], str]]
) -> None:
    index = PrefixIndex()
    model: dict[int, tuple[str, list[int]]] = {}
    for kind, slot, tokens, salt in changes:
        if kind == "insert":
            index.insert(slot, tokens, salt)
            model.pop(slot, None)
            if tokens:
                model[slot] = (salt, tokens)
        else:
            index.remove(slot)
            model.pop(slot, None)
        index.check()
        assert len(index) == len(model)
    for tokens, salt in queries:
        scores = {
            slot: shares(slot, common(held, tokens))
            for slot, (owner, held) in model.items()
            if owner == salt and common(held, tokens) > 0
        }
        best = max(scores.items(), key=lambda item: item[1], default=None)
        assert index.match(tokens, shares, salt) == best


@pytest.mark.parametrize("module", ["vattn.kv.prefix", "vattn.engine.scheduler"])
def test_it_needs_no_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
