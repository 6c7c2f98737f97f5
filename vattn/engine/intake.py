"""Makes requests of prompts and parameters, or says what is wrong with them."""

from __future__ import annotations

import math
import operator
import random
import time
from collections.abc import Sequence

from vattn.engine.config import EngineConfig
from vattn.engine.draw import derive_seed
from vattn.hf.model import LoadedModel
from vattn.request import Request
from vattn.sampling_params import SamplingParams


class Intake:
    """What an engine accepts.

    Args:
        loaded: the model.
        config: the engine's settings.
        max_model_len: longest sequence in tokens.
        has_tokenizer: whether stop strings can be found.
    """

    def __init__(
        self, loaded: LoadedModel, config: EngineConfig, max_model_len: int, *, has_tokenizer: bool
    ) -> None:
        self.max_model_len = max_model_len
        self._loaded = loaded
        self._policy = config.scheduling_policy
        self._has_tokenizer = has_tokenizer
        self._seeds = random.Random(config.seed)

    def make_requests(
        self,
        name: str,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        *,
        priority: int = 0,
        cache_salt: str = "",
        timeout_s: float | None = None,
    ) -> list[Request]:
        """See :meth:`vattn.engine.engine.Engine.make_requests`."""
        ids = self._checked_prompt(prompt_ids)
        self._check_params(params, priority)
        if timeout_s is not None and not 0 < timeout_s < math.inf:
            raise ValueError(f"timeout_s={timeout_s!r} must be a positive number of seconds")
        now = time.monotonic()
        seed = params.seed if params.seed is not None else self._seeds.getrandbits(63)
        most = self.max_model_len - len(ids)
        stop_ids = frozenset(params.stop_ids)
        if not params.ignore_eos:
            stop_ids |= self._loaded.eos_token_ids
        requests: list[Request] = []
        for index in range(params.n):
            request = Request(
                id=name if params.n == 1 else f"{name}.{index}",
                prompt_ids=ids,
                params=params,
                limit=len(ids) + min(params.max_tokens or most, most),
                index=index,
                seed=derive_seed(seed, index),
                stop_ids=stop_ids,
                priority=priority,
                deadline_s=None if timeout_s is None else now + timeout_s,
                cache_salt=cache_salt,
                source=requests[0] if requests else None,
                logprobs=None if params.logprobs is None else [],
            )
            request.timings.arrival_s = now
            requests.append(request)
        return requests

    def _checked_prompt(self, prompt_ids: Sequence[int]) -> list[int]:
        try:
            ids = [operator.index(token) for token in prompt_ids]
        except TypeError as error:
            raise ValueError(f"the prompt has something that is no token id: {error}") from error
        if any(isinstance(token, bool) for token in prompt_ids):
            raise ValueError("the prompt has True or False in it, which are no token ids")
        if not ids:
            raise ValueError("the prompt is empty; give at least one token")
        if len(ids) >= self.max_model_len:
            raise ValueError(
                f"the prompt has {len(ids)} tokens, and max_model_len={self.max_model_len} leaves "
                "no room for a new one; shorten it, or raise max_model_len if the model allows it"
            )
        if min(ids) < 0 or max(ids) >= self._loaded.vocab_size:
            bad = next(t for t in ids if not 0 <= t < self._loaded.vocab_size)
            raise ValueError(
                f"token id {bad} is not one of the {self._loaded.vocab_size} of this model"
            )
        return ids

    def _check_params(self, params: SamplingParams, priority: int) -> None:
        if not isinstance(params, SamplingParams):
            raise TypeError(f"sampling_params={params!r} is not a vattn.SamplingParams")
        if params.stop_strings and not self._has_tokenizer:
            raise ValueError("stop strings need a tokenizer; use stop_token_ids")
        if isinstance(priority, bool) or not hasattr(priority, "__index__"):
            raise ValueError(f"priority={priority!r} must be a whole number")
        if priority and self._policy != "priority":
            raise ValueError(
                f'priority={priority} needs scheduling_policy="priority"; this engine serves first '
                "come, first served"
            )
        for token in params.stop_ids:
            if token >= self._loaded.vocab_size:
                raise ValueError(
                    f"stop_token_ids has {token}, not one of the {self._loaded.vocab_size} tokens"
                )
