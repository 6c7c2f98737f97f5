"""What decoding parameters do on a GPU: as on the host, as a plain loop says, without a wait."""

from __future__ import annotations

import functools
import json
import math
import re
from typing import Any

import numpy as np
import pytest
import torch

import vattn
from tests.engine_cases import EMBEDDED, assert_nothing_left, fresh_model
from tests.models import one_thread
from tests.structured_cases import (
    CHOICES,
    EOS,
    TOKENS,
    make_request,
    make_sampler,
    tiny_tokenizer,
)
from vattn.engine import allowed_tokens, filters, logprobs
from vattn.engine.grammars import GrammarCompiler
from vattn.engine.sampled import Sampled
from vattn.engine.sampler import Sampler
from vattn.models import tiny_path
from vattn.request import FinishReason, Request, Status
from vattn.sampling_params import SamplingParams, StructuredOutputsParams

# Float32 rounds otherwise in steps of other shapes; logits are some units apart.
CLOSE = 1e-3
NO_GRAMMARS = "structured outputs need llguidance, which is not installed"
VOCABULARY = 6000  # enough for sets of tokens that become masks

# Sampler ------------------------------------------------------------------------------------------


def rows_of_all_kinds() -> list[Request]:
    """Greedy and drawn, with all that changes logits and all numbers of log probabilities."""
    rng = np.random.default_rng(0)
    sets = (
        range(40),
        range(5, VOCABULARY),
        range(1, VOCABULARY, 2),
        tuple(rng.permutation(VOCABULARY)[:3000].tolist()),
    )
    made = []
    for i in range(36):
        drawn: list[dict[str, Any]] = [
            {"temperature": 0},
            {"temperature": 0.7, "top_k": 9, "top_p": 0.8},
            {"temperature": 0},
            {"temperature": 2.0, "top_p": 0.9},
            {"min_p": 0.05},
            {"top_k": 2000, "top_p": 0.99},
        ]
        params = {**drawn[i % 6], "logprobs": (None, 0, None, 3, 200, -1, 1000)[i % 7]}
        if i % 3 == 0:
            params |= {"repetition_penalty": 1.4, "frequency_penalty": 0.25 * (i % 4)}
        if i % 4 == 1:
            params |= {"presence_penalty": 0.8}
        if i % 5 < 4 and i % 2:
            params |= {"allowed_token_ids": sets[i % 4]}
        if i % 5 == 2:
            params |= {"logit_bias": {i: 4.0, 3: -2.0, 50: 1.5}}
        if i % 6 == 5:
            params |= {"min_tokens": 5}
        prompt = rng.integers(0, VOCABULARY, 3 + 40 * (i % 3)).tolist()
        each = Request(f"r{i}", prompt, SamplingParams(**params), 10_000, seed=i)
        each.stop_ids = frozenset({1, 7, 20, VOCABULARY + 5})
        if i % 4 == 2:
            each.bad_words_ids = ((7,), (9, 3), (1, 2, 3))
        made.append(each)
    return made


def random_logits(rows: int, seed: int) -> torch.Tensor:
    """Normal ones; no two of a row are equal, so what is largest has one order."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(rows, VOCABULARY, generator=generator).argsort(1)
    logits: torch.Tensor = torch.special.ndtri((order + 0.5) / VOCABULARY) * 3
    return logits


def without_a_wait(device: str, call: Any) -> Any:
    """What the call returns; torch raises where its own code would wait for a GPU."""
    if device != "cuda":
        return call()
    torch.cuda.set_sync_debug_mode("error")
    try:
        return call()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def assert_same(found: Sampled, wanted: Sampled, rows: list[Request]) -> list[int]:
    """Tokens and log probabilities; the tokens."""
    ours, theirs = found.to_host(), wanted.to_host()
    assert ours.token_ids == theirs.token_ids
    for i, (each, token) in enumerate(zip(rows, ours.token_ids, strict=True)):
        entry, other = ours.entry(i, token), theirs.entry(i, token)
        assert (entry is None) == (other is None) == (each.params.logprobs is None)
        if entry is not None and other is not None:
            assert set(entry) == set(other), i
            for one, value in entry.items():
                assert value.rank == other[one].rank
                assert value.logprob == pytest.approx(other[one].logprob, abs=1e-4)
    return ours.token_ids


def test_the_sampler_does_what_it_does_on_the_host(device: str) -> None:
    """While rows stay and change; after the first step nothing waits for the device."""
    requests = rows_of_all_kinds()
    on_device, on_host = Sampler(VOCABULARY, device), Sampler(VOCABULARY, "cpu")
    for step in range(16):
        first = step // 4 * 7 % 5
        rows = [each for each in requests[first : first + 30] if not each.finished]
        logits = random_logits(len(rows), step)
        logits[:, :9] += 5  # tokens that come again, end an output, or are bad words
        moved, kept = logits.to(device), logits.clone()
        sample = functools.partial(on_device.sample, moved, rows)
        found = without_a_wait(device if step else "cpu", sample)
        tokens = assert_same(found, on_host.sample(kept, rows), rows)
        greedy = [i for i, each in enumerate(rows) if each.params.greedy]
        torch.testing.assert_close(moved.cpu()[greedy], kept[greedy], rtol=1e-5, atol=1e-5)
        for each, token in zip(rows, tokens, strict=True):
            each.tokens.append(token)
        if step % 4 == 3:
            rows[step].status, rows[step].finish_reason = Status.FINISHED, FinishReason.STOP


def test_the_draws_of_verified_drafts(device: str) -> None:
    """Several rows of one request, which its set of allowed tokens holds for."""
    sets = (None, range(40), range(5, VOCABULARY), range(1, VOCABULARY, 2))
    requests = []
    for i in range(12):
        options: dict[str, Any] = {
            "temperature": i % 3,
            "logprobs": 2,
            "allowed_token_ids": sets[i % 4],
        }
        params = SamplingParams(**options, top_p=0.9, logit_bias={i: 5.0, 300 + i: -2.0})
        requests.append(Request(f"r{i}", [3, 4], params, 100, seed=i))
    rows = [each for each in requests for _ in range(4)]
    offsets = [0, 1, 2, 3] * 12
    logits = random_logits(len(rows), 2)
    found = Sampler(VOCABULARY, device).sample(logits.clone().to(device), rows, offsets)
    assert_same(found, Sampler(VOCABULARY, "cpu").sample(logits, rows, offsets), rows)


def test_scores_are_those_of_the_host(device: str) -> None:
    logits = random_logits(50, 3)
    targets = [(i * 37) % VOCABULARY for i in range(50)]
    counts = [(1, 0, 40, -1, 1000)[i % 5] for i in range(50)]
    on_device = Sampler(VOCABULARY, device)
    moved = logits.to(device)
    on_device.score(moved, targets, counts)
    found = without_a_wait(device, functools.partial(on_device.score, moved, targets, counts))
    wanted = Sampler(VOCABULARY, "cpu").score(logits, targets, counts)
    for ours, theirs in zip(found.logprobs, wanted.logprobs, strict=True):
        assert (ours.rows, ours.counts) == (theirs.rows, theirs.counts)
        assert torch.equal(ours.rank.cpu(), theirs.rank)
        assert torch.equal(ours.top_ids.cpu(), theirs.top_ids)
        torch.testing.assert_close(ours.logprob.cpu(), theirs.logprob)
        torch.testing.assert_close(ours.top_logprobs.cpu(), theirs.top_logprobs)


@pytest.mark.parametrize("width", [10, 3000])
def test_searches_that_look_at_all_find_what_the_others_do(width: int, device: str) -> None:
    """Those of a GPU, which may not look how far they have to look; many logits are equal."""
    generator = torch.Generator().manual_seed(4)
    logits = torch.randn(60, width, generator=generator).mul(2).round(decimals=1)
    logit = logits.gather(1, torch.randint(0, width, (60, 1), generator=generator))
    above = (logits > logit).sum(1)
    assert torch.equal(logprobs._ranks_of_all(logits.to(device), logit.to(device)).cpu(), above + 1)
    for count in (1, 5, width):
        top = logits.topk(count, 1).values
        assert torch.equal(logprobs._ranks(logits, logit, top), above + 1)
    probs, lowest = logits.softmax(1), torch.full((60, 1), -math.inf)
    lowest[::2] = logits[::2].topk(4, 1).values[:, -1:]
    kept = probs.double().mul(logits >= lowest).sum(1, keepdim=True)
    for part in (0.01, 0.5, 0.999):
        given = logits, lowest, probs, kept * part
        found = filters._search_all(*(each.to(device) for each in given)).cpu()
        assert torch.equal(found, filters._search(*given)), part


# Engine -------------------------------------------------------------------------------------------

PROMPTS = ("The type of the", "def main(self):", "It is said that", "In the year", "a b a b a b")
NEW = 24
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "penalties": {
        "repetition_penalty": 1.5,
        "frequency_penalty": 0.4,
        "presence_penalty": 0.3,
    },
    "bad words": {"bad_words": ["the", "a", "of the", "to be", "e"]},
    "few allowed": {"allowed_token_ids": range(300, 390)},
    "half allowed": {"allowed_token_ids": range(1, 2000, 2)},
    "most allowed": {"allowed_token_ids": range(30, 2048)},
    "bias": {"logit_bias": {400: 6.0, 20: -9.0, 350: 5.0}},
    "min tokens": {"min_tokens": 12, "stop_token_ids": list(range(3, 330)), "ignore_eos": False},
    "all": {
        "repetition_penalty": 1.2,
        "bad_words": ["the", "and the"],
        "allowed_token_ids": range(3, 1500),
        "logit_bias": {300: 3.0},
        "min_tokens": 20,
        "logprobs": 2,
    },
}


def make(device: str, **options: Any) -> vattn.LLM:
    settings: dict[str, Any] = {
        "dtype": "float32",
        "device": device,
        "max_model_len": 256,
        "max_num_seqs": 64,
        "kv_cache_memory_bytes": "1GiB",
        **options,
    }
    return vattn.LLM(str(tiny_path()), **settings)


def asked(**options: Any) -> SamplingParams:
    return SamplingParams(
        **{"temperature": 0, "max_tokens": NEW, "ignore_eos": True, "logprobs": 1, **options}
    )


def run(llm: vattn.LLM, params: list[SamplingParams]) -> list[Any]:
    """Every prompt with each of the parameters, all at once; none may fail."""
    prompts = [prompt for prompt in PROMPTS for _ in params]
    with one_thread():
        outputs = llm.generate(prompts, params * len(PROMPTS), use_tqdm=False)
    assert [output.outputs[0].error for output in outputs] == [None] * len(prompts)
    return outputs


@functools.cache
def plain_model(device: str) -> Any:
    return fresh_model(EMBEDDED).to(device)


@torch.inference_mode()
def raw_logits(tokens: list[int], device: str) -> torch.Tensor:
    """float32 ``[len(tokens), V]`` on the host, from one pass of the plain model."""
    with one_thread():
        ids = torch.tensor([tokens], device=device)
        logits: torch.Tensor = plain_model(device)(ids).logits[0].float().cpu()
    return logits


def processed(row: torch.Tensor, request: Request, output: list[int]) -> torch.Tensor:
    """What is sampled from, one token after another, as the documentation says."""
    params, out = request.params, row.tolist()
    for token in request.stop_ids if len(output) < params.min_tokens else ():
        out[token] = -math.inf
    for *prefix, last in request.bad_words_ids:
        if output[len(output) - len(prefix) :] == prefix and len(output) >= len(prefix):
            out[last] = -math.inf
    if params.allowed_token_ids is not None:
        allowed = set(params.allowed_token_ids)
        out = [value if i in allowed else -math.inf for i, value in enumerate(out)]
    for token, bias in (params.logit_bias or {}).items():
        out[token] += bias
    factor = params.repetition_penalty
    for token in {*request.prompt_ids, *output}:
        out[token] = out[token] / factor if out[token] > 0 else out[token] * factor
    for token in set(output):
        out[token] -= params.frequency_penalty * output.count(token) + params.presence_penalty
    return torch.tensor(out)


@pytest.mark.parametrize(
    "options",
    [{}, {"max_num_batched_tokens": 24, "max_num_seqs": 20}, {"enforce_eager": True}],
    ids=["plain", "tight", "eager"],
)
def test_text_is_that_of_a_plain_loop(
    options: dict[str, Any], device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the tokens of the last step in flight, or taken early where a request needs them."""
    # Half of the small vocabulary is a mask.
    monkeypatch.setattr(allowed_tokens, "_MOST_LISTED", 200)
    params = [asked(**each) for each in KINDS.values()]
    with make(device, async_scheduling=False, **options) as llm:
        wanted = [output.outputs[0].token_ids for output in run(llm, params)]
        assert_nothing_left(llm)
    with make(device, async_scheduling=True, **options) as llm:
        outputs = run(llm, params)
        assert [output.outputs[0].token_ids for output in outputs] == wanted
        for output, each in zip(outputs, params * len(PROMPTS), strict=True):
            tokens = output.outputs[0].token_ids
            (request,) = llm.engine.make_requests("plain", output.prompt_token_ids, each)
            assert request.needs_tokens == bool(each.has_penalties or each.bad_words)
            rows = raw_logits([*output.prompt_token_ids, *tokens], device)
            rows = rows[len(output.prompt_token_ids) - 1 : -1]
            for i, token in enumerate(tokens):
                row = processed(rows[i], request, tokens[:i])
                assert row[token] >= row.max() - CLOSE, (each, i)
                said = output.outputs[0].logprobs[i][token].logprob
                assert said == pytest.approx(float(rows[i].log_softmax(0)[token]), abs=CLOSE)
            assert len(tokens) == NEW or request.stop_ids & {tokens[-1]}
            assert len(tokens) >= each.min_tokens
        assert_nothing_left(llm)


def test_log_probabilities_of_a_whole_vocabulary(device: str) -> None:
    """Of the prompt and of what is written, beside requests that want few or none."""
    params = [
        asked(logprobs=-1, prompt_logprobs=-1, max_tokens=3),
        asked(logprobs=None),
        asked(logprobs=2, prompt_logprobs=1, repetition_penalty=1.3),
    ]
    with make(device, async_scheduling=True, max_logprobs=-1) as llm:
        outputs = run(llm, params)
        assert_nothing_left(llm)
    for output, each in zip(outputs, params * len(PROMPTS), strict=True):
        sample, prompt = output.outputs[0], output.prompt_token_ids
        if each.logprobs is None:
            assert sample.logprobs is None
            continue
        tokens = [*prompt, *sample.token_ids]
        rows = raw_logits(tokens, device).log_softmax(1)
        entries = [*output.prompt_logprobs, *sample.logprobs]
        assert entries[0] is None
        assert len(entries) == len(tokens)
        for i, entry in enumerate(entries[1:], 1):
            count = (each.prompt_logprobs if i < len(prompt) else each.logprobs) or 0
            assert len(entry) == len(rows[0]) if count == -1 else count <= len(entry) <= count + 1
            assert tokens[i] in entry
            ids = torch.tensor(list(entry))
            said = torch.tensor([value.logprob for value in entry.values()])
            torch.testing.assert_close(said, rows[i - 1, ids], rtol=0, atol=CLOSE)


def test_masks_are_made_without_a_wait(device: str) -> None:
    """Those of a device leave what those of the host leave, step after step."""
    pytest.importorskip("llguidance", reason=NO_GRAMMARS)
    compiler = GrammarCompiler(tiny_tokenizer(), TOKENS, frozenset([EOS]))
    samplers = [make_sampler(device=device), make_sampler()]
    requests = [make_request(compiler, i, choice=CHOICES) for i in range(5)]
    requests += [make_request(compiler, 9, regex="[a-f]{30}"), make_request(None)]
    for step in range(8):
        generator = torch.Generator().manual_seed(step)
        logits = torch.randn(len(requests), TOKENS, generator=generator)
        found = []
        for (sampler, masks), where in zip(samplers, (device, "cpu"), strict=True):
            masks.begin(requests)
            call = functools.partial(sampler.sample, logits.clone().to(where), requests)
            found.append(without_a_wait(where if step else "cpu", call).to_host().token_ids)
        assert found[0] == found[1]
        for request, token in zip(requests, found[0], strict=True):
            request.tokens.append(token)
        requests = [each for each in requests if each.tokens[-1] != EOS]
    for _, masks in samplers:
        masks.close()


def test_structured_outputs(device: str) -> None:
    """Masks, beside penalties and requests without either; drawn ones too."""
    pytest.importorskip("llguidance", reason=NO_GRAMMARS)
    schema = {
        "type": "object",
        "properties": {"n": {"type": "integer"}},
        "required": ["n"],
        "additionalProperties": False,
    }
    kinds: list[dict[str, Any]] = [
        {"regex": "[a-f]{3,20}-[0-9]{2}"},
        {"choice": ["yes", "no", "maybe later"]},
        {"json": schema, "disable_any_whitespace": True},
    ]
    params = [asked()]
    for kind in kinds:
        structured = StructuredOutputsParams(**kind)
        params += [
            asked(structured_outputs=structured, max_tokens=60, **options)
            for options in ({}, {"repetition_penalty": 1.2}, {"temperature": 1.0, "seed": 5})
        ]
    found = []
    for ahead in (False, True):
        with make(device, async_scheduling=ahead) as llm:
            found.append([output.outputs[0] for output in run(llm, params)])
            assert_nothing_left(llm)
    assert [s.token_ids for s in found[0]] == [s.token_ids for s in found[1]]
    complete = 0
    for sample, each in zip(found[1], params * len(PROMPTS), strict=True):
        asked_for = each.structured_outputs
        if asked_for is None or sample.finish_reason == "length":
            continue
        complete += 1
        if asked_for.regex is not None:
            assert re.fullmatch(asked_for.regex, sample.text)
        elif asked_for.choice is not None:
            assert sample.text in asked_for.choice
        else:
            assert set(json.loads(sample.text)) == {"n"}
    assert complete >= 6 * len(PROMPTS)
