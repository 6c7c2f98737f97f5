"""What reviews of beams and drafts found, and is not to come back."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import vattn
from tests.beam_cases import prompts, search
from tests.engine_cases import PAGE, assert_nothing_left, fresh_model, greedy, make_llm
from tests.models import one_thread
from tests.scheduler_model import FakeMemory
from tests.speculation_cases import NGRAM
from vattn.engine import beam_search
from vattn.engine.beams import BeamGroup
from vattn.engine.scheduler import Scheduler
from vattn.kv.pool import PagePool
from vattn.request import FinishReason, Request
from vattn.sampling_params import SamplingParams


@pytest.mark.parametrize("pages", [60, 72, 80])
def test_two_engines_on_one_pool_do_not_wait_for_each_other(pages: int) -> None:
    """Each has beams whose pages the other holds; either search alone fits."""
    pool = PagePool("cpu", budget_bytes=pages * PAGE, page_bytes=PAGE, strict=True)
    options: dict[str, Any] = {
        "page_bytes": None,
        "kv_cache_memory_bytes": None,
        "strict": False,
        "max_num_seqs": 4,
        "enable_prefix_caching": False,
        "pool": pool,
    }
    llms = [make_llm("llama", **options) for _ in range(2)]
    leads = []
    for llm in llms:
        prompt = {"prompt_token_ids": prompts()[-1]}
        asked = beam_search.ask(llm.engine, "0", prompt, search(ignore_eos=True), 0, list)
        assert asked.group is not None
        llm.engine.add(asked.group.lead)
        leads.append(asked.group.lead)
    with one_thread():
        for _ in range(600):
            for llm in llms:
                if llm.engine.has_unfinished:
                    llm.engine.step()
                    llm.engine.check()
    assert [lead.finish_reason for lead in leads] == [FinishReason.LENGTH] * 2
    for llm in llms:
        llm.close()
    pool.trim()
    assert pool.stats().created_bytes == 0


def test_the_end_of_a_wide_search_does_not_recurse() -> None:
    width = 2000
    scheduler = Scheduler(
        FakeMemory(10 * width), max_num_seqs=width, max_num_batched_tokens=width,
        max_model_len=64,
    )  # fmt: skip
    lead = Request(id="wide", prompt_ids=[1, 2], params=SamplingParams(), limit=20)
    group = BeamGroup(lead, search(width=width), frozenset())
    scheduler.add(lead)
    for _ in range(width - 1):
        beam = group._make()
        scheduler._requests[beam.id] = beam
    assert scheduler.abort(lead)
    assert scheduler.take_finished() == [lead]
    assert not scheduler.has_unfinished


def without_numbers(token: int) -> Any:
    """A model for which a text with this token has no numbers from there on; it never says it."""
    model = fresh_model("llama")
    with torch.no_grad():
        model.get_input_embeddings().weight[token] = torch.nan
        model.get_output_embeddings().weight[token] = 0
    return model


class Guesses:
    """Puts chosen drafts in place of an engine's own."""

    def __init__(self, llm: vattn.LLM, text: list[int], right: int, then: int) -> None:
        self.calls = 0
        self._text, self._right, self._then = text, right, then
        llm.engine.proposer.propose = self.propose  # type: ignore[union-attr, method-assign]

    def propose(self, requests: list[Request]) -> None:
        for request in requests:
            self.calls += 1
            at = len(request.output_ids)
            drafts = self._text[at : at + self._right] + [self._then] * 2
            request.drafts = drafts[: request.limit - len(request.tokens) - 1]


@pytest.mark.parametrize("right", [0, 1, 2])
def test_a_draft_without_numbers_costs_nothing_but_drafts(right: int) -> None:
    """Kernels multiply masked V by zero, so such a draft spoils the tokens before it as well."""
    poison = 90
    prompt = [{"prompt_token_ids": [5, 6, 7, 8, 9, 10] * 4}]
    options: dict[str, Any] = {"strict": True, "page_bytes": PAGE, "skip_tokenizer_init": True}
    options |= {"max_model_len": 256, "max_num_seqs": 4, "device": "cpu", "dtype": "float32"}
    params = greedy(12, logprobs=1)
    with one_thread(), vattn.LLM(without_numbers(poison), **options) as plain:
        wanted = plain.generate(prompt, params, use_tqdm=False)[0].outputs[0]
        llm = vattn.LLM(without_numbers(poison), speculative_config=NGRAM, **options)
        guesses = Guesses(llm, wanted.token_ids, right, poison)
        found = llm.generate(prompt, params, use_tqdm=False)[0].outputs[0]
        assert guesses.calls == 1  # it is decoded without drafts from then on
        assert found.error is None
        assert found.token_ids == wanted.token_ids
        assert found.logprobs is not None
        assert len(found.logprobs) == len(found.token_ids)
        # It ends in the very step, and its slot is kept: nothing of the draft may be in there.
        stop = wanted.token_ids[0]
        ends = SamplingParams(temperature=0, max_tokens=12, stop_token_ids=[stop])
        llm.generate(prompt, ends, use_tqdm=False)
        cache = llm.engine.cache
        for slot in range(cache.max_seqs):
            kept = cache.kept(slot)[1]
            if kept:
                opened = cache.reopen(slot, kept)
                cache.ensure(opened, kept + 3)
                for layer in range(len(cache.specs)):
                    for tensor in cache.layer(layer):
                        assert not tensor[slot, : kept + 3].isnan().any()
                cache.release(opened)
                llm.engine.memory.index.remove(slot)
        assert_nothing_left(llm)


def test_a_search_with_a_steep_penalty_has_sequences() -> None:
    with make_llm("llama") as llm, one_thread():
        steep = search(length_penalty=-5.0, new=60, ignore_eos=True)
        (found,) = llm.beam_search([{"prompt_token_ids": prompts()[1]}], steep)
        assert found.finish_reason == "length"
        assert [len(s.token_ids) for s in found.sequences] == [60] * 4


def test_one_beam_takes_the_likeliest_token() -> None:
    with make_llm("llama") as llm, one_thread():
        asked = [{"prompt_token_ids": prompt} for prompt in prompts()]
        searched = llm.beam_search(asked, search(width=1, ignore_eos=True))
        wanted = llm.generate(asked, greedy(20), use_tqdm=False)
    for output, other in zip(searched, wanted, strict=True):
        assert [s.token_ids for s in output.sequences] == [other.outputs[0].token_ids]
