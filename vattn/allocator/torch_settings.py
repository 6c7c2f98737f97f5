"""Settings of PyTorch's own allocator, which do nothing while it is replaced: warnings of that."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable
from typing import Any

_CONF_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
_NO_CACHING = "PYTORCH_NO_CUDA_MEMORY_CACHING"
_OF_PINNED_MEMORY = "pinned_"  # of the host's memory, which stays PyTorch's
_WHY = "PyTorch's own allocator of CUDA memory, which vattn.allocator.enable() has replaced"


def warn_of_environment(stacklevel: int = 3) -> None:
    """Warns of each variable with a setting that has no effect, naming those settings.

    Args:
        stacklevel: whose line the warnings name: 2 for the caller's, 3 for its caller's.
    """
    for name in _CONF_VARIABLES:
        if idle := _without_effect(os.environ.get(name, "")):
            warnings.warn(f"{name}: {idle} is for {_WHY}: no effect", stacklevel=stacklevel)
    if os.environ.get(_NO_CACHING):  # to PyTorch any text is yes
        warnings.warn(f"{_NO_CACHING} is for {_WHY}: no effect", stacklevel=stacklevel)


def warning_of_calls() -> dict[str, Callable[[Callable[..., Any]], Callable[..., Any]]]:
    """What wraps functions of ``torch._C`` that set up PyTorch's own allocator, by their names."""
    return {
        "_cuda_cudaCachingAllocator_set_allocator_settings": _told_of_settings,
        "_accelerator_setAllocatorSettings": _told_of_settings,
        "_cuda_cudaCachingAllocator_enable": _told_of_caching,
    }


def _without_effect(settings: str) -> str:
    """Those of ``key:value,key:[key:value,...]`` that are not for pinned memory."""
    each = (part.strip() for part in re.split(r",(?![^\[]*\])", settings))
    return ",".join(p for p in each if p and not p.startswith(_OF_PINNED_MEMORY))


def _told_of_settings(original: Callable[..., Any]) -> Callable[..., Any]:
    def set_settings(settings: str) -> Any:
        answer = original(settings)
        if idle := _without_effect(settings):
            warnings.warn(f"{idle} is for {_WHY}: no effect", stacklevel=3)
        return answer

    return set_settings


def _told_of_caching(original: Callable[..., Any]) -> Callable[..., Any]:
    def enable(value: bool) -> Any:
        answer = original(value)
        if not value:
            message = (
                f"torch.cuda.memory.caching_allocator_enable({value}) is for {_WHY}: no effect"
            )
            warnings.warn(message, stacklevel=3)
        return answer

    return enable
