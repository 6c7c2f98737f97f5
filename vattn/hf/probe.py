"""What a model's layers really ask of attention, observed in forward passes of three tokens.

Configs tell this in as many ways as there are models; the calls tell it in one.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from vattn.attention.base import AttentionSpec
from vattn.hf.attention import NAME, OBSERVED, observed_by
from vattn.hf.checks import ModelError, explained

# Arguments of an attention function that change nothing here: positions are already in Q and K,
# and the rest says what to return or belongs to other kernels' own packing.
_HARMLESS = frozenset(
    {
        "position_ids",
        "position_embeddings",
        "cache_position",
        "use_cache",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "return_dict",
    }
)
_READ = frozenset({"dropout", "scaling", "sliding_window", "softcap", "s_aux", "is_causal"})

_TOKENS = 3
_FAR = 1 << 26  # beyond the end of any sequence
# Of rows that should be alike; a wrong position changes them by as much as they are.
_TOLERANCE = 0.03


@dataclass(frozen=True)
class Observed:
    """What an engine must know of a model.

    Args:
        specs: of each layer with attention, in order.
        layer_of: index in ``specs`` of a module's ``layer_idx``.
        vocab_size: width of the logits.
        keeps_logits: computes the logits of chosen tokens only, if given ``logits_to_keep``.
    """

    specs: list[AttentionSpec]
    layer_of: dict[int, int]
    vocab_size: int
    keeps_logits: bool


@dataclass
class _Call:
    module: torch.nn.Module
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    mask: torch.Tensor | None
    arguments: dict[str, Any]

    def __str__(self) -> str:
        index = getattr(self.module, "layer_idx", "?")
        return f"layer {index} ({type(self.module).__name__})"


@dataclass
class _Recorder:
    """Notes what each layer passes, and lets every token see itself only."""

    calls: list[_Call] = field(default_factory=list)

    def observe(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        arguments: dict[str, Any],
    ) -> torch.Tensor:
        call = _Call(module, query, key, value, mask, arguments)
        _check_shapes(call)
        self.calls.append(call)
        return (
            value.repeat_interleave(query.shape[1] // value.shape[1], dim=1)
            .transpose(1, 2)
            .contiguous()
        )


def observe(model: Any, max_positions: int | None) -> Observed:
    """Runs a model on three tokens, three times; afterwards its attention is vattn's.

    Args:
        model: in evaluation mode.
        max_positions: longest sequence; None for unknown.

    Raises:
        ModelError: it computes something that the engine cannot serve; the message says what.
    """
    far = (max_positions or 4096) - 1
    with torch.inference_mode():
        _set_attention(model, OBSERVED)
        ones = torch.ones(1, _TOKENS, dtype=torch.long, device=model.device)
        # A mask, so that transformers does not look for packed sequences among the positions.
        calls, _ = _forward(model, [1, 2, 3], [0, 1, 2], attention_mask=ones)
        specs = [_read_spec(call) for call in calls]
        _set_attention(model, NAME)
        keep = torch.zeros(0, dtype=torch.long, device=model.device)
        accepts = "logits_to_keep" in inspect.signature(model.forward).parameters
        options = {"logits_to_keep": keep} if accepts else {}
        calls, logits = _forward(model, [1, 2, 3], [far, 0, far // 2], **options)
        again, _ = _forward(model, [2, 3, 1], [0, far // 2, far], **options)
        _check_packed(calls, again)
    return Observed(
        specs=specs,
        layer_of=_layer_numbers(calls),
        vocab_size=logits.shape[-1],
        keeps_logits=accepts and logits.shape[1] == 0,
    )


def _set_attention(model: Any, name: str) -> None:
    with explained(f"{type(model).__name__} does not let its attention be chosen"):
        model.set_attn_implementation(name)


def _forward(
    model: Any, ids: list[int], positions: list[int], **options: Any
) -> tuple[list[_Call], torch.Tensor]:
    """One pass as the engine makes them; the calls of its attention, and logits ``[1, n, V]``."""
    recorder = _Recorder()
    name = type(model).__name__
    with observed_by(recorder), explained(f"{name} cannot run a packed batch"):
        out = model(
            input_ids=torch.tensor([ids], device=model.device),
            position_ids=torch.tensor([positions], device=model.device),
            use_cache=False,
            **options,
        )
    if not recorder.calls:
        raise ModelError(
            f"{name} does not use the attention interface of transformers, so the engine cannot "
            "reach its attention"
        )
    logits = getattr(out, "logits", None)
    if logits is None:
        raise ModelError(f"{name} gives no logits; load the model with its language-model head")
    return recorder.calls, logits


# One layer ----------------------------------------------------------------------------------------


def _read_spec(call: _Call) -> AttentionSpec:
    given = {key: value for key, value in call.arguments.items() if value is not None}
    for name in given:
        if name not in _READ and name not in _HARMLESS:
            raise ModelError(f"{call} passes {name} to its attention, which is not supported")
    if given.get("dropout"):
        raise ModelError(f"{call} has dropout {given['dropout']} in evaluation mode")
    head_dim = call.query.shape[-1]
    sinks = given.get("s_aux")
    heads = call.query.shape[1]
    if sinks is not None and tuple(sinks.shape) != (heads,):
        raise ModelError(f"{call} has sinks of shape {tuple(sinks.shape)}, not one per head")
    return AttentionSpec(
        heads=heads,
        kv_heads=call.key.shape[1],
        head_dim=head_dim,
        dtype=call.key.dtype,
        scale=_number(call, "scaling", given, head_dim**-0.5),
        window=_read_window(call, given),
        softcap=_number(call, "softcap", given, None),
        sinks=sinks is not None,
    )


def _check_shapes(call: _Call) -> None:
    query, key, value = call.query, call.key, call.value
    if not isinstance(getattr(call.module, "layer_idx", None), int):
        raise ModelError(f"{call} does not know which layer it is (layer_idx)")
    if key.shape[-1] != value.shape[-1] or query.shape[-1] != key.shape[-1]:
        raise ModelError(
            f"{call} has heads of {key.shape[-1]} for K and {value.shape[-1]} for V; attention "
            "with unequal ones, such as multi-head latent attention, is not supported"
        )
    if key.shape != value.shape or query.shape[1] % key.shape[1]:
        raise ModelError(
            f"{call} has {query.shape[1]} query heads, {key.shape[1]} of K and {value.shape[1]} "
            "of V; query heads must be a multiple of K's, and V have as many"
        )
    if (query.shape[0], query.shape[2], key.shape[2]) != (1, _TOKENS, _TOKENS):
        raise ModelError(
            f"{call} attends over {tuple(key.shape)} K from {tuple(query.shape)} Q for {_TOKENS} "
            "new tokens; only attention of the new tokens over the sequence is supported"
        )
    if not query.dtype == key.dtype == value.dtype:
        raise ModelError(f"{call} mixes {query.dtype}, {key.dtype} and {value.dtype} in Q, K and V")


def _number(call: _Call, name: str, given: dict[str, Any], default: Any) -> Any:
    value = given.get(name, default)
    if value is not None and not isinstance(value, (int, float)):
        raise ModelError(f"{call} computes its {name} anew in each pass, which is not supported")
    return None if value is None else float(value)


# Who sees whom ------------------------------------------------------------------------------------


def _read_window(call: _Call, given: dict[str, Any]) -> int | None:
    """The window that a layer's mask says, or its arguments where it asks for no mask."""
    if call.mask is not None:
        rule = getattr(call.mask, "rule", None)
        if rule is None:
            raise ModelError(
                f"{call} has a mask of its own making (such as ALiBi's), which is not supported"
            )
        return _window_of(rule, call.mask.device, str(call))
    if not given.get("is_causal", getattr(call.module, "is_causal", True)):
        raise ModelError(f"{call} attends in both directions; only causal attention is supported")
    window = given.get("sliding_window")
    if window is not None and (not isinstance(window, int) or window < 1):
        raise ModelError(f"{call} has a window of {window!r} tokens")
    return window


def _window_of(rule: Callable[..., torch.Tensor], device: torch.device, layer: str) -> int | None:
    """Reads a mask's rule: None for causal, tokens for a sliding window.

    Raises:
        ModelError: it is neither.
    """
    zero = torch.zeros((), dtype=torch.long, device=device)

    def sees(queries: list[int], keys: list[list[int]]) -> torch.Tensor:
        q = torch.tensor(queries, device=device)[:, None].expand(-1, len(keys[0]))
        k = torch.tensor(keys, device=device)
        return rule(zero, zero, q, k).expand(q.shape).cpu()

    try:
        if sees([5], [[6]]).item():
            raise ModelError(f"{layer} attends in both directions; only causal attention works")
        first, last = 0, _FAR  # the first token that the query at _FAR sees, by halving
        while first < last:
            middle = (first + last) // 2
            first, last = (first, middle) if sees([_FAR], [[middle]]).item() else (middle + 1, last)
        window = None if first == 0 else _FAR - first + 1
        w = window or 8
        queries = [0, 1, 5, w - 1, w, w + 1, 2 * w, _FAR // 3, _FAR]
        edges = [(q - w, q - w + 1, q - w // 2, q - 1, q, q + 1, 0) for q in queries]
        keys = [[max(0, k) for k in row] for row in edges]
        seen = sees(queries, keys)
    except (IndexError, RuntimeError, TypeError) as error:
        raise ModelError(f"{layer} has a mask that depends on more than positions") from error
    wanted = [
        [k <= q and (window is None or q - window < k) for k in row]
        for q, row in zip(queries, keys, strict=True)
    ]
    if seen.tolist() != wanted:
        raise ModelError(
            f"{layer} has a mask that is neither causal nor a sliding window, such as chunked or "
            "prefix attention, which is not supported"
        )
    return window


# All layers ---------------------------------------------------------------------------------------


def _layer_numbers(calls: list[_Call]) -> dict[int, int]:
    """Numbers the layers with attention in the order of their calls."""
    indices: list[int] = [call.module.layer_idx for call in calls]  # type: ignore[misc]
    for index in indices:
        if indices.count(index) > 1:
            raise ModelError(
                f"layer {index} computes attention more than once in a forward pass; layers that "
                "share weights or K and V are not supported"
            )
    return {index: number for number, index in enumerate(indices)}


def _check_packed(calls: list[_Call], again: list[_Call]) -> None:
    """The tokens of a packed batch are of different sequences: their order must not matter.

    ``again`` has the first token of ``calls`` last, each at its own position as before. With
    attention to nothing but itself, every token must compute what it did.
    """
    for call, other in zip(calls, again, strict=True):
        if call.mask is not None:
            raise ModelError(f"{call} makes a mask of its own, which is not supported")
        for one, two in ((call.query, other.query), (call.key, other.key)):
            here, there = one.float(), two.float().roll(1, dims=2)
            if not bool(here.isfinite().all().item()):
                raise ModelError(f"{call} computes NaN or infinity; check its weights and dtype")
            if not bool(((here - there).norm() <= _TOLERANCE * here.norm()).item()):
                raise ModelError(
                    f"{call} computes something else for the same token elsewhere in a packed "
                    "batch: the model does not go by position_ids, or mixes neighbouring tokens "
                    "outside its attention"
                )
