"""The function that transformers calls in place of a model's attention, once per layer.

It is stateless: which step a forward pass belongs to is told by a context variable. A keyword
argument would get there as well in most models, but StableLM and Nemotron do not hand theirs down.

A compiled model holds the operator ``vattn::attend`` in the same places. It is given the index of
the layer and never the cache, whose tensors a compiler may copy, and finds who answers by the same
variable when it runs. What it writes to the cache is no result of it, so it is registered as having
an ordered effect: compilers pass a token from each such operator to the next, by which none of them
is removed (not even where nobody reads the result, as in a step without logits), none moves past
another, none is computed twice, and no two are taken for one. A graph without gradients is not
divided into a forward and a backward part, so nothing computes one again there either.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol

import torch
from torch._library.effects import EffectType
from transformers import AttentionInterface, AttentionMaskInterface

NAME = "vattn"
# While a model is being looked at, masks are asked for as well, to see which rule each layer obeys.
# Under NAME transformers builds none: a name absent from AttentionMaskInterface gets no mask.
OBSERVED = "vattn_observed"


class LayerCalls(Protocol):
    """Who answers the attention of all layers during one forward pass."""

    def attend(
        self,
        layer_idx: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """One layer's attention.

        Args:
            layer_idx: of the attention module, as the model numbers them.
            query: ``[1, heads, T, head_dim]``.
            key: ``[1, kv_heads, T, head_dim]``, of the new tokens.
            value: the same of V.
            sinks: ``[heads]``, if the layer has them.

        Returns:
            ``[1, T, heads, head_dim]``, no view of an argument.
        """
        ...


class Observer(Protocol):
    """Who sees everything that a model passes to its attention; never in a compiled model."""

    def observe(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        arguments: dict[str, Any],
    ) -> torch.Tensor:
        """One layer's attention; shapes as of :meth:`LayerCalls.attend`.

        Args:
            module: the layer's attention; its ``layer_idx`` tells which one.
            query: as there.
            key: as there.
            value: as there.
            mask: what the model made of the one that was registered, None under :data:`NAME`.
            arguments: whatever else the model passes to its attention.
        """
        ...


_answering: ContextVar[LayerCalls | None] = ContextVar("vattn_answering", default=None)
_observing: ContextVar[Observer | None] = ContextVar("vattn_observing", default=None)


@contextmanager
def answered_by(calls: LayerCalls) -> Iterator[None]:
    """Inside the block, forward passes of this thread have their attention answered."""
    token = _answering.set(calls)
    try:
        yield
    finally:
        _answering.reset(token)


@contextmanager
def observed_by(observer: Observer) -> Iterator[None]:
    """Inside the block, forward passes of this thread are seen by an observer."""
    token = _observing.set(observer)
    try:
        yield
    finally:
        _observing.reset(token)


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
    if torch.compiler.is_compiling():
        layer_idx = _layer_of(module, attention_mask)
        sinks = arguments.get("s_aux")
        return torch.ops.vattn.attend(query, key, value, sinks, layer_idx), None
    calls = _answering.get()
    if calls is not None:
        layer_idx = _layer_of(module, attention_mask)
        return calls.attend(layer_idx, query, key, value, arguments.get("s_aux")), None
    observer = _observing.get()
    if observer is None:
        raise _step_missing()
    return observer.observe(module, query, key, value, attention_mask, arguments), None


def _layer_of(module: Any, mask: torch.Tensor | None) -> int:
    layer_idx: int = module.layer_idx
    assert mask is None, f"layer {layer_idx} of the model made a mask of its own"
    return layer_idx


def _step_missing() -> StepMissing:
    return StepMissing(
        "this model serves a vattn engine, which owns its attention; to call it yourself, load "
        'another one, or give this one back with model.set_attn_implementation("sdpa")'
    )


# In compiled models -------------------------------------------------------------------------------


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sinks: torch.Tensor | None,
    layer_idx: int,
) -> torch.Tensor:
    """What ``vattn::attend`` does; contiguous, as compiled code has been promised."""
    calls = _answering.get()
    if calls is None:
        raise _step_missing()
    return calls.attend(layer_idx, query, key, value, sinks).contiguous()


def _attend_shape(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sinks: torch.Tensor | None,
    layer_idx: int,
) -> torch.Tensor:
    """A tensor like what :func:`_attend` returns, for tracing."""
    del key, sinks, layer_idx
    batch, heads, tokens, _ = query.shape
    return query.new_empty(batch, tokens, heads, value.shape[-1])


@functools.cache
def _define_operator() -> Any:
    """Makes ``torch.ops.vattn.attend``; it lives as long as the library that is returned."""
    library: Any = torch.library.Library("vattn", "FRAGMENT")  # type: ignore[no-untyped-call]
    library.define(
        "attend(Tensor query, Tensor key, Tensor value, Tensor? sinks, int layer_idx) -> Tensor",
        tags=(torch.Tag.needs_exact_strides,),
    )
    # Not through torch.library.custom_op, which checks each call for what is known here.
    library.impl("attend", _attend, "CompositeExplicitAutograd")
    torch.library.register_fake("vattn::attend", _attend_shape, lib=library)
    library._register_effectful_op("vattn::attend", EffectType.ORDERED)
    return library


# Masks --------------------------------------------------------------------------------------------


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
    """Makes the names known to transformers and torch; again and again if one likes."""
    _define_operator()
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
