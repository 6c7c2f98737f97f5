"""The other side of `bench.workload`: transformers' continuous batching."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import ContinuousBatchingConfig

from bench.batching_config import FLASH, batching_config, has_setting
from bench.common import Json, summarize_pairs
from bench.model_args import release
from bench.offline_sides import BatchSettings, GenerateBatch, Settings, Work
from bench.shapes import DTYPES, SHAPES, build_model


@dataclass(frozen=True)
class DeviceSettings:
    """What transformers finds out for itself on a GPU; ``flash``: it may take FlashAttention."""

    flash: bool

    def prepare(self, model: Any) -> None:
        """Versions without a setting for it leave an attention alone whose name says paged."""
        if not self.flash and not has_setting(FLASH):
            model.set_attn_implementation("paged|sdpa")

    def config(self, work: Work) -> ContinuousBatchingConfig:
        """See :class:`Settings`."""
        del work
        # Versions without the setting take FlashAttention where they find it.
        return batching_config(**({FLASH: self.flash} if has_setting(FLASH) else {}))


def settings_for(device: str, sequences: int) -> list[Settings]:
    """Of transformers' continuous batching, the best first; some may not work on a machine."""
    if device == "cpu":  # what it chooses there for itself reserves half of the host's memory
        return [BatchSettings(32, 512, sequences)]
    return [DeviceSettings(flash=True), DeviceSettings(flash=False)]


def open_transformers(
    args: argparse.Namespace, choices: Sequence[Settings], largest: Work, warm_up: Work
) -> tuple[GenerateBatch, str]:
    """Their continuous batching with the first settings that work, and the attention it runs.

    Args:
        args: shape, device and dtype.
        choices: settings, in order of preference.
        largest: work that it has to have room for.
        warm_up: that it does before.

    Raises:
        RuntimeError: none of them work; the message says why.
    """
    why: list[str] = []
    for choice in choices:
        try:
            side = _open(args, choice, largest, warm_up)
        except Exception as error:  # a kernel that cannot be downloaded, an old driver: any type
            why.append(f"{choice}: {type(error).__name__}: {error}")
            print(f"transformers does not run with {why[-1]}")
        else:
            return side, str(side.model.config._attn_implementation)
        release(args.device)  # the next sizes its cache by the memory that is free
    raise RuntimeError(f"transformers' continuous batching does not run; {'; '.join(why)}")


def _open(
    args: argparse.Namespace, choice: Settings, largest: Work, warm_up: Work
) -> GenerateBatch:
    """With some settings, warm; closed if it fails."""
    shape, longest = SHAPES[args.nano_shape], max(largest.totals)
    model = build_model(shape, args.device, DTYPES[args.dtype], longest)
    side = GenerateBatch(model, choice, "generate_batch", keep=largest)
    try:
        side.run(warm_up)
    except BaseException:
        side.close()
        raise
    return side


def transformers_round(side: GenerateBatch, work: Work) -> float:
    """Seconds of a round.

    Raises:
        AssertionError: an answer has another length than asked for.
    """
    start = time.perf_counter()
    answers = side.run(work)
    spent = time.perf_counter() - start
    got = [len(answer) for answer in answers]
    assert got == work.new_tokens, "transformers gave other lengths than asked for"
    return spent


def compared(works: Sequence[Work], theirs_s: Sequence[float], ours_s: Sequence[float]) -> Json:
    """Medians over the rounds that both sides have done, of seconds and rates.

    Args:
        works: of the rounds.
        theirs_s: seconds of transformers, of each.
        ours_s: of vattn, of the first of them or of all.
    """
    tokens = [work.generated for work in works[: len(ours_s)]]
    theirs_s = theirs_s[: len(ours_s)]
    pairs = summarize_pairs(theirs_s, ours_s)
    found: Json = {"requests": len(works[0]), "rounds": len(tokens), "generated_tokens": tokens}
    for name, seconds in (("transformers", theirs_s), ("vattn", ours_s)):
        rates = [n / s for n, s in zip(tokens, seconds, strict=True)]
        found[f"{name}_seconds"] = list(seconds)
        found[f"{name}_tokens_per_s"] = statistics.median(rates)
    return found | {
        "ratio": pairs.ratio,
        "ratio_low": pairs.ratio_low,
        "ratio_high": pairs.ratio_high,
    }
