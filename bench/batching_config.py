"""Settings of transformers' continuous batching, whose names differ from version to version."""

from __future__ import annotations

import dataclasses
from typing import Any

from transformers import ContinuousBatchingConfig

FLASH = "auto_switch_to_flash"


def has_setting(name: str) -> bool:
    """Whether the installed version has a setting of that name."""
    return name in {field.name for field in dataclasses.fields(ContinuousBatchingConfig)}


def batching_config(page_tokens: int | None = None, **options: Any) -> ContinuousBatchingConfig:
    """A configuration; what is not given is the version's default.

    Args:
        page_tokens: of a page of the KV cache, which 5.17 calls a block.
        options: by the names that all versions have.

    Raises:
        TypeError: the installed version has no setting of a name in ``options``.
    """
    if page_tokens is not None:
        options["page_size" if has_setting("page_size") else "block_size"] = page_tokens
    return ContinuousBatchingConfig(**options)
