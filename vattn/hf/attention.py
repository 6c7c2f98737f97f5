"""The function that transformers calls in place of a model's attention, once per layer.

It is stateless: which step a forward pass belongs to is told by a context variable. A keyword
argument would get there as well in most models, but StableLM and Nemotron do not hand theirs down.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol

import torch
from transformers import AttentionInterface, AttentionMaskInterface

NAME = "vattn"
# While a model is being looked at, masks are asked for as well, to see which rule each layer obeys.
# Under NAME transformers builds none: a name absent from AttentionMaskInterface gets no mask.
OBSERVED = "vattn_observed"


class LayerCalls(Protocol):
    """Who answers the attention of all layers during one forward pass."""

    def attend(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        arguments: dict[str, Any],
    ) -> torch.Tensor:
        """One layer's attention.

        Args:
            module: the layer's attention; its ``layer_idx`` tells which one.
            query: ``[1, heads, T, head_dim]``.
            key: ``[1, kv_heads, T, head_dim]``, of the new tokens.
            value: the same of V.
            mask: what the model made of the one that was registered, None under :data:`NAME`.
            arguments: whatever else the model passes to its attention.

        Returns:
            ``[1, T, heads, head_dim]``.
        """
        ...


_answering: ContextVar[LayerCalls | None] = ContextVar("vattn_answering", default=None)


@contextmanager
def answered_by(calls: LayerCalls) -> Iterator[None]:
    """Inside the block, forward passes of this thread have their attention answered."""
    token = _answering.set(calls)
    try:
        yield
    finally:
        _answering.reset(token)


class StepMissing(RuntimeError):
    """A forward pass that no engine has started."""


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **arguments: Any,
) -> tuple[torch.Tensor, None]:
    """What is registered under :data:`NAME`; shapes as of :meth:`LayerCalls.attend`.

    Raises:
        StepMissing: called outside an engine.
    """
    calls = _answering.get()
    if calls is None:
        raise StepMissing(
            "this model serves a vattn engine, which owns its attention; to call it yourself, load "
            'another one, or give this one back with model.set_attn_implementation("sdpa")'
        )
    return calls.attend(module, query, key, value, attention_mask, arguments), None


class RuleMask(torch.Tensor):
    """A causal mask that remembers the rule it should have obeyed, ``rule(batch, head, q, kv)``."""

    rule: Callable[..., torch.Tensor]


def _observed_mask(
    *,
    q_length: int,
    kv_length: int,
    mask_function: Callable[..., torch.Tensor],
    device: torch.device | str = "cpu",
    **_: Any,
) -> torch.Tensor:
    """A mask for :data:`OBSERVED`; its values are not used."""
    mask = torch.ones(1, 1, q_length, kv_length, dtype=torch.bool, device=device).tril()
    marked = mask.as_subclass(RuleMask)
    marked.rule = mask_function
    return marked


def register() -> None:
    """Makes the names known to transformers; again and again if one likes."""
    for name in (NAME, OBSERVED):
        AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(OBSERVED, _observed_mask)


@contextmanager
def taken_over(model: Any) -> Iterator[None]:
    """Gives a model's attention back to whom it belonged if the block fails."""
    before = _implementations(model.config)
    try:
        yield
    except BaseException:
        model.set_attn_implementation(before)
        raise


def _implementations(config: Any) -> dict[str, Any]:
    """The names in use, in the form that ``set_attn_implementation`` takes."""
    inner = {key: getattr(config, key, None) for key in config.sub_configs}
    names = {key: getattr(each, "_attn_implementation", None) for key, each in inner.items()}
    names[""] = config._attn_implementation
    return {key: name for key, name in names.items() if name is not None}
