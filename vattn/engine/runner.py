"""Runs a model over one packed step."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from vattn.attention.base import AttentionSpec, Backend, Int32, Step
from vattn.hf.attention import answered_by
from vattn.hf.model import LoadedModel
from vattn.kv.cache import KVCache

Int64 = npt.NDArray[np.int64]


class ModelRunner:
    """Makes one ``[1, T]`` batch of a step's tokens and takes the logits that are asked for.

    Args:
        loaded: the model.
        cache: made from its ``layer_specs()``, on its device.
        backend: that can serve its ``specs``.

    Raises:
        ValueError: a cache for another model.
    """

    def __init__(self, loaded: LoadedModel, cache: KVCache, backend: Backend) -> None:
        if list(cache.specs) != loaded.layer_specs():
            raise ValueError(
                f"the cache is of {len(cache.specs)} layers that are not this model's "
                f"{len(loaded.specs)}; make it from loaded.layer_specs()"
            )
        self._loaded = loaded
        self._cache = cache
        self._backend = backend

    @torch.inference_mode()
    def run(
        self,
        slots: Int32,
        query_lens: Int32,
        kv_lens: Int32,
        num_decodes: int,
        input_ids: Int64,
        logit_rows: Int64,
    ) -> torch.Tensor:
        """One forward pass; writes the K and V of its tokens. Does not wait for the device.

        Args:
            slots: int32 ``[S]``, the decodes' slots ascending, then the chunks'.
            query_lens: int32 ``[S]``, new tokens; 1 for each decode.
            kv_lens: int32 ``[S]``, tokens in the slot, the new ones included; all of them ensured.
            num_decodes: how many of the S are decodes.
            input_ids: int64 ``[T]``, the new tokens.
            logit_rows: int64 ``[R]``, those of the T tokens after which logits are wanted.

        Returns:
            Logits, float32 ``[R, vocab_size]`` on the device.
        """
        step = Step(self._cache, slots, query_lens, kv_lens, num_decodes)
        self._backend.prepare(step, self._loaded.specs)
        ids, positions, rows = _to_device(
            self._cache.device, input_ids, step.positions(), logit_rows
        )
        keeps = self._loaded.keeps_logits
        options: dict[str, Any] = {"logits_to_keep": rows} if keeps else {}
        layers = _Layers(self._loaded, self._backend, step)
        with answered_by(layers):
            out = self._loaded.model(
                input_ids=ids[None], position_ids=positions[None], use_cache=False, **options
            )
        if layers.calls != len(self._loaded.specs):
            raise RuntimeError(
                f"{layers.calls} of the model's {len(self._loaded.specs)} layers used this "
                "engine's attention: somebody has changed the model since; make a new LLM"
            )
        logits: torch.Tensor = out.logits[0]
        return (logits if keeps else logits[rows]).float()


class _Layers:
    """Answers the attention of the model's layers during one step."""

    def __init__(self, loaded: LoadedModel, backend: Backend, step: Step) -> None:
        self._layer_of = loaded.layer_of
        self._specs: list[AttentionSpec] = loaded.specs
        self._forward = backend.forward
        self._step = step
        self.calls = 0

    def attend(
        self,
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        arguments: dict[str, Any],
    ) -> torch.Tensor:
        """See :class:`vattn.hf.attention.LayerCalls`."""
        assert mask is None, f"layer {module.layer_idx} of the model made a mask of its own"
        self.calls += 1
        layer = self._layer_of[module.layer_idx]
        spec = self._specs[layer]
        out = self._forward(
            layer,
            spec,
            query.transpose(1, 2)[0],
            key.transpose(1, 2)[0],
            value.transpose(1, 2)[0],
            self._step,
            arguments["s_aux"] if spec.sinks else None,
        )
        return out[None]


def _to_device(device: torch.device, *arrays: Int64) -> list[torch.Tensor]:
    """The arrays on a device, by one transfer that the host does not wait for."""
    packed = torch.from_numpy(np.concatenate(arrays))
    if device.type == "cuda":
        # Pinned memory of torch's, which it does not give to others before the copy is done.
        packed = packed.pin_memory().to(device, non_blocking=True)
    return list(torch.split(packed, [len(array) for array in arrays]))
