"""Text while it grows: characters over tokens, spaces, special tokens, stop strings."""

from __future__ import annotations

import random
import tracemalloc
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from tests.text_cases import (
    BYTE_CHARACTERS,
    EMOJI,
    MAKERS,
    OF_BYTES,
    byte_level,
    ids_of,
    made,
    vocabulary,
)
from vattn.engine.decoders import Backend
from vattn.engine.detokenizer import Detokenizer, TextSource
from vattn.engine.stops import StopStrings
from vattn.sampling_params import SamplingParams

SOURCES = {name: TextSource(made(name)) for name in (*MAKERS, "slow")}
SLOW_AND_BYTES = ("slow", *OF_BYTES)
fallback = made("byte_fallback")


def detokenizer(name: str, prompt: Sequence[int] = (), **params: Any) -> Detokenizer:
    return Detokenizer(SOURCES[name], SamplingParams(**params), prompt)


def feed(text: Detokenizer, tokens: Sequence[int], cuts: int = 1) -> str:
    """Everything that it lets go, checked against what it says it has."""
    seen = ""
    for first in range(0, len(tokens), cuts):
        new, stop = text.append(tokens[first : first + cuts])
        seen += new
        assert text.text == seen
        assert stop == text.stop
    seen += text.finish()
    text.check()
    assert text.text == seen
    assert text.finish() == ""
    return seen


def decode(name: str, tokens: Sequence[int], skip: bool) -> str:
    """The tokenizer's own text; of byte fallback, runs of bytes read from the left."""
    tokenizer = SOURCES[name].tokenizer
    if name == "byte_fallback":
        tokens = _with_valid_runs([t for t in tokens if tokenizer.convert_ids_to_tokens(t)], skip)
    return str(
        tokenizer.decode(tokens, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
    )


def _with_valid_runs(tokens: Sequence[int], skip: bool) -> list[int]:
    """The token of U+FFFD for each byte that begins no character within its run."""
    first, instead = fallback.convert_tokens_to_ids(["<0x00>", "\ufffd"])
    if skip:
        tokens = [token for token in tokens if token not in SOURCES["byte_fallback"].special]
    out: list[int] = []
    at = 0
    while at < len(tokens):
        byte = [token - first for token in tokens[at : at + 4]]
        n = next((n for n in range(1, 5) if _is_character(byte[:n])), 0)
        out += tokens[at : at + n] if n else [instead if 0 <= byte[0] < 256 else tokens[at]]
        at += n or 1
    return out


def _is_character(values: Sequence[int]) -> bool:
    try:
        return len(bytes(values).decode()) == 1
    except ValueError:
        return False


# Text ---------------------------------------------------------------------------------------------


@st.composite
def outputs(draw: st.DrawFn, name: str, size: int = 60) -> list[int]:
    """Any tokens, and those of texts; special ones, invalid UTF-8 and ids without a token."""
    spoken = st.sampled_from([EMOJI, "the page s", "é🎉日本", " ", "👩‍👩‍👧"])
    last = vocabulary(name) - 1
    token = (st.integers(0, last) | st.just(last)).map(lambda one: [one])
    parts = draw(st.lists(token | spoken.map(lambda text: ids_of(name, text)), max_size=size))
    return [each for part in parts for each in part][: 2 * size]


@settings(max_examples=400, deadline=None)
@given(st.data(), st.sampled_from(sorted(SOURCES)), st.booleans(), st.integers(1, 70))
def test_the_text_is_the_decoding_of_the_output(
    data: st.DataObject, name: str, skip: bool, cuts: int
) -> None:
    tokens = data.draw(outputs(name))
    prompt = data.draw(outputs(name, size=3)) if name in SLOW_AND_BYTES[1:] else []
    wanted = decode(name, tokens, skip)
    assert feed(detokenizer(name, prompt, skip_special_tokens=skip), tokens) == wanted
    assert feed(detokenizer(name, prompt, skip_special_tokens=skip), tokens, cuts) == wanted
    assert SOURCES[name].text(prompt, tokens, skip) == wanted


@settings(max_examples=300, deadline=None)
@given(st.data(), st.sampled_from(["byte_fallback", "word_piece", "unigram", "words"]))
def test_the_text_continues_the_prompt(data: st.DataObject, name: str) -> None:
    skip = data.draw(st.booleans())
    prompt, tokens = data.draw(outputs(name, size=8)), data.draw(outputs(name))
    if name == "byte_fallback":  # a character that begins in the prompt is not continued
        prompt += fallback.convert_tokens_to_ids(["a"])
    before, whole = decode(name, prompt, skip), decode(name, prompt + tokens, skip)
    for cuts in (1, 3, len(tokens) + 1):
        text = feed(detokenizer(name, prompt, skip_special_tokens=skip), tokens, cuts)
        assert before + text == whole


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=40), st.integers(1, 4))
def test_any_text_comes_back(text: str, cuts: int) -> None:
    for name in OF_BYTES:
        tokens = made(name).encode(text, add_special_tokens=False)
        assert feed(detokenizer(name), tokens, cuts) == text
    tokens = [fallback.convert_tokens_to_ids(f"<0x{byte:02X}>") for byte in text.encode()]
    whole = feed(detokenizer("byte_fallback", ids_of("byte_fallback", "a")), tokens, cuts)
    assert whole == text
    assert feed(detokenizer("slow"), list(text.encode()), cuts) == text


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=80), st.integers(1, 9))
def test_any_bytes_read_as_the_decoder_reads_them(data: bytes, cuts: int) -> None:
    for name in OF_BYTES:
        tokens = made(name).convert_tokens_to_ids([BYTE_CHARACTERS[byte] for byte in data])
        assert feed(detokenizer(name), tokens, cuts) == made(name).decode(tokens)
    assert feed(detokenizer("slow"), list(data), cuts) == data.decode(errors="replace")


@pytest.mark.parametrize("name", SLOW_AND_BYTES)
def test_no_part_of_a_character_is_let_go(name: str) -> None:
    tokens = ids_of(name, EMOJI)
    for cuts in (1, 3, 5):
        text, seen = detokenizer(name), ""
        for first in range(0, len(tokens), cuts):
            new, _ = text.append(tokens[first : first + cuts])
            seen += new
            assert "\ufffd" not in new
            assert EMOJI.startswith(seen)
        assert seen == EMOJI
        assert text.finish() == ""


@pytest.mark.parametrize("name", SOURCES)
def test_text_keeps_up_with_the_tokens(name: str) -> None:
    """What is read at once has all characters that are complete, and not a token less."""
    tokens = ids_of(name, "the page s")
    assert len(tokens) >= 3
    for n in range(1, len(tokens) + 1):
        for cuts in (1, 2, n):
            text = detokenizer(name)
            seen = "".join(
                text.append(tokens[at : min(n, at + cuts)])[0] for at in range(0, n, cuts)
            )
            assert seen == decode(name, tokens[:n], True)


def test_an_unfinished_character_is_told_at_the_end() -> None:
    for name in SLOW_AND_BYTES:
        half = [0xC3] if name == "slow" else [made(name).convert_tokens_to_ids("Ã")]
        text = detokenizer(name)
        assert text.append(half) == ("", None)
        assert text.finish() == "\ufffd"


@pytest.mark.parametrize("name", ["slow", *MAKERS])
def test_what_is_complete_is_told_though_the_last_token_is_not(name: str) -> None:
    half = {"slow": 0xC3, "byte_fallback": fallback.convert_tokens_to_ids("<0xC3>")}
    tokens = ids_of(name, "the page")
    last = half.get(name) or made(name).convert_tokens_to_ids("Ã" if name in OF_BYTES else "\ufffd")
    assert detokenizer(name).append([*tokens, last])[0] == decode(name, tokens, True)


@pytest.mark.parametrize("name", ["byte_level", "byte_fallback", "slow"])
def test_bytes_that_are_no_text_do_not_wait_for_ever(name: str) -> None:
    bad = {"slow": 0xFF, "byte_fallback": fallback.convert_tokens_to_ids("<0xFF>")}
    token = bad.get(name) or made(name).convert_tokens_to_ids("ÿ")
    text = detokenizer(name)
    waiting = 16 if name == "slow" else 4
    for n in range(1, 400):
        text.append([token])
        assert len(text.text) >= n - waiting
    text.finish()
    assert text.text == "\ufffd" * 399


@pytest.mark.parametrize("name", MAKERS)
def test_what_waits_is_little(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step decodes a few tokens, whatever they are: a text costs no more the longer it is."""
    seen: list[int] = []
    backend = SOURCES[name]._backend
    assert backend is not None
    text = backend.decoder([], frozenset())
    rng = random.Random(name)
    for token in rng.choices(range(vocabulary(name)), k=500) + [vocabulary(name)] * 100:
        text.push([token])
        seen.append(len(text._waiting))  # type: ignore[attr-defined]
    assert max(seen) <= 5


def test_ids_without_a_token_are_no_text() -> None:
    for name in OF_BYTES:  # nor do they part what is one character
        lead, rest = made(name).convert_tokens_to_ids(["á", "³"])
        for cuts in range(1, 20):
            tokens = [lead, *[5000] * 12, rest]
            assert feed(detokenizer(name), tokens, cuts) == "\ufffd"
    for name in MAKERS:
        word = made(name).convert_tokens_to_ids("a")
        tokens = [word, 5000, word]
        assert feed(detokenizer(name), tokens) == decode(name, tokens, False)


def test_added_tokens_are_text_unless_special() -> None:
    tokenizer = byte_level()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im end|>"]})
    source = TextSource(tokenizer)
    tokens = tokenizer.encode("a<think é>b<|im end|>c é", add_special_tokens=False)
    for skip, wanted in ((True, "a<think é>bc é"), (False, "a<think é>b<|im end|>c é")):
        text = Detokenizer(source, SamplingParams(skip_special_tokens=skip), [])
        assert feed(text, tokens) == wanted
        assert tokenizer.decode(tokens, skip_special_tokens=skip) == wanted


def test_spaces_continue_the_prompt() -> None:
    prompt = fallback.convert_tokens_to_ids(["<s>", "▁the", "▁page"])
    words = ["s", "▁a", "</s>", "▁the", "▁▁▁", "cat", "▁", "▁日", "本"]
    party = ["<0xF0>", "<0x9F>", "<0x8E>", "<0x89>"]
    output = fallback.convert_tokens_to_ids([*words, *party, "é", "."])
    for skip in (True, False):
        text = feed(detokenizer("byte_fallback", prompt, skip_special_tokens=skip), output)
        whole = fallback.decode(prompt + output, skip_special_tokens=skip)
        before = fallback.decode(prompt, skip_special_tokens=skip)
        assert before + text == whole, skip
        assert "🎉é." in text
    # A token without text does not hide what was before it.
    assert feed(detokenizer("byte_fallback", prompt), [9999, *output[3:4]]) == " the"
    # With nothing before it, the first space is stripped, as the decoder does.
    ids = fallback.convert_tokens_to_ids(["▁the", "▁page"])
    assert feed(detokenizer("byte_fallback"), ids) == fallback.decode(ids) == "the page"
    assert feed(detokenizer("byte_fallback", [fallback.bos_token_id]), ids) == "the page"
    assert feed(detokenizer("byte_fallback", prompt), ids) == " the page"


def test_a_space_is_kept_where_a_stream_began_anew() -> None:
    run = fallback.convert_tokens_to_ids(["<0xFF>"] * 9 + ["▁the"])
    assert feed(detokenizer("byte_fallback"), run) == "\ufffd" * 9 + " the"
    nothing = [9999] * 20
    word = fallback.convert_tokens_to_ids(["▁", "▁the"])
    assert feed(detokenizer("byte_fallback"), [*nothing, *word[1:]]) == "the"
    assert feed(detokenizer("byte_fallback"), [*word[:1], *nothing, *word[1:]]) == " the"


def test_text_that_was_given_is_not_taken_back() -> None:
    # The decoder of byte tokens writes a whole run as invalid when its end is; the valid beginning
    # has been given by then.
    run = ["▁a", "<0xC3>", "<0xA9>", "<0xFF>", "<0xC3>", "<0xA9>", "▁the"]
    ids = fallback.convert_tokens_to_ids(run)
    assert fallback.decode(ids) == "a" + "\ufffd" * 5 + " the"
    for cuts in range(1, 8):
        assert feed(detokenizer("byte_fallback"), ids, cuts) == "aé\ufffdé the"


def test_no_text_is_lost_to_a_decoder_that_changes_what_it_gave() -> None:
    backend = Tokenizer(models.WordLevel({"a": 0, "b": 1, "c": 2}, unk_token="c"))
    backend.decoder = decoders.Sequence([decoders.Fuse(), decoders.Replace("ab", "xyz")])
    text = Backend(backend).decoder([], frozenset())
    assert [text.push([token]) for token in (0, 1, 2, 0, 1)] == ["a", "b", "c", "a", "b"]
    assert text.flush() == ""


def test_a_prompt_that_ends_within_a_character() -> None:
    assert feed(detokenizer("slow", [0xC3]), [0xA9, *b"ok"]) == "\ufffdok"
    first, second, word = fallback.convert_tokens_to_ids(["<0xC3>", "<0xA9>", "▁the"])
    for prompt in ([first], [word, first]):
        assert feed(detokenizer("byte_fallback", prompt), [second, word]) == "\ufffd the"
        assert feed(detokenizer("byte_fallback", prompt), [word]) == " the"
    for name in OF_BYTES:
        half, rest, word = made(name).convert_tokens_to_ids(["Ã", "©", "o"])
        assert feed(detokenizer(name, [word, half]), [rest, word]) == "\ufffdo"


# Stop strings -------------------------------------------------------------------------------------


def stopped_at(text: str, stops: Sequence[str], include: bool) -> tuple[str, str | None]:
    """The reference: one character after another."""
    for end in range(1, len(text) + 1):
        ended = [stop for stop in stops if text[:end].endswith(stop)]
        if ended:
            stop = max(ended, key=len)
            return text[: end if include else end - len(stop)], stop
    return text, None


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.text("ab", min_size=1, max_size=4), max_size=12),
    st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=3),
    st.booleans(),
)
def test_the_first_stop_string_ends_the_text(
    pieces: list[str], stops: list[str], include: bool
) -> None:
    search, seen, found = StopStrings(stops, include), "", None
    wanted, stop = stopped_at("".join(pieces), stops, include)
    for piece in pieces:
        new, found = search.push(piece, may_stop=True)
        seen += new
        assert wanted.startswith(seen), "a part of a stop string was let go"
        if found:
            break
    seen += search.flush()
    assert (seen, found) == (wanted, stop)


@pytest.mark.parametrize("cut", [1, 7, 1000])
def test_long_stop_strings_take_linear_memory(cut: int) -> None:
    stop = "ab" * 10_000
    nearly = stop[:-1] + "a"
    text = "x" + nearly + "c" + stop
    tracemalloc.start()
    try:
        search = StopStrings([stop, "ax" * 10_000], include=False)
        assert tracemalloc.get_traced_memory()[1] < 5 * len(stop)
        seen, found = "", None
        for first in range(0, len(text), cut):
            new, found = search.push(text[first : first + cut], may_stop=True)
            seen += new
            if found:
                break
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # Pieces of one character are what weighs most.
    assert peak < 50 * len(text)
    assert (seen, found) == (text[: -len(stop)], stop)


def test_what_is_held_is_not_copied_by_every_piece() -> None:
    """All of a long stop string but the end; the longest string that is made is the last one."""
    stop = "a" * 20_000
    search = StopStrings([stop + "b"], include=False)
    made = 0
    tracemalloc.start()
    try:
        for _ in range(len(stop)):
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            assert search.push("a", may_stop=True) == ("", None)
            made = max(made, tracemalloc.get_traced_memory()[1] - before)
    finally:
        tracemalloc.stop()
    assert made < len(stop) // 2
    assert search.push("c", may_stop=True) == (stop + "c", None)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.tuples(st.text("ab", min_size=1, max_size=3), st.booleans()), max_size=9),
    st.lists(st.text("ab", min_size=1, max_size=5), min_size=1, max_size=4),
    st.booleans(),
)
def test_stop_strings_count_where_they_may(
    pieces: list[tuple[str, bool]], stops: list[str], include: bool
) -> None:
    whole, wanted, stop, end = "".join(piece for piece, _ in pieces), "", None, 0
    counts = [may_stop for piece, may_stop in pieces for _ in piece]
    wanted = whole
    for end in range(1, len(whole) + 1):
        ended = [stop for stop in stops if counts[end - 1] and whole[:end].endswith(stop)]
        if ended:
            stop = max(ended, key=len)
            wanted = whole[: end if include else end - len(stop)]
            break
    search, seen, found = StopStrings(stops, include), "", None
    for piece, may_stop in pieces:
        new, found = search.push(piece, may_stop)
        seen += new
        if found:
            break
    assert not (found and search.held)
    assert (seen + search.flush(), found) == (wanted, stop)


@settings(max_examples=150, deadline=None)
@given(st.data(), st.sampled_from(sorted(SOURCES)), st.booleans(), st.integers(1, 9))
def test_stop_strings_at_every_cut(
    data: st.DataObject, name: str, include: bool, cuts: int
) -> None:
    tokens = data.draw(outputs(name, size=20))
    whole = decode(name, tokens, True)
    first = data.draw(st.integers(0, max(0, len(whole) - 1)))
    stop = whole[first : first + data.draw(st.integers(1, 5))] or "x"
    wanted, found = stopped_at(whole, [stop], include)
    text = detokenizer(name, stop=stop, include_stop_str_in_output=include)
    seen = feed(text, tokens, cuts)
    if found and text.stop is None:  # only the end shows that a character is unfinished
        plain = detokenizer(name)
        assert stop not in "".join([plain.append([token])[0] for token in tokens])
        wanted, found = whole, None
    assert (seen, text.stop) == (wanted, found)


@pytest.mark.parametrize("include", [False, True])
def test_stop_strings_span_tokens(include: bool) -> None:
    tokens = list("the end. é🛑 more".encode())
    for stop in ("end", "d. é", "🛑", "e"):
        text = detokenizer("slow", stop=stop, include_stop_str_in_output=include)
        wanted, _ = stopped_at("the end. é🛑 more", [stop], include)
        assert feed(text, tokens, cuts=3) == wanted
        assert text.stop == stop
        assert bytes(tokens[: text.tokens]).decode().endswith(stop)


def test_text_is_held_back_only_while_it_may_be_a_stop_string() -> None:
    text = detokenizer("slow", stop=["</s>", "\n\n"])
    news = [text.append([byte])[0] for byte in b"a</b>\nc\n"]
    assert news == ["a", "", "", "</b", ">", "", "\nc", ""]
    assert text.finish() == "\n"
    assert text.stop is None


def test_stop_strings_within_min_tokens_do_not_count() -> None:
    text = detokenizer("slow", stop=["ab"], min_tokens=4)
    assert feed(text, b"abababab") == "abab"
    assert text.tokens == 6
    # One that begins within them and ends after does.
    text = detokenizer("slow", stop=["ab"], min_tokens=3)
    assert feed(text, b"abab") == "ab"
    assert text.stop == "ab"
    text = detokenizer("slow", stop=["ab"], min_tokens=4)
    assert feed(text, b"abab") == "abab"
