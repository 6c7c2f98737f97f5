"""Requests with structured outputs, and what their masks leave of random logits."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoTokenizer

from vattn.attention.upload import Uploader
from vattn.engine.grammars import GrammarCompiler
from vattn.engine.sampler import Sampler
from vattn.engine.structured import StructuredMasks
from vattn.models import tiny_path
from vattn.request import FinishReason, Request, Status
from vattn.sampling_params import SamplingParams, StructuredOutputsParams

EOS = 2
TOKENS = 2048  # of the tokenizer
PROMPT = [1, 5, 6]
CHOICES = ("yes", "yesterday", "no", "日本語", "日本", "naïve 😀!", "a/b\\c\n", "x" * 40)


@functools.cache
def tiny_tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(tiny_path(), local_files_only=True)


def make_request(
    compiler: GrammarCompiler | None,
    seed: int = 0,
    stop_ids: Sequence[int] = (EOS,),
    *,
    params: dict[str, Any] | None = None,
    **asked: Any,
) -> Request:
    """A request that is ready to be sampled; without a compiler, one without structure."""
    structured = None if compiler is None else StructuredOutputsParams(**asked)
    request = Request(
        id=f"r{seed}",
        prompt_ids=PROMPT,
        params=SamplingParams(max_tokens=None, structured_outputs=structured, **(params or {})),
        limit=100 if compiler is None else 1500,
        seed=seed,
        stop_ids=frozenset(stop_ids),
    )
    if compiler is not None and structured is not None:
        request.grammar = compiler.compile(structured)
    return request


def make_sampler(vocab_size: int = TOKENS, device: str = "cpu") -> tuple[Sampler, StructuredMasks]:
    masks = StructuredMasks(vocab_size, Uploader(device))
    return Sampler(vocab_size, device, [masks]), masks


def finish(request: Request, reason: FinishReason) -> None:
    request.status, request.finish_reason = Status.FINISHED, reason


def allowed(masks: StructuredMasks, requests: list[Request], vocab_size: int = TOKENS) -> list[Any]:
    """The tokens that each row is left with."""
    logits = torch.randn(len(requests), vocab_size, generator=torch.Generator().manual_seed(0))
    kept = logits.clone()
    if masks.update(requests):
        masks.apply(kept, requests)
    assert torch.equal(kept[kept.isfinite()], logits[kept.isfinite()])
    assert bool((kept[~kept.isfinite()] == -torch.inf).all())
    return [set(row.isfinite().nonzero()[:, 0].tolist()) for row in kept]
