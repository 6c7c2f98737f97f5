"""The loop: schedule, run the model, sample, tell."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch

from vattn._core import DriverError
from vattn.attention.upload import Uploader
from vattn.engine.batch import StepBatch, pack
from vattn.engine.beam_scores import BeamScorer
from vattn.engine.config import EngineConfig
from vattn.engine.eviction import PolicyError
from vattn.engine.grammars import GrammarCompiler
from vattn.engine.inbox import Inbox
from vattn.engine.intake import Intake
from vattn.engine.memory import MemoryManager
from vattn.engine.outputs import OutputProcessor
from vattn.engine.sampled import Arriving, HostSampled, Sampled
from vattn.engine.sampler import Sampler
from vattn.engine.scheduler import Plan, Scheduler
from vattn.engine.setup import (
    make_runner,
    max_model_len,
    virtual_storage,
)
from vattn.engine.speculation.make import draft_taken_over, load_draft, make_proposer
from vattn.engine.speculation.proposer import Proposer
from vattn.engine.steps import NO_TOKEN
from vattn.engine.storage import MakeStorage, StorageNeeds
from vattn.engine.structured import StructuredMasks, explain
from vattn.engine.structured import ended as ended_by_grammar
from vattn.hf.model import LoadedModel
from vattn.kv.cache import KVCache
from vattn.kv.pool import PagePool
from vattn.metrics import EngineStats
from vattn.request import FinishReason, Request, Status
from vattn.sampling_params import SamplingParams

_log = logging.getLogger(__name__)

_PAUSE_S = 0.001


class Engine:
    """One model, its KV cache, and the requests that share them.

    ``add`` and ``abort`` may be called from any thread; everything else from one.

    Args:
        loaded: the model.
        config: settings.
        tokenizer: for text; None for token ids only.
        pool: physical memory to share with other caches; None for one of its own.
        make_storage: where K and V are kept; see :mod:`vattn.engine.storage`.

    Raises:
        ValueError: settings that the model or the device cannot meet.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        config: EngineConfig,
        tokenizer: Any = None,
        pool: PagePool | None = None,
        make_storage: MakeStorage = virtual_storage,
    ) -> None:
        self.loaded = loaded
        self.config = config
        with self._on_device(), draft_taken_over(config):
            self._build(tokenizer, pool, make_storage)

    def _build(self, tokenizer: Any, pool: PagePool | None, make_storage: MakeStorage) -> None:
        loaded, config = self.loaded, self.config
        self.max_model_len = max_model_len(loaded, config)
        draft = load_draft(config, loaded)
        self.is_async = config.async_scheduling
        if self.is_async is None:
            self.is_async = loaded.device.type == "cuda" and config.speculative_config is None
        storage = make_storage(
            StorageNeeds(loaded, config, self.max_model_len, int(self.is_async), pool)
        )
        self.storage = storage
        self.scheduler = Scheduler(
            storage.memory,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.step_tokens,
            max_model_len=self.max_model_len,
            policy=config.scheduling_policy,
            enable_chunked_prefill=config.enable_chunked_prefill,
            stage_ahead=config.prepare_ahead,
            steps_in_flight=int(self.is_async),
            vocab_size=loaded.vocab_size,
        )
        self.runner = make_runner(
            loaded,
            config,
            self.cache,
            storage.backend,
            max_model_len=self.max_model_len,
            scratch_slot=self.storage.memory.scratch_slot,
            graphs=storage.graphs,
        )
        self.runner.capture(show_progress=True)
        self.proposer = self.storage.memory.proposer = make_proposer(
            config, draft, storage.pool, self.max_model_len, graphs=storage.graphs
        )
        self._masks = StructuredMasks(loaded.vocab_size, Uploader(loaded.device))
        self.sampler = Sampler(loaded.vocab_size, loaded.device, [self._masks])
        self._beams = BeamScorer(loaded.device)
        self.outputs = OutputProcessor(tokenizer)
        self.scheduler.read_text = self.outputs.end_of_text
        self._intake = Intake(
            loaded,
            config,
            self.max_model_len,
            tokenizer=tokenizer,
            grammars=GrammarCompiler(tokenizer, loaded.vocab_size, loaded.eos_token_ids),
        )
        self._inbox = Inbox(self.scheduler, self.outputs)
        self._in_flight: _Launched | None = None
        self._steps = self._prompt_tokens = self._generation_tokens = 0

    @property
    def cache(self) -> KVCache:
        """Where K and V are. Of another storage, an object with what :class:`EngineCache` has."""
        return cast(KVCache, self.storage.cache)

    @property
    def memory(self) -> MemoryManager:
        """Who decides over the cache. Of another storage, one with what EngineMemory has."""
        return cast(MemoryManager, self.storage.memory)

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
        return self._intake.make_requests(
            name,
            prompt_ids,
            params,
            priority=priority,
            cache_salt=cache_salt,
            timeout_s=timeout_s,
        )

    def add(self, request: Request) -> None:
        """Queues a request. It is scheduled from the next step on."""
        self._inbox.add(request)

    def abort(self, ids: str | Iterable[str]) -> None:
        """Ends requests with what they have; unknown and finished ones are left as they are.

        Args:
            ids: of requests, or of prompts whose ``n`` samples are meant.
        """
        self._inbox.abort([ids] if isinstance(ids, str) else ids)

    @property
    def has_unfinished(self) -> bool:
        """Whether a step would have something to do or to tell."""
        return bool(self._inbox) or self.scheduler.has_unfinished or self._in_flight is not None

    # Steps ----------------------------------------------------------------------------------------

    def step(self) -> list[Request]:
        """Runs the model once over what is scheduled.

        With asynchronous scheduling it launches this step, then takes the tokens of the one before.

        Returns:
            The requests with new tokens, and those that have ended for any reason.
        """
        try:
            with self._on_device():
                return self._step()
        except BaseException as error:
            # Whatever was interrupted, nothing half-done is left, and no K or V that was not
            # computed is found by the next request.
            self._in_flight = None
            self._lose_all(error)
            with contextlib.suppress(DriverError):  # after a fatal one there is nothing to save
                self.storage.memory.lose_all()
            raise

    def _lose_all(self, error: BaseException) -> None:
        self.scheduler.lose_all(f"the engine was interrupted: {type(error).__name__}: {error}")

    def _step(self) -> list[Request]:
        if self._inbox:
            self._inbox.take()
        if self.proposer is not None:
            self._propose(self.proposer)
        plan = self.scheduler.schedule()
        too_early = self._in_flight is not None and _need_tokens(plan)
        if not too_early:
            self._masks.begin(plan.sampling)
        forwarded = self._forward(plan) if plan.slots else None
        news: list[Request] = []
        if self._in_flight is not None and too_early:
            # How they are sampled depends on their latest tokens. The device runs the model while
            # the host looks at these.
            earlier, self._in_flight = self._in_flight, None
            news = self._take(earlier)
            self._masks.begin(plan.sampling)
        launched = None if forwarded is None else self._sample(forwarded)
        if self.is_async:
            launched, self._in_flight = self._in_flight, launched
        if launched is not None:
            news = news + self._take(launched)
        ended = self.scheduler.take_finished()
        if ended:
            seen = set(map(id, news))
            news = news + [request for request in ended if id(request) not in seen]
            self.outputs.ended(ended)
            for request in ended:
                self._inbox.forget(request)
            self._drop_in_flight()
            if not self.scheduler.has_unfinished:
                self.sampler.forget()
        elif not plan.slots and launched is None:
            time.sleep(_PAUSE_S)  # what is waiting needs pages that are in use elsewhere
        return news

    def _propose(self, proposer: Proposer) -> None:
        """Has tokens guessed. Without guesses all goes on, only slower."""
        requests = self.scheduler.may_draft()
        try:
            if requests:
                proposer.propose(requests)
        except Exception as error:
            if _is_fatal(error):
                raise
            for request in requests:
                request.drafts = []
            with contextlib.suppress(DriverError):  # whoever serves next tells of a lasting one
                proposer.lose_all()
            _log.warning("no drafts in this step: %s: %s", type(error).__name__, error)

    def _on_device(self) -> contextlib.AbstractContextManager[Any]:
        """Streams, events and launches are those of the model's device, whatever is current."""
        device = self.loaded.device
        return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()

    def _drop_in_flight(self) -> None:
        """Forgets a step that computed a token in vain for requests that have all ended."""
        if self._in_flight is not None and not self.scheduler.has_unfinished:
            self.scheduler.drop(self._in_flight.plan)
            self._in_flight = None

    def _forward(self, plan: Plan) -> _Forwarded | None:
        """Launches the model over a step; None if that went wrong."""
        self._steps += 1
        batch = pack(plan)
        self.scheduler.computed(plan)
        try:
            return _Forwarded(plan, batch, self.runner.run(batch))
        except Exception as error:
            if _is_fatal(error):
                raise
            self._fail(plan, error)
            return None

    def _sample(self, forwarded: _Forwarded) -> _Launched | None:
        """Launches what follows the model; None if it went wrong, or nobody is told anything."""
        plan, batch, logits = forwarded
        try:
            arriving = None
            if plan.is_told:
                sampled = self._sampled(plan, logits)
                self.runner.remember(batch, sampled.token_ids)
                arriving = sampled.send()
            self.scheduler.sampled(plan)
            # The device works now. What is staged may copy what this step writes, so not earlier.
            prompt_ends = self.storage.memory.last_prompt_tokens(plan.decodes)
            self.storage.memory.index_prompts()
            self._stage()
        except PolicyError:
            raise
        except Exception as error:
            if _is_fatal(error):
                raise
            self._fail(plan, error)
            return None
        drafts = sum(n for _, n in plan.verifies)
        ours = len(plan.decodes) + len(plan.verifies) + drafts  # tokens that are no prompt's
        self._prompt_tokens += len(batch.input_ids) - ours + prompt_ends
        return None if arriving is None else _Launched(plan, arriving)

    def _sampled(self, plan: Plan, logits: torch.Tensor) -> Sampled:
        """The next tokens, and what the model thinks of prompts, on the device."""
        rows = len(plan.sampling)
        beams = self._beams.score(logits[:rows], plan.sampling)  # sampling overwrites the logits
        sampled = self.sampler.sample(logits[:rows], plan.sampling, plan.offsets)
        if beams:
            sampled = sampled.with_beams(beams)
        if not plan.scored:
            return sampled
        targets = [
            t for r, first, n in plan.scored for t in r.prompt_ids[first + 1 : first + n + 1]
        ]
        counts = [r.params.prompt_logprobs or 0 for r, _, n in plan.scored for _ in range(n)]
        return sampled.with_scored(self.sampler.score(logits[rows:], targets, counts))

    def _stage(self) -> None:
        """Staging can wait; what the step computes is sound whatever becomes of it."""
        try:
            self.scheduler.stage()
        except DriverError as error:
            if error.fatal:
                raise

    def _take(self, launched: _Launched) -> list[Request]:
        """Appends the tokens of a step and ends what is complete; the requests that got one."""
        plan = launched.plan
        try:
            sampled = launched.arriving.wait()
        except Exception as error:
            if _is_fatal(error):
                raise
            self._fail(plan, error)
            return []
        sampling = plan.sampling
        self._record_scores(plan, sampled)
        verifying = {request for request, _ in plan.verifies}
        for row in sampled.bad_rows():
            if sampling[row] not in verifying:  # it is decoded again without its drafts
                why = explain(sampling[row]) or NO_TOKEN
                self.scheduler.finish(sampling[row], FinishReason.ERROR, error=why)
        ended = Status.FINISHED
        news = [request for request in dict.fromkeys(sampling) if request.status is not ended]
        self._generation_tokens += self.scheduler.append_tokens(plan, sampled.token_ids)
        self.scheduler.advance_beams(sampled.beams)
        for request, stop in self.outputs.process(sampling, sampled):
            if isinstance(stop, Exception):
                text = f"the tokenizer cannot decode its tokens: {stop}"
                self.scheduler.finish(request, FinishReason.ERROR, error=text)
            elif request.finished:
                self.scheduler.restate(request, stop)
            else:
                self.scheduler.finish(request, FinishReason.STOP, stop_reason=stop)
        for request, problem in ended_by_grammar(news):
            reason = FinishReason.STOP if problem is None else FinishReason.ERROR
            self.scheduler.finish(request, reason, error=problem)
        return news

    def _record_scores(self, plan: Plan, sampled: HostSampled) -> None:
        """Log probabilities of prompt tokens, unless they were recorded before a preemption."""
        row = 0
        for request, first, count in plan.scored:
            known = request.prompt_logprobs
            for position in range(first, first + count):
                if known is not None and len(known) == position + 1:
                    known.append(sampled.scored(row))
                row += 1

    def _fail(self, plan: Plan, error: Exception) -> None:
        """The step went wrong: what its requests hold is not to be trusted."""
        self.scheduler.fail(plan, f"the step failed: {type(error).__name__}: {error}")

    # Reports --------------------------------------------------------------------------------------

    def stats(self) -> EngineStats:
        """Figures of this moment."""
        scheduler, memory = self.scheduler.stats(), self.storage.memory.counters
        drafts = self.scheduler.drafts
        graphs = self.runner.graph_stats
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
            beams_moved=memory.beams_moved,
            requests_swapped_out=memory.swapped_out,
            requests_swapped_in=memory.swapped_in,
            swap_used_bytes=self.storage.memory.swap_used_bytes,
            graphs_captured=graphs.captured,
            steps_by_graph=graphs.replayed,
            cache=self.storage.cache.stats(),
            spec_decode_num_drafts=drafts.drafts,
            spec_decode_num_draft_tokens=drafts.draft_tokens,
            spec_decode_num_accepted_tokens=drafts.accepted_tokens,
            spec_decode_num_accepted_tokens_per_pos=tuple(drafts.accepted_per_position),
        )

    def check(self) -> None:
        """Verifies the invariants of scheduler, memory manager and cache."""
        self.scheduler.check()
        self.storage.memory.check()

    def close(self) -> None:
        """Aborts what runs and gives the memory of the KV cache back."""
        with self._on_device():
            try:
                self.storage.memory.ask_no_more()
                self._inbox.take()
                self.scheduler.abort_all()
                if self._in_flight is not None:
                    self.scheduler.drop(self._in_flight.plan)
            except BaseException as error:
                self._lose_all(error)
                raise
            finally:
                self._in_flight = None
                self._masks.close()
                self.storage.memory.close()
                self.storage.cache.close()


class _Forwarded(NamedTuple):
    """A step whose model was launched, and its logits, on the device."""

    plan: Plan
    batch: StepBatch
    logits: torch.Tensor


@dataclass(frozen=True, slots=True)
class _Launched:
    """A step whose tokens have not been taken."""

    plan: Plan
    arriving: Arriving


def _need_tokens(plan: Plan) -> bool:
    """Whether what is in flight must have arrived before the next tokens are sampled."""
    return any(request.needs_tokens and request.in_flight for request in plan.sampling)


def _is_fatal(error: Exception) -> bool:
    """Whether nothing works any more on the device, as after an illegal access of a kernel."""
    if isinstance(error, DriverError):
        return error.fatal
    # A kernel's error, told by whatever call of torch came next.
    return isinstance(error, torch.AcceleratorError)
