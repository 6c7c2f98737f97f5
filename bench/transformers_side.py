"""The other side of `bench.workload`: transformers' continuous batching."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from bench.offline_sides import BatchSettings, DeviceSettings, GenerateBatch, Settings, Work
from bench.shapes import DTYPES, SHAPES, build_model


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
        shape, longest = SHAPES[args.nano_shape], max(largest.totals)
        model = build_model(shape, args.device, DTYPES[args.dtype], longest)
        try:
            side = GenerateBatch(model, choice, "generate_batch", keep=largest)
            try:
                side.run(warm_up)
            except BaseException:
                side.close()
                raise
        except Exception as error:  # a kernel that cannot be downloaded, an old driver: any type
            why.append(f"{choice}: {type(error).__name__}: {error}")
            print(f"transformers does not run with {why[-1]}")
            continue
        return side, str(side.model.config._attn_implementation)
    raise RuntimeError(f"transformers' continuous batching does not run; {'; '.join(why)}")
