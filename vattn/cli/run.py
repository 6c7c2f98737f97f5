"""Generates text for prompts with a transformers model whose KV cache is a VirtualCache."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import TextStreamer
from transformers.generation.streamers import BaseStreamer


@dataclass
class Output:
    """The text of one sample of one prompt."""

    prompt_index: int
    sample: int
    prompt: str
    prompt_tokens: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None  # "stop" at the model's end token, "length", None: interrupted


@dataclass
class Timing:
    """When the first token of a run came and how long all of it took, in seconds."""

    first_token_s: float | None = None
    total_s: float = 0.0
    tokens: int = 0

    @property
    def tokens_per_s(self) -> float:
        """Generated tokens of all sequences per second of wall time, prefill included."""
        return self.tokens / self.total_s if self.total_s else 0.0


class WordStreamer(TextStreamer):
    """Hands a sequence's text on in whole words."""

    def __init__(self, tokenizer: Any, write: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        self._write = write

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Called by TextStreamer."""
        self._write(text)


class Collector(BaseStreamer):
    """Receives each step's tokens, so that what was generated survives an interruption.

    Args:
        outputs: one per row of the batch.
        eos_ids: tokens that end a row.
        on_step: called after each step with the number of tokens that rows received.
        words: the text of row 0 as it comes.
    """

    def __init__(
        self,
        outputs: Sequence[Output],
        eos_ids: frozenset[int],
        on_step: Callable[[int], None],
        words: WordStreamer | None,
    ) -> None:
        self._outputs = outputs
        self._eos_ids = eos_ids
        self._on_step = on_step
        self._words = words
        self._is_prompt = True

    def put(self, value: torch.Tensor) -> None:
        """The prompt ``[rows, tokens]`` once, then each step's tokens ``[rows]``."""
        if self._is_prompt:
            self._is_prompt = False
            return
        added = 0
        for row, (output, token) in enumerate(zip(self._outputs, value.tolist(), strict=True)):
            if output.finish_reason is not None:
                continue  # padding
            added += 1
            output.token_ids.append(token)
            if token in self._eos_ids:
                output.finish_reason = "stop"
            elif row == 0 and self._words is not None:
                self._words.put(value[:1])  # type: ignore[no-untyped-call]
        self._on_step(added)

    def end(self) -> None:
        """All rows have ended or are full."""
        for output in self._outputs:
            output.finish_reason = output.finish_reason or "length"


@dataclass
class Generator:
    """A model, its tokenizer and the cache that it generates with.

    Args:
        sampling: keyword arguments of ``model.generate``.
        samples: sequences per prompt. They share the pages of the prompt if the cache can fork.
    """

    model: Any
    tokenizer: Any
    cache: Any
    sampling: dict[str, Any]
    samples: int
    timing: Timing = field(default_factory=Timing)

    @property
    def eos_ids(self) -> frozenset[int]:
        """Tokens that end a text."""
        eos = self.model.generation_config.eos_token_id
        if eos is None:
            eos = self.tokenizer.eos_token_id
        return frozenset([eos] if isinstance(eos, int) else eos or ())

    def run(
        self,
        prompts: Sequence[str],
        *,
        first_index: int,
        new_tokens: int,
        on_step: Callable[[int], None],
        write: Callable[[str], None] | None = None,
    ) -> list[Output]:
        """Generates one batch; its sequences stay in the cache until the next reset.

        Args:
            prompts: texts of the batch.
            first_index: number of its first prompt in the whole run.
            new_tokens: most tokens per sequence.
            on_step: called with the number of new tokens after each step.
            write: takes the text of the batch's first sequence word by word.

        Returns:
            ``samples`` outputs per prompt, in order. After a KeyboardInterrupt they are what was
            generated till then, and the exception has them as its ``outputs`` attribute.
        """
        device = self.model.device
        batch = self.tokenizer(list(prompts), return_tensors="pt", padding=True)
        ids, mask = batch["input_ids"].to(device), batch["attention_mask"].to(device)
        lengths = mask.sum(dim=1).tolist()
        outputs = [
            Output(first_index + i, sample, prompt, length)
            for i, (prompt, length) in enumerate(zip(prompts, lengths, strict=True))
            for sample in range(self.samples)
        ]
        words = WordStreamer(self.tokenizer, write) if write else None
        before, started = self.timing.total_s, time.perf_counter()

        def step(tokens: int) -> None:
            elapsed = time.perf_counter() - started
            if self.timing.first_token_s is None:
                self.timing.first_token_s = elapsed
            self.timing.total_s = before + elapsed
            self.timing.tokens += tokens
            on_step(tokens)

        streamer = Collector(outputs, self.eos_ids, step, words)
        try:
            if self.samples > 1:
                ids, mask = self._share_prompt(ids, mask)
            self.model.generate(
                input_ids=ids,
                attention_mask=mask,
                past_key_values=self.cache,
                max_new_tokens=new_tokens,
                streamer=streamer,
                **self.sampling,
            )
        except BaseException as error:
            error.outputs = outputs  # type: ignore[attr-defined]
            raise
        finally:
            if words is not None:
                words.end()  # type: ignore[no-untyped-call]
            self.timing.total_s = before + time.perf_counter() - started
            for output in outputs:
                output.text = self.tokenizer.decode(
                    output.token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
                )
        return outputs

    def _share_prompt(
        self, ids: torch.Tensor, mask: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Computes each prompt once and forks it: samples share its full pages.

        The last token is left for ``generate``, which needs its logits.
        """
        if ids.shape[1] > 1:
            greedy = {**self.sampling, "do_sample": False}
            self.model.generate(
                input_ids=ids[:, :-1],
                attention_mask=mask[:, :-1],
                past_key_values=self.cache,
                max_new_tokens=1,
                **{k: v for k, v in greedy.items() if k not in ("temperature", "top_p", "top_k")},
            )
            self.cache.batch_repeat_interleave(self.samples)
        return (
            ids.repeat_interleave(self.samples, dim=0),
            mask.repeat_interleave(self.samples, dim=0),
        )


def sampling_options(
    defaults: Any, temperature: float | None, top_p: float | None, top_k: int | None
) -> dict[str, Any]:
    """Keyword arguments of ``generate``: what was asked, else the model's own, else 0.8 / 0.95.

    Args:
        defaults: the model's generation configuration.
        temperature: 0 for the likeliest token always.
        top_p: share of probability to sample from.
        top_k: number of tokens to sample from; 0 or -1 for all.
    """
    own = bool(defaults.do_sample)
    if temperature is None:
        temperature = (defaults.temperature or 1.0) if own else 0.8
    common = {"num_beams": 1, "num_return_sequences": 1}
    if temperature == 0:
        return common | {"do_sample": False}
    if top_p is None:
        top_p = (defaults.top_p or 1.0) if own else 0.95
    if top_k is None:
        top_k = (defaults.top_k or 0) if own else 0
    return common | {
        "do_sample": True,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": max(top_k, 0),
    }
