"""Tokenizers of every kind, small and made here, for tests of text."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tests.engine_cases import EMBEDDED_PATH

EMOJI = "naïve 🎉👩‍👩‍👧 日本語 — ok\n\tdef f(x): pass"
SPECIAL = ("<unk>", "<s>", "</s>")
WORDS = ("the", "page", "s", "a", ".", "cat", "é", "日", "本", "🎉", "�", "1")


def _byte_characters() -> list[str]:
    """How GPT-2's vocabulary writes each byte."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


BYTE_CHARACTERS = _byte_characters()


def _fast(model: Any, decoder: Any, splits: Any = None) -> Any:
    tokenizer = Tokenizer(model)
    if splits is not None:
        tokenizer.pre_tokenizer = splits
    if decoder is not None:
        tokenizer.decoder = decoder
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in SPECIAL])
    tokenizer.add_tokens([AddedToken("<think é>", special=False)])
    fast: Any = PreTrainedTokenizerFast
    return fast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def _vocabulary(names: Sequence[str]) -> dict[str, int]:
    return {name: i for i, name in enumerate(dict.fromkeys([*SPECIAL, *names]))}


def embedded() -> Any:
    """Of bytes, with merges that were learnt; the model's that comes with vattn."""
    return AutoTokenizer.from_pretrained(EMBEDDED_PATH)


def byte_level() -> Any:
    """As GPT-2: all bytes, and tokens that hold parts of characters."""
    parts = (b"the", b" page", b"\xf0\x9f", b"\x8e\x89", b"\xe2\x80", b"\x8d\xf0\x9f", b"\xc3")
    names = [*BYTE_CHARACTERS, *("".join(BYTE_CHARACTERS[b] for b in part) for part in parts)]
    splits = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return _fast(models.BPE(vocab=_vocabulary(names), merges=[]), decoders.ByteLevel(), splits)


def byte_fallback() -> Any:
    """As Llama 2: spaces as U+2581, characters that are no token as bytes, one space stripped."""
    names = [*(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁▁▁"]
    names += [f"▁{word}" for word in WORDS] + list(WORDS)
    model = models.BPE(
        vocab=_vocabulary(names), merges=[], unk_token="<unk>", byte_fallback=True, fuse_unk=True
    )
    decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return _fast(model, decoder, pre_tokenizers.Metaspace())


def word_piece() -> Any:
    """As BERT: what continues a word begins with ##."""
    names = [*WORDS, *(f"##{word}" for word in WORDS), "'", "don", "##n't"]
    model = models.WordPiece(_vocabulary(names), unk_token="<unk>")
    return _fast(model, decoders.WordPiece(), pre_tokenizers.Whitespace())


def unigram() -> Any:
    """As T5: spaces as U+2581, the first one left out."""
    names = ["▁", *(f"▁{word}" for word in WORDS), *WORDS]
    pieces = [(name, -float(i)) for name, i in _vocabulary(names).items()]
    return _fast(models.Unigram(pieces, unk_id=0), decoders.Metaspace(), pre_tokenizers.Metaspace())


def words() -> Any:
    """Whole words, no decoder: spaces between all."""
    model = models.WordLevel(_vocabulary(WORDS), unk_token="<unk>")
    return _fast(model, None, pre_tokenizers.Whitespace())


class Slow:
    """A tokenizer in Python only, of UTF-8 bytes; 256 is special."""

    all_special_ids = (256,)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False, **_: Any) -> str:
        if skip_special_tokens:
            ids = [token for token in ids if token != 256]
        pieces = [b"<end>" if token == 256 else bytes([token]) for token in ids]
        return b"".join(pieces).decode(errors="replace")


MAKERS = {
    "embedded": embedded,
    "byte_level": byte_level,
    "byte_fallback": byte_fallback,
    "word_piece": word_piece,
    "unigram": unigram,
    "words": words,
}
OF_BYTES = ("embedded", "byte_level")


@functools.cache
def made(name: str) -> Any:
    """One of the tokenizers."""
    return Slow() if name == "slow" else MAKERS[name]()


def vocabulary(name: str) -> int:
    """Ids of a tokenizer; of a fast one a few more, which have no token."""
    return 257 if name == "slow" else len(made(name)) + 3


def ids_of(name: str, text: str) -> list[int]:
    """Tokens of a text, no special ones among them."""
    if name == "slow":
        return list(text.encode())
    special = made(name).all_special_ids
    return [token for token in made(name).encode(text) if token not in special]
