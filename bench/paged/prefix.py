"""Names of full blocks: a digest of all tokens up to the block's end, and of whose they are."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence

_DIGEST_BYTES = 16


class Chain:
    """The names of a sequence's full blocks, as far as they are known.

    Each is made of the one before and the tokens of its block, as in vLLM V1, so that a block is
    found only behind the same prefix. The first is made of the salt: two tenants share nothing.

    Args:
        salt: of the tenant.
        block_tokens: tokens of a block.
        names: of the first blocks.
    """

    __slots__ = ("_block_tokens", "_root", "names")

    def __init__(self, salt: str, block_tokens: int, names: Sequence[bytes] = ()) -> None:
        self._root = hashlib.blake2b(salt.encode(), digest_size=_DIGEST_BYTES).digest()
        self._block_tokens = block_tokens
        self.names = list(names)

    def name(self, tokens: Sequence[int], index: int) -> bytes:
        """The name of a block.

        Args:
            tokens: of the sequence; the same as in earlier calls, or more.
            index: of the block; at most one beyond the last that is known.
        """
        if index == len(self.names):
            parent = self.names[-1] if index else self._root
            first = index * self._block_tokens
            block = array("q", tokens[first : first + self._block_tokens])
            digest = hashlib.blake2b(parent + block.tobytes(), digest_size=_DIGEST_BYTES)
            self.names.append(digest.digest())
        return self.names[index]

    def first(self, blocks: int) -> Chain:
        """One of its own for a sequence that begins with the same blocks."""
        out = Chain("", self._block_tokens, self.names[:blocks])
        out._root = self._root
        return out
