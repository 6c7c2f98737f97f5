"""How fast decoding batches and prompts need new memory, and what mapping it costs.

The need follows from lengths and the step's time. Nothing of a GPU is measured here: a step takes
at least as long as reading weights, K and V once at the assumed bandwidth, so the need is at most
what is said, and a driver's calls cost what others published.
"""

from __future__ import annotations

import numpy as np

from bench.common import Json
from bench.fake import PUBLISHED_US
from bench.levels.memory.shapes import KVShape, Regions
from bench.trace import Lengths, Trace
from bench.waste import pages_each

# (shape, sequences): milliseconds of a step that others measured, and where.
PUBLISHED_STEPS = {("llama3-8b", 8): (6.5, "vLLM CI, H200")}
WINDOW_S = 1.0  # peaks are means over so long
MAP_US = PUBLISHED_US["cuMemMap"] + PUBLISHED_US["cuMemSetAccess"]


def batch_lengths(trace: Trace, batch: int) -> Lengths:
    """Lengths in the middle of serving: each somewhere within its answer."""
    random = np.random.default_rng(0)
    chosen = np.arange(batch) % len(trace)
    done = random.random(batch) * trace.generated[chosen]
    return np.asarray(trace.context[chosen] + done.astype(np.int64))


def step_time(shape: KVShape, lengths: Lengths, bandwidth: float) -> tuple[float, str]:
    """Seconds, and whose figure that is."""
    published = PUBLISHED_STEPS.get((shape.name, len(lengths)))
    if published is not None:
        return published[0] / 1000, published[1]
    read = shape.weight_bytes + int(lengths.sum()) * shape.token_bytes
    return read / bandwidth, "bytes / bandwidth"


def decode_row(
    shape: KVShape, regions: Regions, trace: Trace, batch: int, steps: int, bandwidth: float
) -> Json:
    """A batch that decodes for some steps, nobody ending.

    ``peak_mb_per_s``: the most within any second, or all steps if they are shorter.
    ``largest_step_ms``: mapping what the step with most new pages needs, were nothing mapped ahead.
    ``driver_ms_per_s``: all mapping of a second; with ``create`` if all pages have to be made.
    """
    lengths = batch_lengths(trace, batch)
    step_s, source = step_time(shape, lengths, bandwidth)
    new = _new_pages(shape, regions, lengths, steps)
    window = min(steps, max(1, round(WINDOW_S / step_s)))
    windows = np.convolve(new, np.ones(window), mode="valid")
    per_s = float(new.mean()) / step_s
    return {
        "shape": shape.name,
        "batch": batch,
        **regions.as_json(),
        "mean_tokens": round(float(lengths.mean())),
        "step_ms": round(1000 * step_s, 2),
        "step_from": source,
        "tokens_mb_per_s": round(batch * shape.token_bytes / step_s / 1e6, 1),
        "mapped_mb_per_s": round(per_s * regions.page_bytes / 1e6, 1),
        "peak_mb_per_s": round(
            float(windows.max()) * regions.page_bytes / (window * step_s) / 1e6, 1
        ),
        "largest_step_ms": round(float(new.max()) * MAP_US / 1000, 2),
        "driver_ms_per_s": round(per_s * MAP_US / 1000, 2),
        "driver_ms_per_s_create": round(per_s * (MAP_US + PUBLISHED_US["cuMemCreate"]) / 1000, 2),
    }


def _new_pages(shape: KVShape, regions: Regions, lengths: Lengths, steps: int) -> Lengths:
    """New pages of each step, over the whole batch; ``[steps]``."""
    layout = regions.layout(shape, int(lengths.max()) + steps, "cuda")
    at = lengths[None, :] + np.arange(steps + 1)[:, None]
    pages = pages_each(layout.regions, regions.page_bytes, layout.tiles, at)
    # A tile ends before another begins, so that a length's own cover may be the larger one.
    mapped = np.maximum.accumulate(pages, axis=0).sum(axis=1)
    return np.asarray(np.diff(mapped))


def prefill_row(shape: KVShape, flops: float) -> Json:
    """A prompt at the assumed rate of a GPU, attention not counted: the need is at most that."""
    tokens_per_s = flops / (2 * shape.parameters / shape.gpus)
    return {
        "shape": shape.name,
        "tokens_per_s": round(tokens_per_s),
        "mb_per_s": round(tokens_per_s * shape.token_bytes / 1e6, 1),
    }
