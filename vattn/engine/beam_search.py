"""Beam search for users: from prompts to groups of beams, and from these to outputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from vattn.engine.beams import BeamGroup, Hypothesis, check_search
from vattn.engine.detokenizer import TextSource
from vattn.engine.engine import Engine
from vattn.engine.prompts import Prompt, parse_prompt
from vattn.outputs import BeamSearchOutput, BeamSearchSequence, Timings
from vattn.request import FinishReason, Request
from vattn.sampling_params import BeamSearchParams, SamplingParams


@dataclass(eq=False)
class Search:
    """One prompt and its beams, or what is wrong with it."""

    id: str
    prompt: str | None
    token_ids: list[int]
    group: BeamGroup | None
    error: str | None = None

    @property
    def lead(self) -> list[Request]:
        """The request that stands for it, if there is one."""
        return [] if self.group is None else [self.group.lead]


def ask(
    engine: Engine,
    name: str,
    prompt: Prompt,
    params: Any,
    priority: Any,
    encode: Callable[[str], Any],
    *,
    timeout_s: float | None = None,
) -> Search:
    """The search for one prompt. Nothing runs before its lead is added to the engine.

    Args:
        engine: that is to run it.
        name: of the request.
        prompt: in any form.
        params: a BeamSearchParams.
        priority: smaller goes first.
        encode: text to token ids.
        timeout_s: seconds from now after which it ends with what it has.
    """
    text: str | None = None
    ids: list[int] = []
    try:
        text, ids, salt, priority = parse_prompt(prompt, priority, encode)
        group = make_group(
            engine, name, ids, params, priority=priority, cache_salt=salt, timeout_s=timeout_s
        )
    except Exception as error:  # whatever a prompt or a tokenizer raises is of this prompt only
        expected = isinstance(error, (ValueError, TypeError))
        what = str(error) if expected else f"{type(error).__name__}: {error}"
        return Search(name, text, ids, None, f"prompt {name.rpartition('-')[2]}: {what}")
    return Search(name, text, ids, group)


def make_group(
    engine: Engine,
    name: str,
    ids: list[int],
    params: BeamSearchParams,
    *,
    priority: int = 0,
    cache_salt: str = "",
    timeout_s: float | None = None,
) -> BeamGroup:
    """The beams of one prompt; add its lead to the engine.

    Raises:
        TypeError: ``params`` of another class.
        ValueError: a prompt or parameters that this engine cannot serve.
    """
    if not isinstance(params, BeamSearchParams):
        raise TypeError(f"params={params!r} is not a vattn.BeamSearchParams")
    width, vocab_size = params.beam_width, engine.loaded.vocab_size
    most = engine.config.max_num_seqs
    if width > most:
        raise ValueError(
            f"beam_width={width} is more than max_num_seqs={most}, and beams run at once; lower "
            "the former or raise the latter"
        )
    eos_ids = frozenset() if params.ignore_eos else frozenset(engine.loaded.eos_token_ids)
    if width > vocab_size - len(eos_ids):
        raise ValueError(
            f"beam_width={width} is more than the {vocab_size - len(eos_ids)} tokens that a "
            "sequence of this model can begin with; lower it"
        )
    (lead,) = engine.make_requests(
        name,
        ids,
        SamplingParams(
            temperature=0.0, max_tokens=params.max_tokens, ignore_eos=True, detokenize=False, seed=0
        ),
        priority=priority,
        cache_salt=cache_salt,
        timeout_s=timeout_s,
    )
    check_search(params, lead.limit - len(lead.prompt_ids))
    return BeamGroup(lead, params, eos_ids)


class BeamOutputs:
    """Makes outputs of searches that have ended.

    Args:
        tokenizer: None for token ids only.
    """

    def __init__(self, tokenizer: Any = None) -> None:
        self._source = None if tokenizer is None else TextSource(tokenizer)

    def output(self, search: Search) -> BeamSearchOutput:
        """What became of one; it has ended."""
        reason, error, sequences = FinishReason.ERROR, search.error, []
        lead = None if search.group is None else search.group.lead
        if search.group is not None and lead is not None and lead.finish_reason is not None:
            reason, error = lead.finish_reason, lead.error
            try:
                sequences = [self._sequence(search.group, e) for e in search.group.results()]
            except Exception as wrong:  # of the tokenizer, which may be anybody's
                reason = FinishReason.ERROR
                error = f"the tokenizer cannot decode its tokens: {wrong}"
        return BeamSearchOutput(
            request_id=search.id,
            prompt=search.prompt,
            prompt_token_ids=search.token_ids,
            sequences=sequences,
            num_cached_tokens=0 if lead is None else lead.cached,
            metrics=Timings() if lead is None else lead.timings,
            finish_reason=reason.value,
            error=error,
        )

    def _sequence(self, group: BeamGroup, ended: Hypothesis) -> BeamSearchSequence:
        return BeamSearchSequence(
            token_ids=ended.token_ids,
            text=self._text(group, ended),
            cum_logprob=ended.cum_logprob,
            score=ended.score,
            finish_reason=ended.finish_reason.value,
            kv=ended.kv,
        )

    def _text(self, group: BeamGroup, ended: Hypothesis) -> str:
        if self._source is None:
            return ""
        ids, end = ended.token_ids, ""
        if ended.finish_reason is FinishReason.STOP:
            if group.params.include_stop_str_in_output:
                end = self._source.name(ids[-1])
            ids = ids[:-1]
        return self._source.text(group.lead.prompt_ids, ids) + end
