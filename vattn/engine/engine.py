"""The loop: schedule, run the model, sample, tell."""

from __future__ import annotations

import contextlib
import math
import operator
import random
import threading
import time
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch

from vattn._core import DriverError
from vattn.attention.base import Backend
from vattn.attention.select import choose
from vattn.config import format_bytes, parse_bytes
from vattn.engine.config import EngineConfig
from vattn.engine.memory import MemoryManager
from vattn.engine.outputs import OutputProcessor
from vattn.engine.runner import ModelRunner
from vattn.engine.sampler import Sampler, derive_seed
from vattn.engine.scheduler import Plan, Scheduler
from vattn.hf.model import LoadedModel
from vattn.kv.cache import KVCache
from vattn.kv.pool import PagePool, open_driver
from vattn.kv.swap import SwapSpace
from vattn.metrics import EngineStats
from vattn.request import FinishReason, Request, SamplingParams

# Slots beside those that may run, to keep finished sequences as prefix cache: addresses only.
_KEPT_SLOTS_PER_SEQ = 3
_MIN_KEPT_SLOTS = 64
_PAUSE_S = 0.001
_SWAP_GIB = {"cpu": 0.0, "cuda": 4.0}
# On a GPU, pages are created ahead of need, in the background: creating one costs as much as fifty
# mappings, and a batch that fills up wants gigabytes in a second.
AHEAD_BYTES = {"cpu": 0, "cuda": 4 << 30}


class Engine:
    """One model, its KV cache, and the requests that share them.

    ``add`` and ``abort`` may be called from any thread; everything else from one.

    Args:
        loaded: the model.
        config: settings.
        tokenizer: for text; None for token ids only.
        pool: physical memory to share with other caches; None for one of its own.

    Raises:
        ValueError: settings that the model or the device cannot meet.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        config: EngineConfig,
        tokenizer: Any = None,
        pool: PagePool | None = None,
    ) -> None:
        self.loaded = loaded
        self.config = config
        self.max_model_len = _max_model_len(loaded, config)
        backend = choose(loaded.specs, loaded.device, config.order, name=config.attention_backend)
        if pool is None:
            pool = _make_pool(loaded.device, config)
        elif (
            config.page_bytes
            or config.kv_cache_memory_bytes
            or config.strict
            or config.gpu_memory_utilization
        ):
            raise ValueError(
                "page_bytes, kv_cache_memory_bytes, gpu_memory_utilization and strict belong to "
                "the pool given"
            )
        if pool.device != loaded.device:
            raise ValueError(
                f"the pool given is on {pool.device}, and the model on {loaded.device}; make them "
                "agree"
            )
        self.cache = _make_cache(loaded, config, self.max_model_len, backend, pool)
        swap_gib = config.swap_space
        if swap_gib is None:
            swap_gib = _SWAP_GIB[loaded.device.type]
        self.memory = MemoryManager(
            self.cache,
            prefix_caching=config.enable_prefix_caching,
            swap=SwapSpace(int(swap_gib * 2**30), pinned=loaded.device.type == "cuda"),
        )
        self.scheduler = Scheduler(
            self.memory,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.step_tokens,
            max_model_len=self.max_model_len,
            policy=config.scheduling_policy,
            enable_chunked_prefill=config.enable_chunked_prefill,
            stage_ahead=config.prepare_ahead,
        )
        self.runner = ModelRunner(loaded, self.cache, backend)
        self.sampler = Sampler(loaded.vocab_size, loaded.device)
        self.outputs = OutputProcessor(tokenizer)
        self._seeds = random.Random(config.seed)
        self._inbox: list[Request | str] = []
        self._inbox_lock = threading.Lock()
        self._samples: dict[str, list[Request]] = {}  # unfinished, by the prompt's name
        self._steps = self._prompt_tokens = self._generation_tokens = 0

    # Requests -------------------------------------------------------------------------------------

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
        """The requests for the ``params.n`` samples of a prompt; :meth:`add` each of them.

        Args:
            name: of the prompt; sample ``i`` is called ``name.i`` if there are several.
            prompt_ids: token ids.
            params: how to sample.
            priority: smaller goes first; needs ``scheduling_policy="priority"``.
            cache_salt: requests share K and V only with those of the same salt.
            timeout_s: seconds from now after which it ends with what it has.

        Raises:
            ValueError: a prompt or parameters that this model cannot serve.
        """
        ids = self._checked_prompt(prompt_ids)
        self._check_params(params, priority)
        if timeout_s is not None and not 0 < timeout_s < math.inf:
            raise ValueError(f"timeout_s={timeout_s!r} must be a positive number of seconds")
        now = time.monotonic()
        seed = params.seed if params.seed is not None else self._seeds.getrandbits(63)
        most = self.max_model_len - len(ids)
        stop_ids = frozenset(params.stop_ids)
        if not params.ignore_eos:
            stop_ids |= self.loaded.eos_token_ids
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
        if min(ids) < 0 or max(ids) >= self.loaded.vocab_size:
            bad = next(t for t in ids if not 0 <= t < self.loaded.vocab_size)
            raise ValueError(
                f"token id {bad} is not one of the {self.loaded.vocab_size} of this model"
            )
        return ids

    def _check_params(self, params: SamplingParams, priority: int) -> None:
        if not isinstance(params, SamplingParams):
            raise TypeError(f"sampling_params={params!r} is not a vattn.SamplingParams")
        if params.stop_strings and self.outputs.tokenizer is None:
            raise ValueError("stop strings need a tokenizer; use stop_token_ids")
        if isinstance(priority, bool) or not hasattr(priority, "__index__"):
            raise ValueError(f"priority={priority!r} must be a whole number")
        if priority and self.config.scheduling_policy != "priority":
            raise ValueError(
                f'priority={priority} needs scheduling_policy="priority"; this engine serves first '
                "come, first served"
            )
        for token in params.stop_ids:
            if token >= self.loaded.vocab_size:
                raise ValueError(
                    f"stop_token_ids has {token}, not one of the {self.loaded.vocab_size} tokens"
                )

    def add(self, request: Request) -> None:
        """Queues a request. It is scheduled from the next step on."""
        with self._inbox_lock:
            self._inbox.append(request)

    def abort(self, ids: str | Iterable[str]) -> None:
        """Ends requests with what they have; unknown and finished ones are left as they are.

        Args:
            ids: of requests, or of prompts whose ``n`` samples are meant.
        """
        with self._inbox_lock:
            self._inbox.extend([ids] if isinstance(ids, str) else ids)

    @property
    def has_unfinished(self) -> bool:
        """Whether a step would have something to do or to tell."""
        return bool(self._inbox) or self.scheduler.has_unfinished

    # Steps ----------------------------------------------------------------------------------------

    def step(self) -> list[Request]:
        """Runs the model once over what is scheduled.

        Returns:
            The requests with new tokens, and those that have ended for any reason.
        """
        try:
            return self._step()
        except BaseException as error:
            # Whatever was interrupted, nothing half-done is left, and no K or V that was not
            # computed is found by the next request.
            text = f"the engine was interrupted: {type(error).__name__}: {error}"
            self.scheduler.lose_all(text)
            with contextlib.suppress(DriverError):  # after a fatal one there is nothing to save
                self.memory.lose_all()
            raise

    def _step(self) -> list[Request]:
        news: list[Request] = []
        if self._inbox:
            self._take_inbox()
        plan = self.scheduler.schedule()
        if plan.slots:
            self._steps += 1
            news = self._run(plan)
        ended = self.scheduler.take_finished()
        if ended:
            seen = set(map(id, news))
            news = news + [request for request in ended if id(request) not in seen]
            self.outputs.ended(ended)
            for request in ended:
                self._forget_sample(request)
        elif not plan.slots:
            time.sleep(_PAUSE_S)  # what is waiting needs pages that are in use elsewhere
        return news

    def _take_inbox(self) -> None:
        with self._inbox_lock:
            inbox, self._inbox = self._inbox, []
        for item in inbox:
            if not isinstance(item, Request):
                for sample in self._samples.get(item, ()):
                    self.scheduler.abort(sample)
                self.scheduler.abort(item)
                continue
            try:
                self.outputs.add(item)
                self.scheduler.add(item)
            except Exception as error:  # of this request alone
                self.outputs.ended([item])
                self.scheduler.refuse(item, f"{type(error).__name__}: {error}")
            else:
                if item.params.n > 1:
                    self._samples.setdefault(item.id.rpartition(".")[0], []).append(item)

    def _forget_sample(self, request: Request) -> None:
        name = request.id.rpartition(".")[0]
        samples = self._samples.get(name, [])
        if request in samples:
            samples.remove(request)
            if not samples:
                del self._samples[name]

    def _run(self, plan: Plan) -> list[Request]:
        """Forward, sampling and bookkeeping of one step; the requests that got a token."""
        slots, query_lens, kv_lens, input_ids, logit_rows = _pack(plan)
        decodes, sampling = len(plan.decodes), plan.sampling
        self.scheduler.computed(plan)
        try:
            logits = self.runner.run(slots, query_lens, kv_lens, decodes, input_ids, logit_rows)
            # The device works now. What is staged may copy what this step writes, so not earlier.
            prompt_ends = self.memory.last_prompt_tokens(plan.decodes)
            self.memory.index_prompts()
            self._stage()
            sampled = self.sampler.sample(logits, sampling).to_host() if sampling else None
        except DriverError as error:
            if error.fatal:
                raise
            return self._fail(plan, error)
        except Exception as error:
            return self._fail(plan, error)
        self._prompt_tokens += len(input_ids) - decodes + prompt_ends
        return self._take(sampling, sampled) if sampled is not None else []

    def _stage(self) -> None:
        """Staging can wait; what the step computes is sound whatever becomes of it."""
        try:
            self.scheduler.stage()
        except DriverError as error:
            if error.fatal:
                raise

    def _take(self, sampling: list[Request], sampled: Any) -> list[Request]:
        """Appends the sampled tokens and ends what is complete."""
        for row in sampled.bad_rows():
            self.scheduler.finish(
                sampling[row],
                FinishReason.ERROR,
                error="no token can be sampled: the model's logits are not finite (check its "
                "weights and dtype), or min_tokens and stop_token_ids exclude every token",
            )
        self._generation_tokens += len(sampling)
        self.scheduler.append_tokens(sampling, sampled.token_ids)
        for request, stop in self.outputs.process(sampling, sampled):
            if isinstance(stop, Exception):
                text = f"the tokenizer cannot decode its tokens: {stop}"
                self.scheduler.finish(request, FinishReason.ERROR, error=text)
            elif request.finished:
                self.scheduler.restate(request, stop)
            else:
                self.scheduler.finish(request, FinishReason.STOP, stop_reason=stop)
        return sampling

    def _fail(self, plan: Plan, error: Exception) -> list[Request]:
        """The step went wrong: what its requests hold is not to be trusted."""
        text = f"the step failed: {type(error).__name__}: {error}"
        for request in [*plan.decodes, *(r for r, _ in plan.chunks)]:
            self.scheduler.finish(request, FinishReason.ERROR, error=text)
        return []

    # Reports --------------------------------------------------------------------------------------

    def stats(self) -> EngineStats:
        """Figures of this moment."""
        scheduler, memory = self.scheduler.stats(), self.memory.counters
        return EngineStats(
            num_running=scheduler.running,
            num_waiting=scheduler.waiting,
            num_preemptions=scheduler.preemptions,
            num_steps=self._steps,
            prompt_tokens=self._prompt_tokens,
            generation_tokens=self._generation_tokens,
            finished=dict(scheduler.finished),
            prefix_cache_queries=memory.prefix_queries,
            prefix_cache_hits=memory.prefix_hits,
            requests_reopened=memory.reopened,
            requests_forked=memory.forked,
            requests_swapped_out=memory.swapped_out,
            requests_swapped_in=memory.swapped_in,
            swap_used_bytes=self.memory.swap.used_bytes,
            cache=self.cache.stats(),
        )

    def check(self) -> None:
        """Verifies the invariants of scheduler, memory manager and cache."""
        self.scheduler.check()
        self.memory.check()

    def close(self) -> None:
        """Aborts what runs and gives the memory of the KV cache back."""
        if self._inbox:
            self._take_inbox()
        self.scheduler.abort_all()
        self.cache.close()


def _pack(plan: Plan) -> tuple[Any, Any, Any, Any, Any]:
    """A plan as the arrays that :meth:`vattn.engine.runner.ModelRunner.run` takes."""
    decodes = len(plan.decodes)
    ids = [r.tokens[-1] for r in plan.decodes]
    query_lens = [1] * decodes
    rows = list(range(decodes))
    for request, n in plan.chunks:
        first = request.computed
        query_lens.append(n)
        ids += request.tokens[first : first + n]
        if first + n == len(request.tokens):
            rows.append(len(ids) - 1)
    return (
        np.array(plan.slots, np.int32),
        np.array(query_lens, np.int32),
        np.array(plan.kv_lens, np.int32),
        np.array(ids, np.int64),
        np.array(rows, np.int64),
    )


def _max_model_len(loaded: LoadedModel, config: EngineConfig) -> int:
    limit, asked = loaded.max_positions, config.max_model_len
    if asked is not None and limit is not None and asked > limit:
        raise ValueError(
            f"max_model_len={asked} is beyond the {limit} positions that the model was made for"
        )
    if asked is None and limit is None:
        raise ValueError("the model does not say how long it can get; give max_model_len")
    length = asked if asked is not None else limit
    assert length is not None
    return length


def _make_pool(device: torch.device, config: EngineConfig) -> PagePool:
    driver = open_driver(device, strict=config.strict)
    return PagePool(
        device,
        driver=driver,
        page_bytes=config.page_bytes,
        budget_bytes=_budget_bytes(config, driver),
        ahead_bytes=AHEAD_BYTES[device.type],
    )


def _make_cache(
    loaded: LoadedModel, config: EngineConfig, tokens: int, backend: Backend, pool: PagePool
) -> KVCache:
    """The KV cache, with as many slots for kept sequences as kernels can address."""
    kept = max(_MIN_KEPT_SLOTS, _KEPT_SLOTS_PER_SEQ * config.max_num_seqs)
    choices = [kept, kept // 2, kept // 4, 0] if config.enable_prefix_caching else [0]
    for extra in choices:
        try:
            return KVCache(
                loaded.layer_specs(),
                max_seqs=config.max_num_seqs + extra,
                max_tokens=tokens,
                pool=pool,
                order=config.order or backend.order,
                layers_per_region=config.layers_per_region,
                kv_tile_tokens=backend.kv_tile_tokens,
            )
        except ValueError:
            if extra == 0:
                raise
    raise AssertionError("unreachable")


def _budget_bytes(config: EngineConfig, driver: Any) -> int | None:
    """The KV cache's budget; None for the pool's default."""
    if config.kv_cache_memory_bytes is not None:
        return parse_bytes(config.kv_cache_memory_bytes, "kv_cache_memory_bytes")
    share = config.gpu_memory_utilization
    if share is None:
        return None
    free, total = driver.memory_info()
    budget: int = int(total * share) - (total - free)
    if budget <= 0:
        raise ValueError(
            f"gpu_memory_utilization={share} of {format_bytes(total)} leaves nothing for the KV "
            f"cache: {format_bytes(total - free)} are in use; raise it, or free memory"
        )
    return budget
