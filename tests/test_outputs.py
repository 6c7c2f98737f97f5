"""What is told of requests and when: text, stop strings, log probabilities, use of the cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from tests.text_cases import EMOJI, made
from vattn.engine.outputs import OutputProcessor
from vattn.engine.sampled import HostLogprobs, HostSampled
from vattn.outputs import CompletionOutput, KVUsage, Logprob, RequestOutput
from vattn.request import FinishReason, Request, Status
from vattn.sampling_params import RequestOutputKind, SamplingParams

EOS = 2
DELTA = RequestOutputKind.DELTA
embedded = made("embedded")


def request(
    text: str = "", *, index: int = 0, stop_ids: Sequence[int] = (EOS,), **params: Any
) -> Request:
    prompt = embedded.encode(text or "A page")
    new = Request(f"r.{index}", prompt, SamplingParams(**params), 4000, index=index)
    new.stop_ids = frozenset([EOS, *new.params.stop_ids])
    return new


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


@pytest.mark.parametrize("which", [0, 1, 2, 3])
def test_stop_strings_within_min_tokens_are_text(which: int) -> None:
    """As in vLLM: one counts if its last token comes after so many."""
    tokens = [token for word in ("is", " ma", "ped") * 3 for token in ids(word)]
    texts = [embedded.decode(tokens[: n + 1]) for n in range(len(tokens))]
    counts = [n + 1 for n, text in enumerate(texts) if text.endswith("maped")]
    assert len(counts) == 3
    min_tokens = ([0, *counts])[which]
    each = request(stop="maped", min_tokens=min_tokens, max_tokens=99)
    processor = OutputProcessor(embedded)
    processor.add(each)
    for token in tokens:
        step(processor, [each], [token])
    if which == 3:
        end(each, FinishReason.LENGTH)
    sample, count = one(processor, each), [*counts, len(tokens)][which]
    assert sample.token_ids == tokens[:count]
    assert sample.text == (texts[count - 1].removesuffix("maped") if which < 3 else texts[-1])
    assert sample.stop_reason == ("maped" if which < 3 else None)


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
            for sample in output(told, [each], DELTA).outputs:
                text += sample.text
                tokens += sample.token_ids
                reasons.append(sample.finish_reason)
            assert text == one(whole, again).text
        if each.finished:
            break
    assert (text, tokens) == (one(whole, again).text, each.output_ids)
    assert reasons[-1] == "stop"
    assert set(reasons[:-1]) == {None}
    assert output(told, [each], DELTA).outputs == []


def test_an_output_of_samples() -> None:
    samples = [request(index=i, n=3) for i in range(3)]
    processor = OutputProcessor(embedded)
    for each in samples:
        processor.add(each)
    samples[0].cached = 2
    step(processor, samples[:2], [ids("It")[0], EOS])
    first = output(processor, samples, DELTA)
    assert [sample.index for sample in first.outputs] == [0, 1]
    assert (first.finished, first.num_cached_tokens) == (False, 2)
    step(processor, samples, [EOS, EOS, EOS])
    second = output(processor, samples, DELTA)
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
    for one_of_them in (each, ended, plain):
        processor.add(one_of_them)
    end(ended, FinishReason.ABORT)  # while the step was under way: its token is not appended
    for one_of_them in (plain, each):
        one_of_them.tokens.append(300)
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
    (new,) = processor.completion(each, DELTA).logprobs or []
    assert set(new) == {4, 5}
    assert new[4].decoded_token == embedded.decode([4])
    processor.check()


class NoFours:
    """Cannot decode token 4."""

    all_special_ids = (EOS,)

    def decode(self, ids: Sequence[int], **_: Any) -> str:
        if 4 in ids:
            raise KeyError(4)
        return "x" * len(ids)


def test_a_token_that_cannot_be_named_has_no_name() -> None:
    processor, each = OutputProcessor(NoFours()), request(logprobs=2)
    processor.add(each)
    each.tokens.append(300)
    processor.process([each], sampled([300], [0]))
    sample = one(processor, each)
    assert (sample.text, sample.error) == ("x", None)
    assert sample.logprobs is not None
    names = {token: entry.decoded_token for token, entry in sample.logprobs[0].items()}
    assert names == {300: "x", 4: None, 5: "x"}
    each.prompt_logprobs = [None, {4: Logprob(-1.0, 1), 5: Logprob(-2.0, 2)}]
    (_, entry) = output(processor, [each]).prompt_logprobs or []
    assert entry is not None
    assert (entry[4].decoded_token, entry[5].decoded_token) == (None, "x")
    processor.check()


def test_log_probabilities_of_the_output_add_up() -> None:
    each, plain, processor = request(logprobs=2), request(), OutputProcessor(embedded)
    for one_of_them in (each, plain):
        processor.add(one_of_them)
    assert one(processor, each).cumulative_logprob == 0.0
    for n, token in enumerate([300, 4, 5], 1):
        for one_of_them in (each, plain):
            one_of_them.tokens.append(token)
        processor.process([each, plain], sampled([token, token], [0]))
        kind = DELTA if n == 2 else RequestOutputKind.CUMULATIVE
        assert processor.completion(each, kind).cumulative_logprob == pytest.approx(-1.5 * n)
    assert one(processor, each).cumulative_logprob == pytest.approx(-4.5)
    assert one(processor, plain).cumulative_logprob is None
    processor.check()


@pytest.mark.parametrize("text", [True, False])
def test_prompt_log_probabilities_as_far_as_they_are_known(text: bool) -> None:
    samples = [request(index=i, n=2, prompt_logprobs=1, detokenize=text) for i in range(2)]
    first, processor = samples[0], OutputProcessor(embedded)
    for each in samples:
        processor.add(each)
    assert output(processor, samples).prompt_logprobs is None
    first.prompt_logprobs = [None, {300: Logprob(-1.0, 1)}]
    some = output(processor, samples).prompt_logprobs
    assert some == first.prompt_logprobs
    first.prompt_logprobs += [{4: Logprob(-2.0, 2), 5: Logprob(-0.5, 1)}]
    assert some is not None
    assert len(some) == 2  # it is a snapshot
    # In deltas each is told once.
    assert output(processor, samples, DELTA).prompt_logprobs == first.prompt_logprobs[2:]
    assert output(processor, samples, DELTA).prompt_logprobs == []
    whole = output(processor, samples).prompt_logprobs
    assert whole is not None
    names = [{t: e.decoded_token for t, e in entry.items()} for entry in whole if entry]
    wanted = [{300: embedded.decode([300])}, {t: embedded.decode([t]) for t in (4, 5)}]
    assert names == (wanted if text else [{300: None}, {4: None, 5: None}])
    processor.check()


def test_what_a_request_has_of_the_cache_is_told_at_its_end() -> None:
    processor, each = OutputProcessor(embedded), request()
    processor.add(each)
    each.kv = KVUsage(copied_bytes=64)  # of a slot that it lost
    assert one(processor, each).kv is None
    each.kv = KVUsage(4, 1, 64)
    end(each, FinishReason.LENGTH)
    assert one(processor, each).kv == KVUsage(4, 1, 64)


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
