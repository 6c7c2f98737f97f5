"""The bytes that tokens stand for, which may be parts of characters."""

from __future__ import annotations

import re
from typing import Any

from vattn.engine.decoders import decoder_kinds

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SPACE = "\u2581"  # as SentencePiece writes one


class TokenBytes:
    """Tells the bytes of tokens; put together they are those of the text.

    Args:
        tokenizer: of transformers. Of one that is not of the ``tokenizers`` library, and neither
            byte-level nor with byte fallback, a token's bytes are those of its text.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._backend = getattr(tokenizer, "backend_tokenizer", None)
        if self._backend is None:
            return
        self._added = self._backend.get_added_tokens_decoder().keys()
        kinds = decoder_kinds(self._backend)
        self._byte_level = _byte_of_characters() if "ByteLevel" in kinds else None
        self._byte_fallback = "ByteFallback" in kinds

    def of(self, token: int, text: str | None) -> bytes | None:
        """Of one token.

        Args:
            token: its id.
            text: what it is decoded to by itself; None if it is none of the tokenizer's.
        """
        name = None if self._backend is None else self._backend.id_to_token(token)
        if name is not None and token not in self._added:
            if self._byte_level is not None and self._byte_level.keys() >= set(name):
                return bytes(map(self._byte_level.__getitem__, name))
            if self._byte_fallback:
                byte = _BYTE.fullmatch(name)
                return bytes.fromhex(byte[1]) if byte else name.replace(_SPACE, " ").encode()
        return text.encode(errors="replace") if text else None


def _byte_of_characters() -> dict[str, int]:
    """GPT-2's characters for bytes: printable ones are themselves, the rest follows U+0100."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (byte for byte in range(0x100) if byte not in printable)
    return {
        **{chr(byte): byte for byte in printable},
        **{chr(0x100 + number): byte for number, byte in enumerate(others)},
    }
