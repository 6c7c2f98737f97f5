"""The ways to generate that `bench.levels.peers` compares, each on a model of its own."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from transformers import (
    ContinuousBatchingConfig,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
)

from bench.batching_config import FLASH, batching_config, has_setting
from bench.common import Json

PAD = 0  # a token that no prompt has
DECISIVE = 0.1  # deviation of weights that is large enough for attention to decide the next token


@dataclass(frozen=True)
class Work:
    """Prompts, and how many tokens to generate for each."""

    prompts: list[list[int]]
    new_tokens: list[int]

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def generated(self) -> int:
        """Tokens to generate, over all of them."""
        return sum(self.new_tokens)

    @property
    def totals(self) -> list[int]:
        """Tokens of each at its end."""
        return [len(p) + n for p, n in zip(self.prompts, self.new_tokens, strict=True)]


def make_work(
    prompt_tokens: Sequence[int], new_tokens: Sequence[int], vocabulary: int, seed: int
) -> Work:
    """Random prompts of these lengths, without the padding token."""
    random = np.random.default_rng(seed)
    prompts = [random.integers(PAD + 1, vocabulary, n).tolist() for n in prompt_tokens]
    return Work(prompts, list(new_tokens))


def make_llama(
    layers: int, width: int, head_dim: int, vocabulary: int, positions: int
) -> LlamaForCausalLM:
    """A Llama with random weights in fp32, and no token that ends a text."""
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // head_dim,
        num_key_value_heads=width // head_dim,
        max_position_embeddings=positions,
        initializer_range=DECISIVE,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=PAD,
    )
    config._attn_implementation = "sdpa"
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(config)
    return model.eval()  # type: ignore[no-any-return]


class Side(Protocol):
    """One way to generate."""

    name: str

    def run(self, work: Work) -> list[list[int]]:
        """The generated tokens, greedy, exactly as many as asked for."""
        ...

    def close(self) -> None:
        """Gives back what it holds."""
        ...


class Padded:
    """`generate` on batches of fixed size, padded on the left, each until its longest is done.

    Args:
        batch: rows of a batch.
        by_length: batches of similar answers, as if their lengths were known; else by arrival.
    """

    def __init__(
        self, model: LlamaForCausalLM, batch: int, name: str, *, by_length: bool = False
    ) -> None:
        self.model = copy.deepcopy(model)
        self.batch = batch
        self.name = name
        self.by_length = by_length

    def run(self, work: Work) -> list[list[int]]:
        order = list(range(len(work)))
        if self.by_length:
            order.sort(key=lambda i: (work.new_tokens[i], len(work.prompts[i])))
        found: list[list[int]] = [[] for _ in order]
        for start in range(0, len(order), self.batch):
            rows = order[start : start + self.batch]
            longest = max(len(work.prompts[i]) for i in rows)
            ids = torch.full((len(rows), longest), PAD)
            for row, i in enumerate(rows):
                ids[row, longest - len(work.prompts[i]) :] = torch.tensor(work.prompts[i])
            texts = self._generate(ids, max(work.new_tokens[i] for i in rows))
            for row, i in enumerate(rows):
                found[i] = texts[row, longest : longest + work.new_tokens[i]].tolist()
        return found

    def _generate(self, ids: torch.Tensor, new_tokens: int) -> torch.Tensor:
        model: Any = self.model
        with torch.inference_mode():
            texts: torch.Tensor = model.generate(
                ids.to(model.device),
                attention_mask=(ids != PAD).long().to(model.device),
                max_new_tokens=new_tokens,
                do_sample=False,
                pad_token_id=PAD,
            )
        return texts

    def close(self) -> None:
        pass


class Settings(Protocol):
    """Of transformers' continuous batching."""

    def prepare(self, model: Any) -> None:
        """Changes of the model what is said there and not in the configuration."""
        ...

    def config(self, work: Work) -> ContinuousBatchingConfig:
        """For this work."""
        ...


@dataclass(frozen=True)
class BatchSettings:
    """Of transformers' continuous batching; the rest is its defaults.

    ``flash``: whether it may take FlashAttention; None leaves that to it.
    """

    page_tokens: int
    step_tokens: int
    sequences: int
    flash: bool | None = None

    def prepare(self, model: Any) -> None:
        """See :class:`Settings`; without a setting, an attention named paged is left alone."""
        if self.flash is False and not has_setting(FLASH):
            model.set_attn_implementation("paged|sdpa")

    def config(self, work: Work) -> ContinuousBatchingConfig:
        """With room for the longest requests that run at once, so that nothing is evicted."""
        longest = sorted(work.totals)[-self.sequences :]
        flash = {} if self.flash is None or not has_setting(FLASH) else {FLASH: self.flash}
        return batching_config(
            page_tokens=self.page_tokens,
            num_blocks=sum(-(-n // self.page_tokens) + 1 for n in longest),
            max_batch_tokens=self.step_tokens,
            max_requests_per_batch=self.sequences,
            **flash,
        )

    def as_json(self) -> Json:
        return {
            "page_size": self.page_tokens,
            "max_batch_tokens": self.step_tokens,
            "max_requests_per_batch": self.sequences,
        } | ({} if self.flash is None else {FLASH: self.flash})


class GenerateBatch:
    """What `generate_batch` does, which takes no lengths per request itself.

    Args:
        settings: of the manager; None for its defaults.
        keep: the work that a manager is made for once and kept; None to make one in each call, as
            `generate_batch` does.
    """

    def __init__(
        self,
        model: LlamaForCausalLM,
        settings: Settings | None,
        name: str,
        keep: Work | None = None,
    ) -> None:
        # It says on a CPU that psutil is missing; nothing here depends on it.
        logging.getLogger("ContinuousBatchingLogger").setLevel(logging.CRITICAL)
        self.model = copy.deepcopy(model)
        if settings is not None:
            settings.prepare(self.model)
        self.settings = settings
        self.name = name
        self._kept: Any = None
        self._context: Any = None
        if keep is not None:
            self._context = self._manager(keep)
            self._kept = self._context.__enter__()

    @contextmanager
    def _manager(self, work: Work) -> Iterator[Any]:
        make_config: Any = GenerationConfig
        generation = make_config(do_sample=False, eos_token_id=-1, pad_token_id=PAD)
        settings = self.settings
        model: Any = self.model
        with model.continuous_batching_context_manager(
            generation_config=generation,
            continuous_batching_config=None if settings is None else settings.config(work),
            timeout=5,
        ) as manager:
            yield manager

    def run(self, work: Work) -> list[list[int]]:
        if self._kept is not None:
            return self._answers(self._kept, work)
        with self._manager(work) as manager:
            return self._answers(manager, work)

    def _answers(self, manager: Any, work: Work) -> list[list[int]]:
        places = {
            manager.add_request(ids, max_new_tokens=n, eos_token_id=-1): i
            for i, (ids, n) in enumerate(zip(work.prompts, work.new_tokens, strict=True))
        }
        found: list[list[int]] = [[] for _ in places]
        for _ in places:
            result = None
            while result is None:
                result = manager.get_result(timeout=1)
                if result is None and not manager.is_running():
                    raise RuntimeError("the thread of transformers' generate_batch has ended")
            if result.error is not None:
                raise RuntimeError(f"transformers' generate_batch failed: {result.error}")
            found[places[result.request_id]] = list(result.generated_tokens)
        return found

    def close(self) -> None:
        if self._context is not None:
            self._context.__exit__(None, None, None)


def tune(model: Any, grid: Sequence[BatchSettings], work: Work) -> tuple[BatchSettings, list[Json]]:
    """The settings that are fastest here, and what each of them took (the better of two runs).

    Raises:
        RuntimeError: none of them work; the message says why.
    """
    tried: list[Json] = []
    for settings in grid:
        row = settings.as_json()
        try:
            row["tokens_per_s"] = work.generated / _best_of_two(model, settings, work)
        except Exception as error:  # a kernel that is not there, memory: any type
            row["why"] = f"{type(error).__name__}: {error}"
        tried.append(row)
    rates = [row.get("tokens_per_s", 0.0) for row in tried]
    if not any(rates):
        raise RuntimeError(f"no settings of generate_batch work; {tried[0]['why']}")
    return grid[rates.index(max(rates))], tried


def _best_of_two(model: Any, settings: BatchSettings, work: Work) -> float:
    side = GenerateBatch(model, settings, "")
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        side.run(work)
        seconds.append(time.perf_counter() - start)
    return min(seconds)
