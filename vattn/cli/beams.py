"""Searches for the texts of all prompts at once with beams."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from vattn.cli.run import News, Run
from vattn.llm import LLM
from vattn.outputs import BeamSearchOutput
from vattn.request import Request
from vattn.sampling_params import BeamSearchParams


class WatchedLLM(LLM):
    """An LLM that lets somebody look after each of its steps."""

    watch: Callable[[], None] | None = None

    def _step(self) -> list[Request]:
        news = super()._step()
        if self.watch is not None:
            self.watch()
        return news


class BeamRun(Run):
    """A run whose outputs are beams, the best first; there is nothing to tell before the end."""

    def _generate(self, prompts: list[Any]) -> Iterator[tuple[News, int]]:
        assert isinstance(self.params, BeamSearchParams)
        assert isinstance(self.llm, WatchedLLM)
        self.llm.watch = self.peak.look
        try:
            outputs = self.llm.beam_search(prompts, self.params)
        finally:
            self.llm.watch = None
        began = [o.metrics.first_token_s - o.metrics.arrival_s for o in outputs if o.sequences]
        self.timing.first_token_s = min(began, default=None)
        for index, output in enumerate(outputs):
            yield News(index, "", is_done=True), self._take_beams(index, output)

    def _take_beams(self, index: int, output: BeamSearchOutput) -> int:
        """Fills in the outputs of a prompt; how many tokens they have."""
        places = self.of_prompt(index)
        places[0].cached_tokens = output.num_cached_tokens
        for place, beam in zip(places, output.sequences, strict=False):
            place.text, place.token_ids = beam.text, beam.token_ids
            place.score, place.cumulative_logprob = beam.score, beam.cum_logprob
            place.finish_reason, place.stop_reason = beam.finish_reason, beam.stop_reason
            place.kv = beam.kv
        if output.error is not None:
            for place in places:
                place.error, place.finish_reason = output.error, output.finish_reason
        return sum(len(beam.token_ids) for beam in output.sequences)
