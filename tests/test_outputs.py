"""Text while it grows: characters over tokens, stop strings, what is told of requests and when."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import vattn.models
from vattn.engine.detokenizer import Detokenizer, TextSource
from vattn.engine.outputs import OutputProcessor
from vattn.engine.sampled import HostLogprobs, HostSampled
from vattn.engine.stops import StopStrings
from vattn.outputs import CompletionOutput, RequestOutput
from vattn.request import FinishReason, Request, Status
from vattn.sampling_params import RequestOutputKind, SamplingParams

TINY = Path(vattn.models.__path__[0]) / "tiny"
EOS = 2
EMOJI = "naïve 🎉👩‍👩‍👧 日本語 — ok\n\tdef f(x): pass"


def _embedded() -> Any:
    return AutoTokenizer.from_pretrained(TINY)


def _byte_fallback() -> Any:
    """As Llama 2: spaces as U+2581, characters that are no token as bytes, one space stripped."""
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    names += ["▁", "▁the", "▁page", "s", "▁a", ".", "cat", "é", "▁日", "本", "▁▁▁"]
    model = models.BPE(
        vocab={name: i for i, name in enumerate(names)},
        merges=[],
        unk_token="<unk>",
        byte_fallback=True,
        fuse_unk=True,
    )
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in names[:3]])
    fast: Any = PreTrainedTokenizerFast
    return fast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


class _Slow:
    """A tokenizer in Python only, of UTF-8 bytes; 256 is special."""

    all_special_ids = (256,)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False, **_: Any) -> str:
        if skip_special_tokens:
            ids = [token for token in ids if token != 256]
        pieces = [b"<end>" if token == 256 else bytes([token]) for token in ids]
        return b"".join(pieces).decode(errors="replace")


embedded = _embedded()
fallback = _byte_fallback()
sources = {name: TextSource(t) for name, t in [("embedded", embedded), ("slow", _Slow())]}
VOCABULARY = {"embedded": 2048, "slow": 257}


def detokenizer(source: TextSource, prompt: Sequence[int] = (), **params: Any) -> Detokenizer:
    return Detokenizer(source, SamplingParams(**params), prompt)


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


# Text ---------------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(st.data(), st.sampled_from(sorted(sources)), st.booleans(), st.integers(1, 5))
def test_the_text_is_the_decoding_of_the_output(
    data: st.DataObject, name: str, skip: bool, cuts: int
) -> None:
    source = sources[name]
    tokens = data.draw(st.lists(st.integers(0, VOCABULARY[name] - 1), max_size=60))
    text = feed(detokenizer(source, [5, 6, 7], skip_special_tokens=skip), tokens, cuts)
    assert text == source.tokenizer.decode(tokens, skip_special_tokens=skip)


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=40), st.integers(1, 4))
def test_any_text_comes_back(text: str, cuts: int) -> None:
    tokens = embedded.encode(text, add_special_tokens=False)
    assert feed(detokenizer(sources["embedded"]), tokens, cuts) == text
    assert feed(detokenizer(sources["slow"]), list(text.encode()), cuts) == text


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=80))
def test_any_bytes_read_as_the_decoder_reads_them(data: bytes) -> None:
    pieces = sources["embedded"].pieces
    assert pieces is not None
    by_byte = {pieces[i][0]: i for i in range(2048) if len(pieces[i]) == 1}
    tokens = [by_byte[byte] for byte in data]
    assert feed(detokenizer(sources["embedded"]), tokens) == embedded.decode(tokens)
    assert feed(detokenizer(sources["slow"]), list(data)) == data.decode(errors="replace")


@pytest.mark.parametrize("name", sources)
def test_no_part_of_a_character_is_let_go(name: str) -> None:
    source = sources[name]
    tokens = list(EMOJI.encode()) if name == "slow" else embedded.encode(EMOJI)[1:]
    text, seen = detokenizer(source), ""
    for token in tokens:
        new, _ = text.append([token])
        seen += new
        assert "\ufffd" not in new
        assert EMOJI.startswith(seen)
    assert seen == EMOJI
    assert text.finish() == ""


def test_text_keeps_up_with_the_tokens() -> None:
    text = detokenizer(sources["embedded"])
    for token in embedded.encode("The page is mapped.", add_special_tokens=False):
        assert text.append([token])[0] == embedded.decode([token])


def test_an_unfinished_character_is_told_at_the_end() -> None:
    for name, tokens in (("slow", list("é".encode())[:1]), ("embedded", embedded.encode("é")[1:2])):
        text = detokenizer(sources[name])
        assert text.append(tokens) == ("", None)
        assert text.finish() == "\ufffd"


def test_bytes_that_are_no_text_do_not_wait_for_ever() -> None:
    text = detokenizer(sources["slow"])
    seen = sum(len(text.append([0xFF])[0]) for _ in range(400))
    assert seen > 350
    assert len(text.text + text.finish()) >= 400
    assert text.text == "\ufffd" * 400


def test_ids_without_a_token_are_no_text() -> None:
    tokens = [42, 5000, 43]
    assert feed(detokenizer(sources["embedded"]), tokens) == embedded.decode(tokens)


def test_added_tokens_are_text_unless_special() -> None:
    tokenizer = _embedded()
    tokenizer.add_tokens(["<think é>"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im end|>"]})
    source = TextSource(tokenizer)
    tokens = tokenizer.encode("a<think é>b<|im end|>c é", add_special_tokens=False)
    for skip, wanted in ((True, "a<think é>bc é"), (False, "a<think é>b<|im end|>c é")):
        assert feed(detokenizer(source, skip_special_tokens=skip), tokens) == wanted
        assert tokenizer.decode(tokens, skip_special_tokens=skip) == wanted


def test_spaces_continue_the_prompt() -> None:
    source = TextSource(fallback)
    assert source.pieces is None
    prompt = fallback.convert_tokens_to_ids(["<s>", "▁the", "▁page"])
    words = ["s", "▁a", "</s>", "▁the", "▁▁▁", "cat", "▁", "▁日", "本"]
    party = ["<0xF0>", "<0x9F>", "<0x8E>", "<0x89>"]
    output = fallback.convert_tokens_to_ids([*words, *party, "é", "."])
    for skip in (True, False):
        text = feed(detokenizer(source, prompt, skip_special_tokens=skip), output)
        whole = fallback.decode(prompt + output, skip_special_tokens=skip)
        before = fallback.decode(prompt, skip_special_tokens=skip)
        assert before + text == whole, skip
        assert "🎉é." in text
    # A token without text does not hide what was before it.
    assert feed(detokenizer(source, prompt), [9999, *output[3:4]]) == " the"
    # With nothing before it, the first space is stripped, as the decoder does.
    ids = fallback.convert_tokens_to_ids(["▁the", "▁page"])
    assert feed(detokenizer(source), ids) == fallback.decode(ids) == "the page"
    assert feed(detokenizer(source, prompt), ids) == " the page"


def test_text_that_was_given_is_not_taken_back() -> None:
    # The decoder of byte tokens writes a whole run as invalid when its end is; the valid beginning
    # has been given by then.
    source = TextSource(fallback)
    run = fallback.convert_tokens_to_ids(["▁a", "<0xC3>", "<0xA9>", "<0xFF>", "▁the"])
    assert feed(detokenizer(source), run) == "aé\ufffd the"


def test_a_prompt_that_ends_within_a_character() -> None:
    half = list("é".encode())
    assert feed(detokenizer(sources["slow"], half[:1]), [*half[1:], *b"ok"]) == "\ufffdok"


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


@pytest.mark.parametrize("include", [False, True])
def test_stop_strings_span_tokens(include: bool) -> None:
    tokens = list("the end. é🛑 more".encode())
    for stop in ("end", "d. é", "🛑", "e"):
        text = detokenizer(sources["slow"], stop=stop, include_stop_str_in_output=include)
        wanted, _ = stopped_at("the end. é🛑 more", [stop], include)
        assert feed(text, tokens, cuts=3) == wanted
        assert text.stop == stop
        assert bytes(tokens[: text.tokens]).decode().endswith(stop)


def test_text_is_held_back_only_while_it_may_be_a_stop_string() -> None:
    text = detokenizer(sources["slow"], stop=["</s>", "\n\n"])
    news = [text.append([byte])[0] for byte in b"a</b>\nc\n"]
    assert news == ["a", "", "", "</b", ">", "", "\nc", ""]
    assert text.finish() == "\n"
    assert text.stop is None


def test_stop_strings_within_min_tokens_do_not_count() -> None:
    text = detokenizer(sources["slow"], stop=["ab"], min_tokens=4)
    assert feed(text, b"abababab") == "abab"
    assert text.tokens == 6
    # One that begins within them and ends after does.
    text = detokenizer(sources["slow"], stop=["ab"], min_tokens=3)
    assert feed(text, b"abab") == "ab"
    assert text.stop == "ab"
    text = detokenizer(sources["slow"], stop=["ab"], min_tokens=4)
    assert feed(text, b"abab") == "abab"


# Requests -----------------------------------------------------------------------------------------


def request(
    text: str = "", *, index: int = 0, stop_ids: Sequence[int] = (EOS,), **params: Any
) -> Request:
    prompt = embedded.encode(text or "A page")
    made = Request(f"r.{index}", prompt, SamplingParams(**params), 4000, index=index)
    made.stop_ids = frozenset([EOS, *made.params.stop_ids])
    return made


def step(processor: OutputProcessor, requests: Sequence[Request], tokens: Sequence[int]) -> Any:
    """What an engine does with a step's tokens."""
    for each, token in zip(requests, tokens, strict=True):
        if each.finished:
            continue
        each.tokens.append(token)
        if token in each.stop_ids:
            end(each, FinishReason.STOP, token if token in each.params.stop_ids else None)
    stopped = processor.process(requests)
    for each, stop in stopped:
        assert isinstance(stop, str)
        end(each, FinishReason.STOP, stop)
    processor.check()
    return stopped


def end(each: Request, reason: FinishReason, why: int | str | None = None) -> None:
    each.status, each.finish_reason, each.stop_reason = Status.FINISHED, reason, why


def ids(text: str) -> list[int]:
    return list(embedded.encode(text, add_special_tokens=False))


def output(
    processor: OutputProcessor,
    requests: Sequence[Request],
    kind: RequestOutputKind = RequestOutputKind.CUMULATIVE,
) -> RequestOutput:
    return processor.request_output("r", "A page", requests[0].prompt_ids, requests, kind)


def one(processor: OutputProcessor, each: Request) -> CompletionOutput:
    (sample,) = output(processor, [each]).outputs
    return sample


def test_the_end_of_sequence_is_a_token_but_no_text() -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({}, "It is"),
        ({"skip_special_tokens": False}, "It is"),
        ({"skip_special_tokens": False, "include_stop_str_in_output": True}, "It is</s>"),
        ({"include_stop_str_in_output": True}, "It is"),
    ]
    for options, wanted in cases:
        each, processor = request(**options), OutputProcessor(embedded)
        processor.add(each)
        for token in [*ids("It is"), EOS]:
            step(processor, [each], [token])
        processor.ended([each])
        sample = one(processor, each)
        assert (sample.text, sample.finish_reason) == (wanted, "stop"), options
        assert sample.token_ids == [*ids("It is"), EOS]
        assert sample.stop_reason is None


def test_a_stop_token_is_a_token_but_no_text() -> None:
    tokens = ids("It is mapped")
    for include in (False, True):
        each = request(stop_token_ids=[tokens[-1]], include_stop_str_in_output=include)
        processor = OutputProcessor(embedded)
        processor.add(each)
        for token in tokens:
            step(processor, [each], [token])
        sample = one(processor, each)
        assert sample.text == embedded.decode(tokens if include else tokens[:-1])
        assert (sample.token_ids, sample.stop_reason) == (tokens, tokens[-1])


@pytest.mark.parametrize("include", [False, True])
def test_a_stop_string_ends_a_request(include: bool) -> None:
    each = request(stop=["pped", "zz"], include_stop_str_in_output=include)
    other, processor = request(max_tokens=99), OutputProcessor(embedded)
    processor.add(each)
    processor.add(other)
    tokens = ids("It is mapped now")
    stops = [step(processor, [each, other], [token, token]) for token in tokens]
    (stop,) = [entry for entry in stops if entry]
    assert stop == [(each, "pped")]
    sample = one(processor, each)
    assert sample.text == ("It is mapped" if include else "It is ma")
    assert (sample.finish_reason, sample.stop_reason) == ("stop", "pped")
    assert one(processor, other).text == "It is mapped now"
    # Tokens that come later, as of a step that was under way, change nothing.
    each.tokens.append(5)
    assert one(processor, each).text == sample.text


def test_a_stop_string_at_the_last_token_wins_over_the_length() -> None:
    each, processor = request(stop="is"), OutputProcessor(embedded)
    processor.add(each)
    each.tokens += ids("It is")
    end(each, FinishReason.LENGTH)
    assert processor.process([each]) == [(each, "is")]
    each.finish_reason, each.stop_reason = FinishReason.STOP, "is"  # as the engine does then
    sample = one(processor, each)
    assert (sample.text, sample.finish_reason, sample.stop_reason) == ("It ", "stop", "is")


@pytest.mark.parametrize("reason", [FinishReason.LENGTH, FinishReason.ABORT, FinishReason.DEADLINE])
def test_what_was_held_back_is_told_at_the_end(reason: FinishReason) -> None:
    each, processor = request(stop=["now!"]), OutputProcessor(embedded)
    processor.add(each)
    for token in ids("It is now"):
        step(processor, [each], [token])
    assert one(processor, each).text == "It is "
    end(each, reason)
    processor.ended([each])
    sample = one(processor, each)
    assert (sample.text, sample.finish_reason) == ("It is now", reason.value)


@pytest.mark.parametrize("options", [{}, {"stop": ["is n", "qq"]}, {"skip_special_tokens": False}])
@pytest.mark.parametrize("every", [1, 3])
def test_deltas_add_up_to_the_whole(options: dict[str, Any], every: int) -> None:
    each, again = request(**options), request(**options)
    told, whole = OutputProcessor(embedded), OutputProcessor(embedded)
    told.add(each)
    whole.add(again)
    text, tokens, reasons = "", [], []
    for i, token in enumerate([*ids(EMOJI + " It is now"), EOS]):
        step(told, [each], [token])
        step(whole, [again], [token])
        if i % every == 0 or each.finished:
            for sample in output(told, [each], RequestOutputKind.DELTA).outputs:
                text += sample.text
                tokens += sample.token_ids
                reasons.append(sample.finish_reason)
            assert text == one(whole, again).text
        if each.finished:
            break
    assert (text, tokens) == (one(whole, again).text, each.output_ids)
    assert reasons[-1] == "stop"
    assert set(reasons[:-1]) == {None}
    assert output(told, [each], RequestOutputKind.DELTA).outputs == []


def test_an_output_of_samples() -> None:
    samples = [request(index=i, n=3) for i in range(3)]
    processor = OutputProcessor(embedded)
    for each in samples:
        processor.add(each)
    samples[0].cached = 2
    step(processor, samples[:2], [ids("It")[0], EOS])
    first = output(processor, samples, RequestOutputKind.DELTA)
    assert [sample.index for sample in first.outputs] == [0, 1]
    assert (first.finished, first.num_cached_tokens) == (False, 2)
    step(processor, samples, [EOS, EOS, EOS])
    second = output(processor, samples, RequestOutputKind.DELTA)
    assert [sample.index for sample in second.outputs] == [0, 2]
    assert second.finished
    whole = output(processor, samples)
    assert [sample.text for sample in whole.outputs] == ["It", "", ""]
    assert (whole.request_id, whole.prompt) == ("r", "A page")
    assert whole.prompt_token_ids == samples[0].prompt_ids


def test_an_output_is_a_snapshot() -> None:
    each, processor = request(logprobs=0), OutputProcessor(embedded)
    processor.add(each)
    step(processor, [each], [5])
    before = output(processor, [each])
    each.timings.last_token_s = 7.0
    step(processor, [each], [6])
    assert before.outputs[0].token_ids == [5]
    assert before.metrics.last_token_s == 0.0
    assert one(processor, each).token_ids == [5, 6]


def test_a_prompt_that_never_became_a_request() -> None:
    out = OutputProcessor(embedded).request_output("r", None, [], [], error="it is empty")
    (sample,) = out.outputs
    assert (sample.finish_reason, sample.error, out.finished) == ("error", "it is empty", True)
    assert (sample.text, sample.token_ids) == ("", [])


def sampled(tokens: list[int], rows: list[int]) -> HostSampled:
    n = len(rows)
    top = np.array([[4, 5]] * n)
    return HostSampled(
        tokens,
        HostLogprobs(
            index={row: i for i, row in enumerate(rows)},
            counts=[2] * n,
            logprob=np.full(n, -1.5),
            rank=np.full(n, 3),
            top_ids=top,
            top_logprobs=np.full((n, 2), -0.5),
        ),
    )


def test_logprobs_come_with_the_text_of_their_tokens() -> None:
    each, ended, plain = request(logprobs=2), request(logprobs=2), request()
    processor = OutputProcessor(embedded)
    for made in (each, ended, plain):
        processor.add(made)
    end(ended, FinishReason.ABORT)  # while the step was under way: its token is not appended
    for made in (plain, each):
        made.tokens.append(300)
    processor.process([plain, ended, each], sampled([300, 300, 300], [1, 2]))
    assert ended.logprobs == []
    assert one(processor, plain).logprobs is None
    sample = one(processor, each)
    assert sample.logprobs is not None
    (entry,) = sample.logprobs
    assert list(entry) == [300, 4, 5]
    assert (entry[300].logprob, entry[300].rank, entry[4].rank) == (-1.5, 3, 1)
    assert [entry[t].decoded_token for t in entry] == [embedded.decode([t]) for t in entry]
    each.tokens.append(4)
    processor.process([each], sampled([4], [0]))
    (new,) = processor.completion(each, RequestOutputKind.DELTA).logprobs or []
    assert set(new) == {4, 5}
    assert new[4].decoded_token == embedded.decode([4])
    processor.check()


def test_without_a_tokenizer_there_are_only_tokens() -> None:
    processor = OutputProcessor()
    each = request(logprobs=2)
    processor.add(each)
    each.tokens.append(300)
    processor.process([each], sampled([300], [0]))
    sample = one(processor, each)
    assert (sample.text, sample.token_ids) == ("", [300])
    assert sample.logprobs is not None
    assert sample.logprobs[0][300].decoded_token is None
    with pytest.raises(ValueError, match=r"\['x'\].*stop strings need a tokenizer"):
        processor.add(request(stop="x"))
    quiet = request(detokenize=False)
    with_text = OutputProcessor(embedded)
    with_text.add(quiet)
    quiet.tokens.append(300)
    assert one(with_text, quiet).text == ""


def test_only_those_that_need_it_are_looked_at_in_a_step() -> None:
    processor = OutputProcessor(embedded)
    plain, stop = request(), request(stop="x")
    processor.add(plain)
    processor.add(stop)
    processor.ended([plain, stop])
    plain.tokens += ids("x y")
    stop.tokens += ids("x y")
    assert processor.process([plain, stop]) == []
    assert plain.output.read == len(plain.prompt_ids)
    assert one(processor, plain).text == "x y"
