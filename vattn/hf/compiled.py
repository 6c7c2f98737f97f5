"""A model through ``torch.compile``, its attention left as the operator ``vattn::attend``.

Two graphs serve every step: one for a single token, in which all sizes are constants, and one for
any other number of them. Both are made before the first step, so no request waits for a compiler.
What is compiled makes no CUDA graphs of its own and allocates by torch's allocator alone, so the
engine's graphs may capture it.

Every process compiles anew. Steps write K and V in the order of the layers, so the operator is
registered as having an ordered effect; torch expresses that by its operator ``with_effects``, and
inductor keeps no graph in its cache that contains one ("Can't cache HigherOrderOperator:
with_effects"). Of an earlier process only what belongs to a kernel by itself is found again: the
machine code of equal source text.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

from vattn.hf.attention import answered_by
from vattn.hf.checks import one_line
from vattn.hf.model import LoadedModel

_log = logging.getLogger(__name__)

# Whether engines compile their models unless told, by the type of the device.
COMPILE_DEFAULT = {"cpu": False, "cuda": False}
# The file of bench/results in which bench.compile found that. On a CPU steps are a tenth faster,
# and the compiler takes a quarter of a minute at every start.
COMPILE_DECIDED_BY = {"cpu": "cpu/compile.json", "cuda": "unmeasured"}

# Tokens of the step with which the graph for many is made: kernels are tuned for such sizes.
_TOKENS = 32

_Forward = Callable[..., torch.Tensor]


class Logits(NamedTuple):
    """What a compiled model returns."""

    logits: torch.Tensor


class CompiledModel:
    """Called as the runner calls the model itself, in inference mode.

    What cannot be compiled runs as it is, and a warning is logged that says why.

    Args:
        loaded: the model; its weights are used where they are.
        backend: of ``torch.compile``.
        tune: see :func:`compile_model`.

    Attributes:
        refusal: why it runs uncompiled; None if it does not.
    """

    def __init__(self, loaded: LoadedModel, backend: Any, tune: bool) -> None:
        self._model = loaded.model
        self._keeps_logits = loaded.keeps_logits
        self.refusal: str | None = None
        options = _options(backend, loaded.device, tune)
        # A single token: no size is a variable.
        self._one = self._compile(backend, options, dynamic=False)
        self._many = self._compile(backend, options, dynamic=None)
        self._warm_up(loaded.device)

    def __call__(
        self,
        *,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        logits_to_keep: torch.Tensor | None = None,
        use_cache: bool = False,
    ) -> Logits:
        """One packed step.

        Args:
            input_ids: int64 ``[1, T]``, T at least 1, contiguous.
            position_ids: like ``input_ids``.
            logits_to_keep: int64 ``[R]``, the tokens whose logits are wanted. Not for a model that
                does not keep logits, which computes all.
            use_cache: must be False.

        Returns:
            Logits ``[1, R, vocab_size]``.

        Raises:
            ValueError: an argument that no graph was made for.
            StepMissing: called outside an engine.
        """
        self._check(input_ids, position_ids, logits_to_keep, use_cache)
        with torch.inference_mode():
            try:
                return Logits(self._compiled(input_ids, position_ids, logits_to_keep))
            # Raised while compiling, before any kernel of the step is launched.
            except FailOnRecompileLimitHit:
                self._refuse("the model was changed more often than torch compiles it again")
            except TorchDynamoException as error:
                self._refuse(one_line(error))
            return Logits(self._plain(input_ids, position_ids, logits_to_keep))

    def _check(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        rows: torch.Tensor | None,
        use_cache: bool,
    ) -> None:
        """Guards on the inputs are left out of the graphs, see :func:`_without_inputs`."""
        shape = tuple(input_ids.shape)
        if len(shape) != 2 or shape[0] != 1 or not shape[1]:
            raise ValueError(f"input_ids has shape {shape}; a step is [1, T] with T of 1 or more")
        if tuple(position_ids.shape) != shape:
            raise ValueError(f"position_ids has shape {tuple(position_ids.shape)}, not {shape}")
        given = [input_ids, position_ids] + ([] if rows is None else [rows])
        if any(tensor.dtype != torch.int64 for tensor in given):
            raise ValueError(f"ids, positions and rows are int64, not {[t.dtype for t in given]}")
        if (rows is not None) != self._keeps_logits:
            needs = "needs" if self._keeps_logits else "does not know"
            raise ValueError(f"{type(self._model).__name__} {needs} logits_to_keep")
        if rows is not None and rows.dim() != 1:
            raise ValueError(f"logits_to_keep has shape {tuple(rows.shape)}, not [R]")
        if use_cache:
            raise ValueError("use_cache=True: the cache is the engine's; leave it out")

    def _compiled(
        self, ids: torch.Tensor, positions: torch.Tensor, rows: torch.Tensor | None
    ) -> torch.Tensor:
        if self.refusal is not None:
            return self._plain(ids, positions, rows)
        if ids.shape[1] == 1:
            # There is but one row to choose, or none.
            logits = self._one(ids, positions)
            return logits if rows is None or len(rows) == 1 else logits[:, rows]
        _mark(ids, positions, rows)
        return self._many(ids, positions, rows)

    def _plain(
        self, ids: torch.Tensor, positions: torch.Tensor, rows: torch.Tensor | None
    ) -> torch.Tensor:
        options = {} if rows is None else {"logits_to_keep": rows}
        out = self._model(input_ids=ids, position_ids=positions, use_cache=False, **options)
        logits: torch.Tensor = out.logits
        return logits

    def _compile(
        self, backend: Any, options: dict[str, Any] | None, *, dynamic: bool | None
    ) -> _Forward:
        model = self._model

        def forward(
            ids: torch.Tensor, positions: torch.Tensor, rows: torch.Tensor | None = None
        ) -> torch.Tensor:
            kept = {} if rows is None else {"logits_to_keep": rows}
            out = model(input_ids=ids, position_ids=positions, use_cache=False, **kept)
            logits: torch.Tensor = out.logits
            return logits

        compiled: _Forward = torch.compile(
            _with_code_of_its_own(forward),
            backend=backend,
            fullgraph=True,
            dynamic=dynamic,
            options=dict(options) if options is not None else None,
        )
        return compiled

    @torch.inference_mode()
    def _warm_up(self, device: torch.device) -> None:
        """Compiles both graphs, with attention that computes nothing."""
        for tokens in (1, _TOKENS):
            ids = torch.zeros(1, tokens, dtype=torch.long, device=device)
            rows = torch.zeros(2, dtype=torch.long, device=device) if self._keeps_logits else None
            # Compilers warn of what they do not use; in a program that makes errors of warnings
            # none of that is a reason not to compile.
            with answered_by(_Zeros()), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    self._compiled(ids, torch.zeros_like(ids), rows)
                except torch.OutOfMemoryError:
                    raise
                except Exception as error:  # whatever it is, the model works without
                    self._refuse(one_line(error))
                    return

    def _refuse(self, reason: str) -> None:
        self.refusal = reason
        _log.warning(
            "%s runs without torch.compile, which failed: %s",
            type(self._model).__name__,
            reason,
        )


class _Zeros:
    """Answers with zeros and writes nothing."""

    def attend(
        self,
        layer_idx: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """See :class:`vattn.hf.attention.LayerCalls`."""
        del layer_idx, key, sinks
        return query.new_zeros(1, query.shape[2], query.shape[1], value.shape[-1])


def compile_model(
    loaded: LoadedModel, *, backend: Any = "inductor", tune: bool = False
) -> CompiledModel:
    """Compiles a model for an engine, which takes seconds to minutes.

    Args:
        loaded: the model.
        backend: of ``torch.compile``: a name or a function.
        tune: inductor tries more configurations of each kernel, and has kernels of its own for
            matrices times one token; on a GPU only.

    Returns:
        What the runner calls in place of ``loaded.model``. See its ``refusal``: a model that does
        not compile runs as it is.

    Raises:
        ValueError: ``tune`` where there is nothing to tune.
        OutOfMemoryError: no memory for a step of a few tokens.
    """
    return CompiledModel(loaded, backend, tune)


def _options(backend: Any, device: torch.device, tune: bool) -> dict[str, Any]:
    if tune and (backend != "inductor" or device.type != "cuda"):
        raise ValueError(f"tune=True is for inductor on a GPU, not for {backend!r} on {device}")
    options: dict[str, Any] = {"guard_filter_fn": _without_inputs}
    if backend == "inductor":
        options["triton.cudagraphs"] = False  # the engine captures its own
        options["coordinate_descent_tuning"] = tune
    return options


def _without_inputs(guards: Sequence[Any]) -> list[bool]:
    """Which guards to keep: not those on the kind of the inputs, which are checked at each call.

    They would tell tensors that were made in inference mode from others, and compile for each. What
    graphs assume of sizes are guards of another type, and stay.
    """
    inputs = ("ids", "positions", "rows")
    return [not (g.guard_type == "TENSOR_MATCH" and g.name in inputs) for g in guards]


def _mark(ids: torch.Tensor, positions: torch.Tensor, rows: torch.Tensor | None) -> None:
    """Makes T and R variables of the graph that is made of these tensors, if one is.

    Of R it assumes nothing at all: 0 and 1 are no special cases, nor is R = T.
    """
    torch._dynamo.mark_dynamic(ids, 1)
    torch._dynamo.mark_dynamic(positions, 1)
    if rows is not None:
        torch._dynamo.decorators.mark_unbacked(rows, 0)


def _with_code_of_its_own(function: Any) -> Any:
    """The function with a copy of its code.

    Torch keeps what it compiled, and counts it against a limit, by code object: models that shared
    one would stand in each other's way.
    """
    return FunctionType(
        function.__code__.replace(),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
