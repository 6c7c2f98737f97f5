"""``vattn.LLM``: a model, its requests and their KV cache in one object, for offline use."""

from __future__ import annotations

import itertools
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeAlias

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from vattn.engine import beam_search
from vattn.engine.config import EngineConfig, known_options
from vattn.engine.engine import Engine
from vattn.engine.prompts import Prompt, as_prompts, check_timeout, one_each, parse_prompt
from vattn.engine.setup import virtual_storage
from vattn.engine.storage import MakeStorage
from vattn.engine.trace import EngineTrace
from vattn.hf.attention import taken_over
from vattn.hf.model import load_model, load_tokenizer
from vattn.kv.pool import PagePool
from vattn.kv.report import MemoryMap
from vattn.metrics import EngineStats
from vattn.outputs import BeamSearchOutput, RequestOutput
from vattn.request import Request
from vattn.sampling_params import BeamSearchParams, RequestOutputKind, SamplingParams
from vattn.tracing import DEFAULT_MAX_EVENTS, TraceSummary

Params: TypeAlias = "SamplingParams | Sequence[SamplingParams] | None"


@dataclass(eq=False)
class _Asked:
    """One prompt and the requests for its samples."""

    id: str
    prompt: str | None
    token_ids: list[int]
    samples: list[Request]
    error: str | None = None

    @property
    def kind(self) -> RequestOutputKind:
        """What its outputs hold in a stream."""
        return self.samples[0].params.output_kind

    @property
    def is_due(self) -> bool:
        """Whether its news are to be told."""
        if self.kind is not RequestOutputKind.FINAL_ONLY:
            return True
        return all(sample.finished for sample in self.samples)


class LLM:
    """A transformers model that serves many requests at once; the shape is vLLM's.

    Every sequence's K and V are contiguous in virtual memory, and an unmodified attention kernel
    reads them there.

    Args:
        model: a directory, an id of the Hugging Face Hub, or a loaded ``PreTrainedModel``.
        tokenizer: another directory or id for the tokenizer, or a tokenizer object.
        skip_tokenizer_init: take and give token ids only.
        dtype: ``"auto"`` for the model's own, a name such as ``"bfloat16"``, or a torch dtype.
        device: None for the GPU where there is one.
        revision: of a Hub model.
        pool: physical memory to share with other caches on the device; None for one of its own.
        storage: where K and V are kept, for those who bring a cache or policy of their own; see
            :mod:`vattn.engine.storage`.
        options: see :class:`vattn.engine.config.EngineConfig`; ``max_model_len``,
            ``max_num_seqs``, ``max_num_batched_tokens``, ``gpu_memory_utilization``,
            ``kv_cache_memory_bytes``, ``swap_space``, ``enable_prefix_caching``, ``seed``, ...

    Raises:
        TypeError: an option that does not exist.
        ValueError: a value out of range, or a model that cannot be served, with the reason. A
            model object has its attention back.
    """

    def __init__(
        self,
        model: str | Path | Any,
        *,
        tokenizer: str | Path | Any | None = None,
        skip_tokenizer_init: bool = False,
        dtype: str | torch.dtype = "auto",
        device: str | torch.device | None = None,
        revision: str | None = None,
        pool: PagePool | None = None,
        storage: MakeStorage = virtual_storage,
        **options: Any,
    ) -> None:
        config = EngineConfig(**known_options(options, "LLM()"))
        if pool is not None and config.gpu_memory_utilization is not None:
            raise ValueError(
                f"gpu_memory_utilization={config.gpu_memory_utilization} sets the budget of a pool "
                "that the LLM makes; the one given has its own, see PagePool.set_budget"
            )
        given = isinstance(model, PreTrainedModel)
        with taken_over(model) if given else nullcontext():
            loaded = load_model(model, dtype=dtype, device=device, revision=revision)
            self.tokenizer: Any = None
            if not skip_tokenizer_init:
                self.tokenizer = load_tokenizer(
                    model if tokenizer is None else tokenizer, revision=revision
                )
            self.engine = Engine(loaded, config, self.tokenizer, pool, storage)
        self._ids = itertools.count()
        self._steps = 0  # of all calls; tells a stream that another call has made one
        self._closed = False
        self._trace: EngineTrace | None = None

    @property
    def model(self) -> Any:
        """The transformers model."""
        return self.engine.loaded.model

    @property
    def max_model_len(self) -> int:
        """Longest prompt and output together, in tokens."""
        return self.engine.max_model_len

    def get_tokenizer(self) -> Any:
        """The tokenizer; None with ``skip_tokenizer_init``."""
        return self.tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """What the model's own generation config asks for.

        Warns:
            UserWarning: it asks for something that SamplingParams has not; it is left out.
        """
        if ignored := getattr(self.engine.loaded, "generation_ignored", ()):
            warnings.warn(
                f"the model's generation config asks for {', '.join(ignored)}, which is not served "
                "and left out; give sampling_params to choose for yourself",
                stacklevel=2,
            )
        return SamplingParams(**self.engine.loaded.generation_defaults)

    # Generating -----------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: Params = None,
        use_tqdm: bool = True,
        *,
        priority: Sequence[int] | None = None,
        timeout_s: float | None = None,
    ) -> list[RequestOutput]:
        """Generates for all prompts at once.

        The outputs hold everything, whatever ``output_kind`` is: that is of :meth:`stream`.

        Args:
            prompts: text, token ids, ``{"prompt": ...}`` or ``{"prompt_token_ids": [...]}`` (with a
                ``cache_salt`` if it must not share K and V with other tenants), or many of these.
            sampling_params: one for all or one for each; None for the model's own.
            use_tqdm: show progress.
            priority: one for each prompt, smaller first; needs ``scheduling_policy="priority"``.
            timeout_s: seconds from now after which a request ends with what it has, for the reason
                ``"deadline"``; None for no limit.

        Returns:
            One output per prompt, in their order. A prompt that cannot be served has the finish
            reason ``"error"`` and says why; the others are not affected.

        Raises:
            ValueError: not as many parameters or priorities as prompts, a ``timeout_s`` that is no
                finite positive number, or the LLM was closed.
        """
        asked = self._ask(prompts, sampling_params, priority, timeout_s)
        self._serve([sample for each in asked for sample in each.samples], use_tqdm, "Generating")
        return [self._output(each) for each in asked]

    def stream(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: Params = None,
        *,
        priority: Sequence[int] | None = None,
        timeout_s: float | None = None,
    ) -> Iterator[RequestOutput]:
        """As :meth:`generate`, but gives an output whenever a prompt has new tokens.

        What it holds is for the ``output_kind`` of the prompt's parameters to say: everything so
        far, only what is new, or everything, once, at the end. Of ``n`` samples, only those with
        something new are part of an output that holds what is new.

        ``request_id`` tells which prompt it is of: the number of the prompt, after the last dash.
        The requests begin with the first output that is asked for. Leaving the loop early aborts
        what is not finished. Inside the loop, other calls may generate and stream as well: each
        step serves the requests of all.

        Args:
            prompts: as for :meth:`generate`.
            sampling_params: as for :meth:`generate`.
            priority: as for :meth:`generate`.
            timeout_s: as for :meth:`generate`, from the first output that is asked for.

        Raises:
            ValueError: as :meth:`generate`, with the first output that is asked for; right away if
                the LLM was closed.
        """
        self._check_open()
        return self._stream(prompts, sampling_params, priority, timeout_s)

    def _stream(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: Params,
        priority: Sequence[int] | None,
        timeout_s: float | None,
    ) -> Iterator[RequestOutput]:
        asked = self._ask(prompts, sampling_params, priority, timeout_s)
        of = {sample: each for each in asked for sample in each.samples}
        told = {sample: len(sample.tokens) for sample in of}  # those whose end was not told
        try:
            self._add(asked)
            for each in asked:
                if each.error is not None:
                    yield self._output(each)
            seen = self._steps
            while told:
                fresh: list[Request] = []
                if self._steps == seen:
                    fresh = [sample for sample in self._step() if sample in told]
                seen = self._steps
                # Steps of other calls, or of the engine itself, have told them, not this call.
                fresh = fresh or list(told)
                for each in dict.fromkeys(of[s] for s in fresh if _has_news(s, told)):
                    for sample in each.samples:
                        if sample.finished:
                            told.pop(sample, None)
                        elif sample in told:
                            told[sample] = len(sample.tokens)
                    if each.is_due:
                        yield self._output(each, each.kind)
        finally:
            self._abort(told)

    def beam_search(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: BeamSearchParams | Sequence[BeamSearchParams],
        use_tqdm: bool = False,
        *,
        priority: Sequence[int] | None = None,
        timeout_s: float | None = None,
    ) -> list[BeamSearchOutput]:
        """The likeliest continuations of all prompts, by beam search over all of them at once.

        Beams share the pages of what they have in common. The sequences are those of transformers'
        ``generate(num_beams=beam_width, num_return_sequences=beam_width)``.

        Args:
            prompts: as for :meth:`generate`.
            params: one for all or one for each.
            use_tqdm: show progress.
            priority: as for :meth:`generate`.
            timeout_s: as for :meth:`generate`; the sequences are then those found so far.

        Returns:
            One output per prompt, in their order, its sequences best first. A prompt that cannot be
            served has the finish reason ``"error"`` and says why; the others are not affected.

        Raises:
            ValueError: as :meth:`generate`.
        """
        self._check_open()
        check_timeout(timeout_s)
        many = as_prompts(prompts)
        each = one_each(params, len(many), "params")
        priorities = one_each(0 if priority is None else priority, len(many), "priority")
        batch = next(self._ids)
        searches = [
            beam_search.ask(
                self.engine,
                f"{batch}-{number}",
                *asked,
                lambda text: self._need_tokenizer("a text prompt").encode(text),
                timeout_s=timeout_s,
            )
            for number, asked in enumerate(zip(many, each, priorities, strict=True))
        ]
        self._serve([lead for search in searches for lead in search.lead], use_tqdm, "Searching")
        outputs = beam_search.BeamOutputs(self.tokenizer)
        return [outputs.output(search) for search in searches]

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]] | Sequence[Sequence[Mapping[str, Any]]],
        sampling_params: Params = None,
        use_tqdm: bool = True,
        *,
        timeout_s: float | None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
    ) -> list[RequestOutput]:
        """Answers one conversation, or many, by the tokenizer's chat template.

        Args:
            messages: ``[{"role": "user", "content": "..."}, ...]``, or a list of such lists.
            sampling_params: as for :meth:`generate`.
            use_tqdm: as for :meth:`generate`.
            timeout_s: as for :meth:`generate`.
            chat_template: instead of the tokenizer's own.
            add_generation_prompt: end with the beginning of the assistant's turn.

        Raises:
            ValueError: no tokenizer, or no chat template; else as :meth:`generate`.
        """
        self._check_open()
        tokenizer = self._need_tokenizer("chat")
        if chat_template is None and getattr(tokenizer, "chat_template", None) is None:
            raise ValueError("the tokenizer has no chat template; pass chat_template, or generate")
        if not messages:
            raise ValueError("messages is empty; give at least one message")
        one = isinstance(messages[0], Mapping)
        conversations: Any = [messages] if one else messages
        prompts = [
            tokenizer.apply_chat_template(
                list(conversation),
                chat_template=chat_template,
                add_generation_prompt=add_generation_prompt,
                tokenize=True,
                return_dict=False,
            )
            for conversation in conversations
        ]
        return self.generate(
            [{"prompt_token_ids": ids} for ids in prompts],
            sampling_params,
            use_tqdm,
            timeout_s=timeout_s,
        )

    # Memory ---------------------------------------------------------------------------------------

    def stats(self) -> EngineStats:
        """Requests, tokens and memory at this moment."""
        self._check_open()
        return self.engine.stats()

    def memory_map(self) -> MemoryMap:
        """State of every page of every slot."""
        self._check_open()
        return self.engine.cache.memory_map()

    def set_budget(self, budget_bytes: int | str) -> None:
        """Moves the KV cache's budget while running: kept prefixes and then requests give way.

        Raises:
            PolicyError: the eviction policy failed; the budget is as before.
        """
        self._check_open()
        self.engine.memory.set_budget(budget_bytes)

    def reset_prefix_cache(self) -> None:
        """Forgets the K and V of finished requests."""
        self._check_open()
        self.engine.memory.reset_prefix_cache()

    # Traces ---------------------------------------------------------------------------------------

    @contextmanager
    def trace(
        self,
        path: str | os.PathLike[str],
        *,
        kernels: bool = False,
        max_events: int = DEFAULT_MAX_EVENTS,
    ) -> Iterator[None]:
        """As :meth:`start_trace`; ends with the block, also by an exception."""
        self.start_trace(path, kernels=kernels, max_events=max_events)
        trace = self._trace
        try:
            yield
        finally:
            if self._trace is trace:
                self.stop_trace()

    def start_trace(
        self,
        path: str | os.PathLike[str],
        *,
        kernels: bool = False,
        max_events: int = DEFAULT_MAX_EVENTS,
    ) -> None:
        """Records steps, requests and driver calls from now on, for chrome://tracing or Perfetto.

        Not while a stream is being read: between two steps.

        Args:
            path: of the file, which is replaced; compressed if it ends in ``.gz``. It is written by
                :meth:`stop_trace`, or when the LLM is closed.
            kernels: have torch's profiler record operators and kernels as well, which makes steps
                slower and the file large.
            max_events: the last so many events are kept, of about 300 bytes each, and as many calls
                of the driver. The file tells how many were dropped.

        Raises:
            ValueError: a trace runs already, the file cannot be written, ``max_events`` is not
                positive, or the LLM was closed.
            MemoryError: there is no room for so many calls of the driver.
        """
        self._check_open()
        if self._trace is not None:
            raise ValueError("a trace of this LLM is running; end it by stop_trace() first")
        self._trace = EngineTrace(self.engine, path, kernels=kernels, max_events=max_events)

    def stop_trace(self) -> TraceSummary:
        """Ends the trace and writes its file.

        Raises:
            ValueError: no trace runs.
            OSError: the disk is full, or the like.
        """
        if self._trace is None:
            raise ValueError("no trace of this LLM is running; begin one by start_trace(path)")
        trace, self._trace = self._trace, None
        return trace.stop()

    def close(self) -> None:
        """Aborts what runs and gives the memory of the KV cache back. Twice is once.

        A trace that runs is written.
        """
        if self._closed:
            return
        self._closed = True
        try:
            self.engine.close()
        finally:
            if self._trace is not None:
                self.stop_trace()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # Requests -------------------------------------------------------------------------------------

    def _check_open(self) -> None:
        if self._closed:
            raise ValueError("this LLM was closed; make a new one")

    def _step(self) -> list[Request]:
        self._check_open()
        self._steps += 1
        return self.engine.step()

    def _serve(self, requests: Sequence[Request], use_tqdm: bool, what: str) -> None:
        """Steps until all of them have ended."""
        ours, waiting = set(requests), list(requests)
        with tqdm(total=len(requests), disable=not use_tqdm, unit="seq", desc=what) as bar:
            try:
                for request in requests:
                    self.engine.add(request)
                while waiting:
                    # Whether a request has ended is asked of itself: a step of another call may
                    # have told its end. The last one is enough: all of them become the last.
                    if waiting[-1].finished:
                        waiting.pop()
                        continue
                    bar.update(sum(r.finished and r in ours for r in self._step()))
            except BaseException:
                self._abort(requests)
                raise
            bar.update(len(requests) - bar.n)

    def _add(self, asked: Iterable[_Asked]) -> None:
        for each in asked:
            for sample in each.samples:
                self.engine.add(sample)

    def _abort(self, samples: Iterable[Request]) -> None:
        if not self._closed:
            self.engine.abort([sample.id for sample in samples if not sample.finished])

    def _ask(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: Params,
        priority: Sequence[int] | None,
        timeout_s: float | None,
    ) -> list[_Asked]:
        """Makes the requests for every prompt. Nothing runs before :meth:`_add`."""
        self._check_open()
        check_timeout(timeout_s)
        many = as_prompts(prompts)
        params = one_each(sampling_params, len(many), "sampling_params")
        default: Any = None
        if any(each is None for each in params):
            default = self.get_default_sampling_params()
        priorities = one_each(0 if priority is None else priority, len(many), "priority")
        batch = next(self._ids)
        return [
            self._ask_one(
                f"{batch}-{number}", prompt, default if each is None else each, urgency, timeout_s
            )
            for number, (prompt, each, urgency) in enumerate(
                zip(many, params, priorities, strict=True)
            )
        ]

    def _ask_one(
        self, name: str, prompt: Prompt, params: Any, priority: Any, timeout_s: float | None
    ) -> _Asked:
        text: str | None = None
        ids: list[int] = []
        try:
            text, ids, salt, priority = parse_prompt(
                prompt, priority, lambda text: self._need_tokenizer("a text prompt").encode(text)
            )
            samples = self.engine.make_requests(
                name, ids, params, priority=priority, cache_salt=salt, timeout_s=timeout_s
            )
        except Exception as error:  # whatever a prompt or a tokenizer raises is of this prompt only
            expected = isinstance(error, (ValueError, TypeError))
            what = str(error) if expected else f"{type(error).__name__}: {error}"
            return _Asked(name, text, ids, [], f"prompt {name.rpartition('-')[2]}: {what}")
        return _Asked(name, text, samples[0].prompt_ids, samples)  # which may be shorter

    def _need_tokenizer(self, what: str) -> Any:
        if self.tokenizer is None:
            raise ValueError(
                f"{what} needs a tokenizer, and skip_tokenizer_init is set; give token ids"
            )
        return self.tokenizer

    def _output(
        self, asked: _Asked, kind: RequestOutputKind = RequestOutputKind.CUMULATIVE
    ) -> RequestOutput:
        return self.engine.outputs.request_output(
            asked.id, asked.prompt, asked.token_ids, asked.samples, kind, asked.error
        )


def _has_news(sample: Request, told: Mapping[Request, int]) -> bool:
    """Whether a request has tokens, or an end, that were not told."""
    return sample in told and (sample.finished or len(sample.tokens) != told[sample])
