"""Makes requests of prompts and parameters, or says what is wrong with them."""

from __future__ import annotations

import math
import operator
import random
import time
from collections.abc import Sequence
from typing import Any

from vattn.engine.config import EngineConfig
from vattn.engine.draw import derive_seed
from vattn.engine.grammars import Grammar, GrammarCompiler
from vattn.engine.score_room import MAX_SCORED_TOKENS, score_share
from vattn.engine.token_sets import bad_words_ids, check_token_sets
from vattn.hf.model import LoadedModel
from vattn.request import Request
from vattn.sampling_params import ALL_LOGPROBS, SamplingParams


class Intake:
    """What an engine accepts.

    Args:
        loaded: the model.
        config: the engine's settings.
        max_model_len: longest sequence in tokens.
        tokenizer: for stop strings, bad words and structured outputs; None if there is none.
        grammars: compiles structured outputs; None if there are none.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        config: EngineConfig,
        max_model_len: int,
        *,
        tokenizer: Any,
        grammars: GrammarCompiler | None = None,
    ) -> None:
        self.max_model_len = max_model_len
        self._loaded = loaded
        self._policy = config.scheduling_policy
        self._max_logprobs = config.max_logprobs
        self._chunks = config.enable_chunked_prefill
        self._tokenizer = tokenizer
        self._grammars = grammars
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
        self._check_params(params, priority)
        ids = self._checked_prompt(prompt_ids, params.truncate_prompt_tokens)
        self._check_scores(params, len(ids))
        if timeout_s is not None and not 0 < timeout_s < math.inf:
            raise ValueError(f"timeout_s={timeout_s!r} must be a positive number of seconds")
        now = time.monotonic()
        seed = params.seed if params.seed is not None else self._seeds.getrandbits(63)
        most = self.max_model_len - len(ids)
        stop_ids = frozenset(params.stop_ids)
        if not params.ignore_eos:
            stop_ids |= self._loaded.eos_token_ids
        vocab_size = self._loaded.vocab_size
        bad_words = bad_words_ids(params.bad_words or (), self._tokenizer, vocab_size)
        check_token_sets(params, stop_ids, bad_words, vocab_size)
        grammar = self._grammar(params, stop_ids)
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
                bad_words_ids=bad_words,
                needs_tokens=params.has_penalties or bool(bad_words),
                logprobs=None if params.logprobs is None else [],
                # Of one prompt: computed once, for sample 0.
                prompt_logprobs=None if params.prompt_logprobs is None or index else [None],
            )
            if grammar is not None:
                request.grammar, request.needs_tokens = grammar.copy(), True
            request.timings.arrival_s = now
            requests.append(request)
        return requests

    def _grammar(self, params: SamplingParams, stop_ids: frozenset[int]) -> Grammar | None:
        if params.structured_outputs is None:
            return None
        if self._grammars is None:
            raise ValueError("structured_outputs need a tokenizer, and this engine has none")
        grammar = self._grammars.compile(params.structured_outputs)
        if not stop_ids and grammar.is_complete():
            raise ValueError(
                "structured_outputs allow nothing but an empty output, which only an "
                "end-of-sequence token can be; leave ignore_eos off, or allow more"
            )
        return grammar

    def _checked_prompt(self, prompt_ids: Sequence[int], keep: int | None) -> list[int]:
        """The token ids, of which the last ``keep`` are used; -1 for as many as can be."""
        try:
            ids = [operator.index(token) for token in prompt_ids]
        except TypeError as error:
            raise ValueError(f"the prompt has something that is no token id: {error}") from error
        if any(isinstance(token, bool) for token in prompt_ids):
            raise ValueError("the prompt has True or False in it, which are no token ids")
        if not ids:
            raise ValueError("the prompt is empty; give at least one token")
        if min(ids) < 0 or max(ids) >= self._loaded.vocab_size:
            bad = next(t for t in ids if not 0 <= t < self._loaded.vocab_size)
            raise ValueError(
                f"token id {bad} is not one of the {self._loaded.vocab_size} of this model"
            )
        if keep is not None:
            ids = ids[-(self.max_model_len - 1 if keep < 0 else keep) :]
        if len(ids) >= self.max_model_len:
            raise ValueError(
                f"the prompt has {len(ids)} tokens, and max_model_len={self.max_model_len} leaves "
                "no room for a new one; shorten it, set truncate_prompt_tokens, or raise "
                "max_model_len if the model allows it"
            )
        return ids

    def _check_params(self, params: SamplingParams, priority: int) -> None:
        if not isinstance(params, SamplingParams):
            raise TypeError(f"sampling_params={params!r} is not a vattn.SamplingParams")
        if params.stop_strings and self._tokenizer is None:
            raise ValueError("stop strings need a tokenizer; use stop_token_ids")
        self._check_logprobs(params)
        if isinstance(priority, bool) or not hasattr(priority, "__index__"):
            raise ValueError(f"priority={priority!r} must be a whole number")
        if priority and self._policy == "fcfs":
            raise ValueError(
                f'priority={priority} needs scheduling_policy="priority", or a function that ranks '
                "by it; this engine serves first come, first served"
            )

    def _check_logprobs(self, params: SamplingParams) -> None:
        if self._max_logprobs < 0:
            return
        for name in ("logprobs", "prompt_logprobs"):
            count = getattr(params, name)
            asked = self._loaded.vocab_size if count == ALL_LOGPROBS else count
            if asked is not None and asked > self._max_logprobs:
                what = f" asks for all {asked} tokens, which" if count == ALL_LOGPROBS else ""
                raise ValueError(
                    f"{name}={count}{what} is more than max_logprobs={self._max_logprobs} of this "
                    "engine; lower it, or make the engine with a higher max_logprobs (-1: no limit)"
                )

    def _check_scores(self, params: SamplingParams, prompt_tokens: int) -> None:
        """Without chunks a prompt is scored in one step, or never."""
        if params.prompt_logprobs is None or self._chunks:
            return
        most = MAX_SCORED_TOKENS // score_share(params, self._loaded.vocab_size)
        if prompt_tokens - 1 > most:
            raise ValueError(
                f"prompt_logprobs={params.prompt_logprobs} of a prompt of {prompt_tokens} tokens: "
                f"a step scores {most} at most, and enable_chunked_prefill=False leaves it one "
                "step; turn that on, or shorten the prompt"
            )
