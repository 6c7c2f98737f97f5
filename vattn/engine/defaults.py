"""What a model is served with where its user said nothing."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from vattn.models import tiny_path

# The embedded model has seen 512 tokens at once, and its tokens are so small (128 bytes per head)
# that the driver's default page would hold more than a whole prompt.
EMBEDDED_MODEL_LEN = 512
EMBEDDED_PAGE_BYTES = 4096
TINY_PARAMETERS = 10_000_000
# Addresses cost nothing, but a model made for millions of tokens would exceed what kernels address.
MAX_DEFAULT_RESERVE_TOKENS = 131_072


def is_embedded(model: str | Path) -> bool:
    """Whether this is the directory of the model that ships with vattn."""
    return Path(model).resolve() == tiny_path().resolve()


def default_model_len(model_limit: int | None, *, embedded: bool) -> int | None:
    """Most tokens of a sequence where nothing was asked for; None if the model does not say.

    Args:
        model_limit: what the model was made for; None if it does not say.
        embedded: it is the embedded model.
    """
    if embedded:
        return EMBEDDED_MODEL_LEN
    return None if model_limit is None else min(model_limit, MAX_DEFAULT_RESERVE_TOKENS)


def default_page_bytes(device: torch.device, *, embedded: bool) -> int | None:
    """Page size of the KV cache where nothing was asked for; None for the driver's default."""
    return EMBEDDED_PAGE_BYTES if embedded and device.type == "cpu" else None


@contextmanager
def few_threads(model: Any) -> Iterator[None]:
    """One thread for a tiny model on a CPU, unless OMP_NUM_THREADS says otherwise.

    Handing out its small products costs more than doing them: on two busy cores the embedded model
    wrote 23 tokens/s with two threads and 285 with one.
    """
    is_tiny = model.num_parameters() < TINY_PARAMETERS
    if model.device.type != "cpu" or not is_tiny or "OMP_NUM_THREADS" in os.environ:
        yield
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
