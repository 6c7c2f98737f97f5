"""Which slots begin with which tokens: a radix tree over token ids, one per tenant.

The tree answers one question: of the sequences that slots hold, which share the longest prefix
with this one? It owns no memory. Slots, and the pages in them, belong to the cache, which may take
pages away at any time; whoever asks says how much of a slot can still be used.

A radix tree over token ids as prefix cache is the idea of SGLang's RadixAttention (Zheng et al.,
2024, https://arxiv.org/abs/2312.07104); here its leaves are slots instead of lists of blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

_MIN_STEP = 32  # tokens compared at once at first; then twice as many each time

Score = TypeVar("Score", bound=tuple[int, ...])


class _Node:
    """Tokens that follow those of the parent, and the slots whose sequences contain them."""

    __slots__ = ("children", "depth", "edge", "ends", "parent", "slots")

    def __init__(self, edge: list[int], parent: _Node | None, depth: int) -> None:
        self.edge = edge
        self.parent = parent
        self.depth = depth  # tokens from the root to the end of the edge
        self.children: dict[int, _Node] = {}
        self.slots: set[int] = set()  # that end here or below
        self.ends: set[int] = set()  # that end here


class PrefixIndex:
    """Slots by the tokens that they hold. No two tenants (salts) share a tree."""

    def __init__(self) -> None:
        self._roots: dict[str, _Node] = {}
        self._ends: dict[int, tuple[str, _Node]] = {}

    def __len__(self) -> int:
        return len(self._ends)

    def __contains__(self, slot: int) -> bool:
        return slot in self._ends

    def insert(self, slot: int, tokens: Sequence[int], salt: str = "") -> None:
        """Declares that a slot holds these tokens, in place of what it was declared to hold."""
        self.remove(slot)
        if not tokens:
            return
        tokens = tokens if isinstance(tokens, list) else list(tokens)
        node = self._roots.setdefault(salt, _Node([], None, 0))
        node.slots.add(slot)
        while node.depth < len(tokens):
            child = node.children.get(tokens[node.depth])
            if child is None:
                child = _Node(tokens[node.depth :], node, len(tokens))
                node.children[tokens[node.depth]] = child
            else:
                shared = common(child.edge, tokens, node.depth)
                if shared < len(child.edge):
                    child = _split(child, shared)
            child.slots.add(slot)
            node = child
        node.ends.add(slot)
        self._ends[slot] = (salt, node)

    def remove(self, slot: int) -> None:
        """Forgets a slot; nothing happens if it is not known."""
        if slot not in self._ends:
            return
        salt, end = self._ends.pop(slot)
        end.ends.remove(slot)
        for node in list(_upward(end)):
            node.slots.remove(slot)
            if node.parent is None:
                if not node.slots:
                    del self._roots[salt]
            elif not node.slots:
                del node.parent.children[node.edge[0]]
            elif not node.ends and len(node.children) == 1:
                self._join(node)

    def match(
        self,
        tokens: Sequence[int],
        usable: Callable[[int, int], Score | None],
        salt: str = "",
    ) -> tuple[int, Score] | None:
        """The slot from which most can be used for a sequence that begins with ``tokens``.

        Args:
            tokens: of the sequence.
            usable: given a slot and the number of tokens that it shares, how good it is: a tuple
                that begins with the number of tokens that can be used, compared as a whole; None
                for not at all.
            salt: of the tenant; only its own slots are found.

        Returns:
            The slot with the highest score and the score, or None.
        """
        tokens = tokens if isinstance(tokens, list) else list(tokens)
        best: tuple[int, Score] | None = None
        seen: set[int] = set()
        for shared, slots in reversed(self._walk(tokens, salt)):
            if best is not None and best[1][0] > shared:
                break  # nobody above shares as much
            for slot in slots - seen:
                score = usable(slot, shared)
                if score is not None and (best is None or score > best[1]):
                    best = (slot, score)
            seen |= slots
        return best

    def _walk(self, tokens: list[int], salt: str) -> list[tuple[int, set[int]]]:
        """Down the tree along the tokens: how many are shared, and the slots that share them."""
        path: list[tuple[int, set[int]]] = []
        node = self._roots.get(salt)
        while node is not None and node.depth < len(tokens):
            child = node.children.get(tokens[node.depth])
            if child is None:
                break
            shared = common(child.edge, tokens, node.depth)
            path.append((node.depth + shared, child.slots))
            if shared < len(child.edge):
                break
            node = child
        return path

    def _join(self, node: _Node) -> None:
        """Merges a node that only leads to one other into that one."""
        (child,) = node.children.values()
        assert node.parent is not None
        child.edge = node.edge + child.edge
        child.parent = node.parent
        node.parent.children[child.edge[0]] = child

    def check(self) -> None:
        """Verifies the tree.

        Raises:
            AssertionError: it is broken, which is a bug of vattn.
        """
        found: dict[int, tuple[str, _Node]] = {}
        for salt, root in self._roots.items():
            assert root.slots, f"an empty tree is left for the salt {salt!r}"
            stack = [root]
            while stack:
                node = stack.pop()
                below = set(node.ends).union(*(c.slots for c in node.children.values()))
                assert node.slots == below, "the slots of a node are not those below it"
                if node.parent is not None:
                    assert node.edge, "an edge without tokens"
                    assert node.slots, "a node that leads nowhere"
                    assert node.ends or len(node.children) != 1, "a node that only leads to one"
                    assert node.depth == node.parent.depth + len(node.edge), "a wrong depth"
                for first, child in node.children.items():
                    assert (child.edge[0], child.parent) == (first, node), "a misplaced child"
                    stack.append(child)
                found |= dict.fromkeys(node.ends, (salt, node))
        assert found == self._ends, "the slots' ends are wrong"


def _upward(node: _Node) -> Iterator[_Node]:
    at: _Node | None = node
    while at is not None:
        yield at
        at = at.parent


def _split(child: _Node, at: int) -> _Node:
    """Puts a node before ``child`` that takes the first ``at`` tokens of its edge."""
    parent = child.parent
    assert parent is not None
    middle = _Node(child.edge[:at], parent, parent.depth + at)
    middle.slots = set(child.slots)
    middle.children[child.edge[at]] = child
    parent.children[child.edge[0]] = middle
    child.edge = child.edge[at:]
    child.parent = middle
    return middle


def common(edge: list[int], tokens: list[int], start: int) -> int:
    """How many tokens at the beginning of ``edge`` are those of ``tokens`` from ``start`` on."""
    end = min(len(edge), len(tokens) - start)
    done, step = 0, _MIN_STEP
    while done < end:
        stop = min(done + step, end)
        if edge[done:stop] != tokens[start + done : start + stop]:
            while edge[done] == tokens[start + done]:
                done += 1
            return done
        done, step = stop, 2 * step
    return done
