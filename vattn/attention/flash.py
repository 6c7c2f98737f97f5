"""What all FlashAttention backends share: the calls of a step and the tensors that they take.

A step makes two calls, decodes and chunks: one chunk beside the decodes would turn off the split of
long sequences over the GPU that makes decoding fast. Slots are reached without copying in one of
two forms:

* *kvcache form*: K and V as ``[slots, longest, kv_heads, head_dim]``, cut to the longest sequence
  of the call, and for each sequence its slot and its length;
* *flat form*: K and V as ``[slots * slot_tokens, kv_heads, head_dim]``, and for each sequence the
  token at which its slot begins and its length.

Some kernels write the new K and V of the kvcache form themselves, which saves a launch per layer:
decodes are then appended by the call that attends over them, and chunks before it. They write at
the places that the lengths before the step name, which ``KVCache.ensure`` has made this slot's own:
its page is nobody else's, whatever the slot shares.
"""

from __future__ import annotations

import abc
from collections.abc import Collection, Iterable, Sequence
from typing import Any, Self

import torch

from vattn.attention.append import append, append_mode
from vattn.attention.base import AppendMode, AttentionSpec, Step, prepare_append
from vattn.attention.flash_calls import Call, DecodeTensors, prepare_decode, step_calls
from vattn.kv.layout import Order

# K and V of decodes, ``[n, kv_heads, head_dim]`` each, that the kernel is to write.
New = tuple[torch.Tensor, torch.Tensor]

_HALVES = (torch.float16, torch.bfloat16)
_MOST_HEAD_DIM = 256


class FlashBackend(abc.ABC):
    """A FlashAttention kernel on slots in token order.

    Args:
        specs: of the layers it will serve; they decide the tiles.
        kernel: as :meth:`load` returns it, which is what None stands for.
        append_in_kernel: whether the kernel writes decodes' K and V; None if it can.

    Attributes:
        appends: whether it does. It may be changed between steps, but not under recorded graphs.

    Raises:
        Unavailable: no kernel is given or installed.
        ValueError: the kernel is to append and cannot.
    """

    name: str
    order: Order | None = "token"
    graphs = True
    # Compute capabilities that the kernel is built for, by major version; None for 8 and above.
    architectures: Collection[int] | None = None
    has_softcap = True
    has_sinks = True

    def __init__(
        self,
        specs: Iterable[AttentionSpec] = (),
        kernel: Any = None,
        *,
        append_in_kernel: bool | None = None,
    ) -> None:
        specs = list(specs)
        tiles = {tile for spec in specs for tile in self.tiles(spec.head_dim)}
        self.kv_tile_tokens: tuple[int, ...] = tuple(sorted(tiles)) or (1,)
        self._kernel = self.load() if kernel is None else kernel
        self._device = torch.device("cpu")
        able = self.can_append(specs)
        if append_in_kernel and not able:
            raise self.cannot_append()
        self.appends = able if append_in_kernel is None else append_in_kernel

    @staticmethod
    @abc.abstractmethod
    def load() -> Any:
        """The kernel that is installed.

        Raises:
            Unavailable: there is none, or it takes other arguments than we know.
        """

    def can_append(self, specs: Sequence[AttentionSpec]) -> bool:
        """Whether the kernel can write decodes' K and V, as far as its arguments tell."""
        del specs
        return False

    def cannot_append(self) -> ValueError:
        """What to raise if the kernel is to append and cannot."""
        return ValueError(
            f"append_in_kernel=True, but the kernel of {self.name} cannot append; leave it out"
        )

    @staticmethod
    @abc.abstractmethod
    def tiles(head_dim: int) -> tuple[int, ...]:
        """Tokens of K and V that the kernel loads at once."""

    @abc.abstractmethod
    def attend(
        self,
        call: Call,
        spec: AttentionSpec,
        query: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        sinks: torch.Tensor | None,
        new: New | None = None,
    ) -> torch.Tensor:
        """Calls the kernel.

        Args:
            call: which sequences.
            spec: of the layer.
            query: ``[n, heads, head_dim]``, theirs.
            k: of all slots, ``[slots, slot_tokens, kv_heads, head_dim]``.
            v: like ``k``.
            sinks: ``[heads]``, if the spec has them.
            new: of decodes, what the kernel is to write first; None if it is in the slots.

        Returns:
            Like ``query``.
        """

    @classmethod
    def create(
        cls,
        specs: Sequence[AttentionSpec],
        device: torch.device,
        *,
        append_in_kernel: bool | None = None,
    ) -> Self:
        """For a model's layers on a device, with the kernel that is installed.

        Raises:
            Unavailable: there is none.
            ValueError: the kernel is to append and cannot.
        """
        backend = cls(specs, append_in_kernel=append_in_kernel)
        backend._device = device
        return backend

    @classmethod
    def refusal(cls, spec: AttentionSpec, device: torch.device) -> str | None:
        """Why it cannot serve a layer on a device; None if it can."""
        if device.type != "cuda":
            return f"needs a CUDA device, not {device}"
        major, minor = capability(device)
        if major < 8 or (cls.architectures is not None and major not in cls.architectures):
            wanted = "8.0 or above"
            if cls.architectures is not None:
                wanted = " or ".join(f"{major}.x" for major in sorted(cls.architectures))
            return f"needs compute capability {wanted}, not {major}.{minor}"
        if spec.dtype not in _HALVES:
            return f"computes in float16 and bfloat16, not {spec.dtype}"
        if spec.head_dim > _MOST_HEAD_DIM or spec.head_dim % 8:
            return f"head_dim={spec.head_dim} is not a multiple of 8 up to {_MOST_HEAD_DIM}"
        if spec.heads % spec.kv_heads:
            return f"{spec.heads} heads do not divide among {spec.kv_heads} KV heads"
        if spec.softcap is not None and not cls.has_softcap:
            return "has no soft-capping of scores"
        if spec.sinks and not cls.has_sinks:
            return "has no attention sinks"
        return None

    @property
    def append_mode(self) -> AppendMode:
        """How decodes' K and V get into their slots."""
        return "kernel" if self.appends else append_mode(self._device)

    def prepare(self, step: Step, specs: Sequence[AttentionSpec]) -> None:
        """Moves slots and lengths to the device, in one transfer."""
        del specs
        prepare_append(step)
        step.plan["calls"] = step_calls(step)

    def prepare_decode(self, step: Step, tensors: DecodeTensors) -> None:
        """Like :meth:`prepare`, of decodes only, over memory that others fill in; no transfer."""
        prepare_decode(step, tensors)

    def forward(
        self,
        layer: int,
        spec: AttentionSpec,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        step: Step,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Appends K and V, then attends; see :meth:`vattn.attention.base.Backend.forward`."""
        k, v = step.cache.layer(layer)
        calls: list[Call] = step.plan["calls"]
        in_kernel = calls[0].rows.stop if self.appends and calls[0].decodes else 0
        if in_kernel < len(key):
            append(layer, key, value, step, slice(in_kernel, None) if in_kernel else None)
        outs = []
        for call in calls:
            new = (key[call.rows], value[call.rows]) if self.appends and call.decodes else None
            outs.append(self.attend(call, spec, query[call.rows], k, v, sinks, new))
        return outs[0] if len(outs) == 1 else torch.cat(outs)


def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of a CUDA device."""
    return torch.cuda.get_device_capability(device)


def window_sizes(spec: AttentionSpec) -> tuple[int, int]:
    """Tokens before and after a query that it sees: ours count the query itself; -1 for all."""
    return (-1, -1) if spec.window is None else (spec.window - 1, 0)


def new_rows(new: New | None) -> dict[str, torch.Tensor]:
    """New K and V as arguments ``k, v [n, 1, kv_heads, head_dim]``, or no arguments."""
    if new is None:
        return {}
    key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in new)
    return {"k": key.unsqueeze(1), "v": value.unsqueeze(1)}


def flat(tensor: torch.Tensor) -> torch.Tensor:
    """``[slots, slot_tokens, ...]`` as ``[slots * slot_tokens, ...]``, never a copy."""
    return tensor.view(-1, *tensor.shape[2:])


def with_sinks(
    out: torch.Tensor, lse: torch.Tensor, sinks: torch.Tensor | None, *, head_dim_of_lse: int
) -> torch.Tensor:
    """Lets a logit per head join a finished softmax, of which the kernel told the log-sum-exp.

    Args:
        out: ``[n, heads, head_dim]``.
        lse: float32 of shape ``[heads, n]``, or ``[n, heads]`` with ``head_dim_of_lse=1``.
        sinks: ``[heads]``; None leaves the output as it is.
        head_dim_of_lse: which dimension of ``lse`` the heads are.
    """
    if sinks is None:
        return out
    by_token = lse if head_dim_of_lse else lse.transpose(0, 1)
    share = torch.sigmoid(by_token - sinks.float())
    return (out * share.unsqueeze(-1)).to(out.dtype)
