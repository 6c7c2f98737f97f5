"""`vattn.LLM` as its users meet it: prompts, outputs, streams, errors, statistics."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import vattn
from tests.engine_cases import (
    EMBEDDED_PATH,
    assert_nothing_left,
    greedy,
    make_llm,
    mixed_cases,
    reference,
)
from vattn.outputs import RequestOutput
from vattn.sampling_params import SamplingParams

PROMPT = "A transaction is a group of statements"
DELTA, FINAL_ONLY = vattn.RequestOutputKind.DELTA, vattn.RequestOutputKind.FINAL_ONLY
PLAIN_CHAT = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


@pytest.fixture(scope="module")
def llm() -> Iterator[vattn.LLM]:
    """The embedded model with its tokenizer; the tests leave nothing running on it."""
    options: Any = {"page_bytes": 4096, "strict": True, "kv_cache_memory_bytes": "64MiB"}
    with vattn.LLM(str(EMBEDDED_PATH), dtype="float32", device="cpu", **options) as llm:
        yield llm
        assert_nothing_left(llm)


def only(outputs: list[RequestOutput]) -> Any:
    (output,) = outputs
    (sample,) = output.outputs
    return sample


# Prompts ------------------------------------------------------------------------------------------


def test_every_form_of_a_prompt_is_the_same_request(llm: vattn.LLM) -> None:
    ids = llm.get_tokenizer().encode(PROMPT)
    forms: list[Any] = [
        PROMPT,
        ids,
        tuple(ids),
        {"prompt": PROMPT},
        {"prompt_token_ids": ids},
        {"prompt_token_ids": torch.tensor(ids)},
    ]
    outputs = llm.generate(forms, greedy(12), use_tqdm=False)
    assert len({tuple(output.outputs[0].token_ids) for output in outputs}) == 1
    assert all(output.prompt_token_ids == ids for output in outputs)
    assert [output.prompt for output in outputs[:2]] == [PROMPT, None]
    alone = llm.generate(ids, greedy(12), use_tqdm=False)
    assert only(alone).token_ids == outputs[0].outputs[0].token_ids
    assert only(alone).text == llm.get_tokenizer().decode(only(alone).token_ids)


def test_no_prompts_no_outputs(llm: vattn.LLM) -> None:
    assert llm.generate([], greedy(3)) == []


def test_one_bad_prompt_is_told_and_the_others_go_on(llm: vattn.LLM) -> None:
    vocabulary = llm.engine.loaded.vocab_size
    bad: list[tuple[Any, str]] = [
        ([], "empty"),
        ("", "empty"),
        ([vocabulary], f"token id {vocabulary}"),
        ([3, -1], "token id -1"),
        ([5] * llm.max_model_len, f"max_model_len={llm.max_model_len}"),
        ({"prompt": "a", "prompt_token_ids": [1]}, "one of prompt"),
        ({"text": "a"}, "text"),
        ({"prompt": "a", "cache_salt": 3}, "cache_salt=3"),
        ({"prompt": "a", "priority": 2}, "priority=2"),
        (["a"], "a"),
        (7, "7"),
    ]
    good = only(llm.generate(PROMPT, greedy(8), use_tqdm=False))
    for prompt, reason in bad:
        outputs = llm.generate([PROMPT, prompt, PROMPT], greedy(8), use_tqdm=False)
        assert [o.outputs[0].finish_reason for o in outputs] == ["length", "error", "length"]
        assert reason in str(outputs[1].outputs[0].error), prompt
        assert outputs[1].finished
        assert outputs[2].outputs[0].token_ids == good.token_ids


def test_bad_calls(llm: vattn.LLM) -> None:
    with pytest.raises(ValueError, match="2 sampling_params for 1 prompts"):
        llm.generate([PROMPT], [greedy(1), greedy(1)])
    with pytest.raises(TypeError, match="no option 'max_model_length'; did you mean max_model_len"):
        vattn.LLM(str(EMBEDDED_PATH), max_model_length=3)
    with pytest.raises(ValueError, match="max_model_len=100000"):
        vattn.LLM(str(EMBEDDED_PATH), max_model_len=100_000)
    with pytest.raises(ValueError, match="swap_space=-1"):
        vattn.LLM(str(EMBEDDED_PATH), swap_space=-1)
    with pytest.raises(ValueError, match="max_num_seqs=0"):
        vattn.LLM(str(EMBEDDED_PATH), max_num_seqs=0)
    with pytest.raises(ValueError, match="no-such"):
        vattn.LLM(str(EMBEDDED_PATH), attention_backend="no-such", device="cpu")
    with pytest.raises(ValueError, match="not both"):
        vattn.LLM(str(EMBEDDED_PATH), gpu_memory_utilization=0.5, kv_cache_memory_bytes="1GiB")
    output = llm.generate([PROMPT], SamplingParams(stop_token_ids=[10**6]), use_tqdm=False)
    assert "stop_token_ids" in str(only(output).error)


def test_text_needs_a_tokenizer() -> None:
    with make_llm("llama") as llm:
        (output,) = llm.generate(["text"], greedy(2), use_tqdm=False)
        assert "skip_tokenizer_init" in str(output.outputs[0].error)
        (output,) = llm.generate([[4, 5]], greedy(2, stop="x"), use_tqdm=False)
        assert "stop strings need a tokenizer" in str(output.outputs[0].error)
        with pytest.raises(ValueError, match="chat needs a tokenizer"):
            llm.chat([{"role": "user", "content": "hello"}])


# Outputs ------------------------------------------------------------------------------------------


def test_chat(llm: vattn.LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    messages = [{"role": "user", "content": "What is a page?"}]
    with monkeypatch.context() as patch:
        patch.setattr(llm.tokenizer, "chat_template", None)
        with pytest.raises(ValueError, match="chat template"):
            llm.chat(messages)
    chatted = llm.chat(messages, greedy(6), use_tqdm=False, chat_template=PLAIN_CHAT)
    text = "user: What is a page?\nassistant:"
    ids = llm.get_tokenizer().encode(text, add_special_tokens=False)
    written = llm.generate(ids, greedy(6), use_tqdm=False)
    assert only(chatted).token_ids == only(written).token_ids
    two = llm.chat([messages, messages], greedy(6), use_tqdm=False, chat_template=PLAIN_CHAT)
    assert [o.outputs[0].text for o in two] == [only(chatted).text] * 2


def test_timings_and_cached_tokens(llm: vattn.LLM) -> None:
    llm.reset_prefix_cache()
    before = time.monotonic()
    ids = llm.get_tokenizer().encode(PROMPT * 4)
    (first,) = llm.generate([ids], greedy(5), use_tqdm=False)
    (second,) = llm.generate([ids], greedy(5), use_tqdm=False)
    assert (first.num_cached_tokens, second.num_cached_tokens) == (0, len(ids) - 1)
    for output in (first, second):
        t = output.metrics
        moments = [before, t.arrival_s, t.scheduled_s, t.first_token_s, t.finished_s]
        assert moments == sorted(moments)
        assert t.first_token_s <= t.last_token_s <= t.finished_s


def test_a_stop_token_ends_it(llm: vattn.LLM) -> None:
    sample = only(llm.generate(PROMPT, greedy(20), use_tqdm=False))
    stop = sample.token_ids[7]
    at = sample.token_ids.index(stop)
    ended = only(llm.generate(PROMPT, greedy(20, stop_token_ids=[stop]), use_tqdm=False))
    assert ended.token_ids == sample.token_ids[: at + 1]
    assert (ended.finish_reason, ended.stop_reason) == ("stop", stop)
    later = only(
        llm.generate(PROMPT, greedy(20, stop_token_ids=[stop], min_tokens=15), use_tqdm=False)
    )
    assert stop not in later.token_ids[:14]


def test_a_stop_string_ends_it(llm: vattn.LLM) -> None:
    sample = only(llm.generate(PROMPT, greedy(24), use_tqdm=False))
    stop = sample.text[10:15]
    cut = sample.text.index(stop)
    ended = only(llm.generate(PROMPT, greedy(24, stop=[stop, "\0never"]), use_tqdm=False))
    assert ended.text == sample.text[:cut]
    assert (ended.finish_reason, ended.stop_reason) == ("stop", stop)
    kept = only(
        llm.generate(PROMPT, greedy(24, stop=stop, include_stop_str_in_output=True), use_tqdm=False)
    )
    assert kept.text == sample.text[: cut + len(stop)]


def test_the_end_of_sequence_token_ends_it() -> None:
    with make_llm("llama", enable_prefix_caching=False) as llm:
        case = next(c for c in mixed_cases("llama") if c.new_tokens == 30)
        tokens = reference("llama")[case]
        eos = tokens[12]
        cut = tokens.index(eos)
        object.__setattr__(llm.engine.loaded, "eos_token_ids", frozenset([eos]))
        params = SamplingParams(temperature=0, max_tokens=30)
        sample = only(llm.generate(list(case.prompt), params, use_tqdm=False))
        assert sample.token_ids == tokens[: cut + 1]
        assert sample.finish_reason == "stop"
        on = only(llm.generate(list(case.prompt), greedy(30), use_tqdm=False))
        assert on.token_ids == tokens


def test_logprobs_are_those_of_the_model() -> None:
    with make_llm("qwen3") as llm:
        case = next(c for c in mixed_cases("qwen3") if len(c.prompt) == 17)
        sample = only(llm.generate(list(case.prompt), greedy(8, logprobs=3), use_tqdm=False))
        plain: Any = generate_model("qwen3")
        ids = torch.tensor([[*case.prompt, *sample.token_ids]])
        with torch.inference_mode():
            wanted = plain(ids).logits[0].log_softmax(-1)
        assert sample.logprobs is not None
        assert len(sample.logprobs) == 8
        for i, entry in enumerate(sample.logprobs):
            row = wanted[len(case.prompt) - 1 + i]
            top = row.topk(3)
            assert set(entry) == set(top.indices.tolist())
            for token, logprob in entry.items():
                assert logprob.logprob == pytest.approx(float(row[token]), abs=1e-3)
            assert entry[sample.token_ids[i]].rank == 1


def generate_model(family: str) -> Any:
    from tests.engine_cases import engine_model

    return engine_model(family)


# Seeds --------------------------------------------------------------------------------------------


def test_a_seed_gives_the_same_tokens_alone_and_in_any_batch(llm: vattn.LLM) -> None:
    def params(seed: int) -> SamplingParams:
        return SamplingParams(temperature=1.0, top_p=0.95, seed=seed, max_tokens=24)

    prompts = [f"{PROMPT} number {i}" for i in range(8)]
    alone = [
        only(llm.generate(p, params(i), use_tqdm=False)).token_ids for i, p in enumerate(prompts)
    ]
    mixed: list[Any] = [params(i) for i in range(8)]
    together = llm.generate(prompts, mixed, use_tqdm=False)
    assert [o.outputs[0].token_ids for o in together] == alone
    crowd = llm.generate([*prompts[::-1], *prompts], [*mixed[::-1], *mixed], use_tqdm=False)
    assert [o.outputs[0].token_ids for o in crowd[8:]] == alone
    other = only(llm.generate(prompts[0], params(99), use_tqdm=False)).token_ids
    assert other != alone[0]


def test_samples_of_a_seed_differ_and_repeat(llm: vattn.LLM) -> None:
    params = SamplingParams(n=4, temperature=1.2, seed=5, max_tokens=16)
    first, second = (llm.generate(PROMPT, params, use_tqdm=False)[0] for _ in range(2))
    texts = [sample.text for sample in first.outputs]
    assert len(set(texts)) == 4
    assert [sample.text for sample in second.outputs] == texts
    assert [sample.index for sample in first.outputs] == [0, 1, 2, 3]


def test_requests_without_a_seed_follow_the_engines() -> None:
    texts = []
    for _ in range(2):
        with make_llm("llama", seed=11) as llm:
            (out,) = llm.generate([[3, 4, 5]], SamplingParams(max_tokens=12), use_tqdm=False)
            texts.append(out.outputs[0].token_ids)
    assert texts[0] == texts[1]


# Streams ------------------------------------------------------------------------------------------


def test_a_stream_ends_with_what_generate_gives(llm: vattn.LLM) -> None:
    prompts = [PROMPT, "The page", "A slot is"]
    whole = llm.generate(prompts, greedy(10), use_tqdm=False)
    last: dict[str, RequestOutput] = {}
    seen: dict[str, list[int]] = {}
    for output in llm.stream(prompts, greedy(10)):
        number = output.request_id.rpartition("-")[2]
        last[number] = output
        seen.setdefault(number, []).append(len(output.outputs[0].token_ids))
    assert [last[str(i)].outputs[0].text for i in range(3)] == [o.outputs[0].text for o in whole]
    assert all(counts == list(range(1, 11)) for counts in seen.values())
    assert all(output.finished for output in last.values())


def test_deltas_add_up(llm: vattn.LLM) -> None:
    whole = only(llm.generate(PROMPT, greedy(30, stop=["\0"]), use_tqdm=False))
    text, tokens = "", []
    for output in llm.stream(PROMPT, greedy(30, stop=["\0"], output_kind=DELTA)):
        text += output.outputs[0].text
        tokens += output.outputs[0].token_ids
    assert (text, tokens) == (whole.text, whole.token_ids)


def test_a_final_output_is_the_only_one(llm: vattn.LLM) -> None:
    params = SamplingParams(n=2, seed=3, max_tokens=12, output_kind=FINAL_ONLY)
    (whole,) = llm.generate(PROMPT, params, use_tqdm=False)
    (last,) = llm.stream(PROMPT, params)
    assert last.finished
    assert last.outputs == whole.outputs
    assert [sample.finish_reason for sample in last.outputs] == ["length"] * 2


def test_each_prompt_has_its_kind_of_output(llm: vattn.LLM) -> None:
    kinds = list(vattn.RequestOutputKind)
    params = [greedy(6, output_kind=kind) for kind in kinds]
    prompts: list[Any] = [PROMPT] * len(kinds)
    lengths: list[list[int]] = [[] for _ in kinds]
    for output in llm.stream([*prompts, []], [*params, greedy(6, output_kind=FINAL_ONLY)]):
        number = int(output.request_id.rpartition("-")[2])
        if number == len(kinds):
            assert output.finished
            assert "empty" in str(output.outputs[0].error)
        else:
            lengths[number].append(len(output.outputs[0].token_ids))
    by_kind = dict(zip([kind.name for kind in kinds], lengths, strict=True))
    assert by_kind == {"CUMULATIVE": [1, 2, 3, 4, 5, 6], "DELTA": [1] * 6, "FINAL_ONLY": [6]}
    whole = llm.generate(prompts, params, use_tqdm=False)
    assert [len(output.outputs[0].token_ids) for output in whole] == [6] * 3


def test_the_sum_of_log_probabilities(llm: vattn.LLM) -> None:
    (whole,) = llm.generate(PROMPT, greedy(7, logprobs=0), use_tqdm=False)
    (sample,) = whole.outputs
    values = [
        entry[token].logprob
        for token, entry in zip(sample.token_ids, sample.logprobs or [], strict=True)
    ]
    assert sample.cumulative_logprob == pytest.approx(sum(values))
    assert len(values) == 7
    # Of a delta it is of all tokens so far, too.
    sums = [
        output.outputs[0].cumulative_logprob
        for output in llm.stream(PROMPT, greedy(7, logprobs=0, output_kind=DELTA))
    ]
    assert sums == pytest.approx([sum(values[: n + 1]) for n in range(7)])
    (plain,) = llm.generate(PROMPT, greedy(2), use_tqdm=False)
    assert plain.outputs[0].cumulative_logprob is None


def test_several_tokens_of_a_step_are_text_like_any_others(llm: vattn.LLM) -> None:
    """With drafts; a stop string ends it within what a step accepted."""
    drafts = {"method": "ngram", "num_speculative_tokens": 5, "prompt_lookup_max": 2}
    prompt = f"{PROMPT}. {PROMPT}. {PROMPT}"
    plain = only(llm.generate(prompt, greedy(40, logprobs=1), use_tqdm=False))
    cases: list[tuple[list[str], bool]] = [([], False)]
    cases += [([plain.text[20:23]], False), ([plain.text[33:36]], True)]
    options: Any = {"speculative_config": drafts, "dtype": "float32", "device": "cpu"}
    options |= {"kv_cache_memory_bytes": "64MiB", "max_num_seqs": 2}
    with vattn.LLM(str(EMBEDDED_PATH), **options) as drafted:
        for stop, include in cases:
            params = greedy(40, logprobs=1, stop=stop, include_stop_str_in_output=include)
            wanted = only(llm.generate(prompt, params, use_tqdm=False))
            found = only(drafted.generate(prompt, params, use_tqdm=False))
            assert (found.text, found.token_ids) == (wanted.text, wanted.token_ids), stop
            assert (found.finish_reason, found.stop_reason) == (
                wanted.finish_reason,
                wanted.stop_reason,
            )
            assert found.stop_reason == (stop[0] if stop else None)
            assert found.cumulative_logprob == pytest.approx(wanted.cumulative_logprob, abs=1e-3)
            assert len(found.logprobs) == len(found.token_ids)
        deltas = [
            output.outputs[0]
            for output in drafted.stream(prompt, greedy(40, logprobs=1, output_kind=DELTA))
        ]
        assert "".join(delta.text for delta in deltas) == plain.text
        assert max(len(delta.token_ids) for delta in deltas) > 1
        assert all(len(delta.logprobs or []) == len(delta.token_ids) for delta in deltas)
        assert drafted.stats().spec_decode_num_accepted_tokens > 0
        assert_nothing_left(drafted)


def test_leaving_a_stream_aborts_the_rest(llm: vattn.LLM) -> None:
    stream: Any = llm.stream([PROMPT, "The"], greedy(200))
    next(stream)
    stream.close()
    llm.engine.step()
    stats = llm.stats()
    assert (stats.num_running, stats.num_waiting, stats.cache.open_slots) == (0, 0, 0)
    assert stats.finished["abort"] >= 2
    llm.engine.check()


def test_a_deadline_ends_it_with_what_it_has(
    llm: vattn.LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = llm.get_tokenizer().encode(PROMPT)
    (request,) = llm.engine.make_requests("late", ids, greedy(400), timeout_s=1000)
    llm.engine.add(request)
    while len(request.output_ids) < 3:
        llm.engine.step()
    monkeypatch.setattr(llm.engine.scheduler, "_clock", lambda: time.monotonic() + 2000)
    assert llm.engine.step() == [request]
    assert request.finish_reason == "deadline"
    assert len(request.output_ids) == 3
    llm.engine.check()


# Memory -------------------------------------------------------------------------------------------


def test_tenants_do_not_share(llm: vattn.LLM) -> None:
    llm.reset_prefix_cache()
    prompt = f"{PROMPT} of one tenant {PROMPT}"

    def cached(salt: str) -> int:
        (output,) = llm.generate(
            [{"prompt": prompt, "cache_salt": salt}], greedy(3), use_tqdm=False
        )
        return output.num_cached_tokens

    assert cached("a") == 0
    assert cached("b") == 0
    assert cached("a") > 0
    assert cached("") == 0
    assert cached("b") > 0


def test_statistics_and_map(llm: vattn.LLM) -> None:
    llm.reset_prefix_cache()
    before = llm.stats()
    for output in llm.stream([PROMPT, "The page"], greedy(12)):
        if len(output.outputs[0].token_ids) == 6:
            stats = llm.stats()
            assert stats.num_running == 2
            assert stats.cache.open_slots == 2
            assert stats.cache.live_bytes > 0
            assert sum(slot.open for slot in llm.memory_map().slots) == 2
    after = llm.stats()
    assert after.generation_tokens - before.generation_tokens == 24
    assert after.finished["length"] - before.finished.get("length", 0) == 2
    assert after.cache.live_bytes == 0
    assert after.cache.kept_bytes > 0
