"""Mixed-length serving: requests join and leave padded batches whose caches grow by a token a step.

The cache is transformers' ``DynamicCache``, padded on the left. Each group of requests is a batch
of its own; with two groups the second one's steps are on another stream.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any

import numpy as np
import torch
from torch.nn.functional import pad
from transformers import DynamicCache

from bench.alloc_traces.models import build_model, llama_config
from bench.alloc_traces.program import Marks, Workload
from bench.alloc_traces.training import draw_tokens

_ROWS = 16  # most requests in a group
_JOINING = 3  # most requests that a step prefills
_REQUESTS = 48
_LONGEST_PROMPT = 1024
_LONGEST_ANSWER = 96


@dataclass(frozen=True)
class Request:
    """Tokens of a prompt and of its answer."""

    prompt: int
    answer: int


def draw_requests(count: int, seed: int = 0) -> list[Request]:
    """Log-normal lengths: most are short, some are very long."""
    random = np.random.default_rng(seed)
    prompts = np.clip(random.lognormal(np.log(220), 0.9, count), 8, _LONGEST_PROMPT)
    answers = np.clip(random.lognormal(np.log(24), 0.7, count), 2, _LONGEST_ANSWER)
    return [Request(int(p), int(a)) for p, a in zip(prompts, answers, strict=True)]


class Group:
    """A padded batch of running requests and the ones that wait for it.

    Args:
        model: a causal language model.
        device: where it runs.
        requests: to be served, in order.
    """

    def __init__(self, model: Any, device: torch.device, requests: Sequence[Request]) -> None:
        self._model = model
        self._device = device
        self._waiting = list(requests)[::-1]
        self._left: list[int] = []  # tokens that each row still has to generate
        self._cache = DynamicCache(config=model.config)
        self._mask = torch.ones((0, 0), dtype=torch.int64, device=device)
        self._next = torch.ones((0, 1), dtype=torch.int64, device=device)

    @property
    def busy(self) -> bool:
        """Whether a request runs or waits."""
        return bool(self._waiting or self._left)

    @torch.inference_mode()
    def step(self) -> None:
        """Prefills requests that have room, then generates a token of each running one."""
        count = min(_JOINING, _ROWS - len(self._left), len(self._waiting))
        if count:
            self._admit([self._waiting.pop() for _ in range(count)])
        self._decode()
        self._leave()

    def _admit(self, requests: Sequence[Request]) -> None:
        longest = max(request.prompt for request in requests)
        ids = draw_tokens((len(requests), longest), self._device)
        lengths = torch.tensor([request.prompt for request in requests], device=self._device)
        places = torch.arange(longest, device=self._device)
        mask = (places[None] >= longest - lengths[:, None]).long()
        cache = DynamicCache(config=self._model.config)
        following = self._forward(ids, mask, cache)
        if not self._left:
            self._cache, self._mask, self._next = cache, mask, following
        else:
            self._join(cache, mask, following)
        self._left += [request.answer for request in requests]

    def _join(self, cache: DynamicCache, mask: torch.Tensor, following: torch.Tensor) -> None:
        """Rows of another cache come below ours; the shorter cache is padded on the left."""
        tokens = max(self._mask.shape[1], mask.shape[1])
        for ours, theirs in zip(self._cache.layers, cache.layers, strict=True):
            for name in ("keys", "values"):
                parts = [_padded(getattr(layer, name), tokens) for layer in (ours, theirs)]
                setattr(ours, name, torch.cat(parts))
        masks = [pad(part, (tokens - part.shape[1], 0)) for part in (self._mask, mask)]
        self._mask = torch.cat(masks)
        self._next = torch.cat([self._next, following])

    def _decode(self) -> None:
        self._mask = pad(self._mask, (0, 1), value=1)
        self._next = self._forward(self._next, self._mask, self._cache)
        self._left = [left - 1 for left in self._left]

    def _leave(self) -> None:
        """Rows that are done go, and so does padding that no row needs any more."""
        stay = [row for row, left in enumerate(self._left) if left]
        if len(stay) == len(self._left):
            return
        rows = torch.tensor(stay, dtype=torch.int64, device=self._device)
        self._left = [self._left[row] for row in stay]
        self._mask, self._next = self._mask[rows], self._next[rows]
        if not stay:
            self._cache = DynamicCache(config=self._model.config)
            return
        start = int(self._mask.argmax(dim=1).min())
        self._mask = self._mask[:, start:]
        for layer in self._cache.layers:
            for name in ("keys", "values"):
                setattr(layer, name, getattr(layer, name)[rows][:, :, start:])

    def _forward(self, ids: torch.Tensor, mask: torch.Tensor, cache: DynamicCache) -> torch.Tensor:
        """Tokens that follow, int64 ``[rows, 1]``, of the last ``ids.shape[1]`` places."""
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        logits = self._model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits
        following: torch.Tensor = logits[:, -1].argmax(-1, keepdim=True)
        return following


def _padded(states: torch.Tensor, tokens: int) -> torch.Tensor:
    """``[rows, heads, tokens, head_dim]`` with zeros on the left."""
    return pad(states, (0, 0, tokens - states.shape[2], 0))


def serve(device: torch.device, marks: Marks, groups: int) -> object:
    """Serves all requests; groups take turns, each on the stream of its number."""
    model = build_model(llama_config(), device).eval()
    requests = draw_requests(_REQUESTS)
    served = [Group(model, device, list(islice(requests, g, None, groups))) for g in range(groups)]
    for number in cycle(range(groups)):
        if not any(group.busy for group in served):
            return model
        if served[number].busy:
            marks.iteration(number)
            served[number].step()
    raise AssertionError("unreachable: groups never end")


def serving(device: torch.device, marks: Marks) -> object:
    return serve(device, marks, groups=1)


def two_streams(device: torch.device, marks: Marks) -> object:
    return serve(device, marks, groups=2)


_SETTINGS = {
    "requests": _REQUESTS,
    "rows": _ROWS,
    "prompt tokens": f"8 to {_LONGEST_PROMPT}",
    "answer tokens": f"2 to {_LONGEST_ANSWER}",
}

SERVING = (
    Workload(
        "serving",
        serving,
        "requests of mixed lengths join and leave a padded batch with a DynamicCache, fp32",
        _SETTINGS,
    ),
    Workload(
        "two_streams",
        two_streams,
        "the requests of serving in two batches whose steps take turns: stream 0 has the weights "
        "and every first step's requests of memory, stream 1 every second step's",
        _SETTINGS,
    ),
)
