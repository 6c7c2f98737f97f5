"""What a step's sampling gave, on the device and on the host."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from vattn.outputs import Logprob

cuda: Any = torch.cuda  # parts of it are untyped


@dataclass(frozen=True)
class Logprobs:
    """Log probabilities of the L rows that asked for them, on the device.

    Natural logarithms, of the logits as the model gave them: before temperature and filters, as
    vLLM's ``raw_logprobs``. A rank is 1 for the likeliest token and for those as likely as it.
    """

    rows: list[int]
    counts: list[int]  # how many of the likeliest each asked for
    logprob: torch.Tensor  # float32 [L], of the sampled token
    rank: torch.Tensor  # int64 [L]
    top_ids: torch.Tensor  # int64 [L, K]
    top_logprobs: torch.Tensor  # float32 [L, K]


@dataclass(frozen=True)
class Sampled:
    """The next tokens on the device. Reading them waits; :meth:`to_host` does so once.

    ``token_ids`` int64 ``[R]`` are valid ids in every row; ``bad`` bool ``[R]`` marks those whose
    logits were not a distribution.
    """

    token_ids: torch.Tensor
    bad: torch.Tensor
    logprobs: Logprobs | None = None

    def send(self) -> Arriving:
        """Starts one copy of everything to the host, and does not wait for it."""
        tokens = torch.where(self.bad, -1, self.token_ids)
        given = self.logprobs
        if given is None:
            return Arriving(tokens)
        floats = torch.cat([given.logprob, given.top_logprobs.flatten()])
        parts = [tokens, given.rank, given.top_ids.flatten(), floats.double().view(torch.int64)]
        return Arriving(torch.cat(parts), len(tokens), given)

    def to_host(self) -> HostSampled:
        """The same as Python and numpy values; waits for the device."""
        return self.send().wait()


class Arriving:
    """Sampled tokens on their way to the host.

    Args:
        packed: int64 on the device: tokens, and log probabilities if there are any.
        rows: how many tokens; None for all of ``packed``.
        logprobs: their shapes.
    """

    __slots__ = ("_arrived", "_logprobs", "_packed", "_rows")

    def __init__(
        self, packed: torch.Tensor, rows: int | None = None, logprobs: Logprobs | None = None
    ) -> None:
        self._rows, self._logprobs = rows, logprobs
        self._arrived: Any = None  # an event of CUDA
        self._packed = packed
        if packed.is_cuda:
            # Into pinned memory: to any other the copy would wait for the device.
            self._packed = torch.empty(packed.shape, dtype=torch.int64, pin_memory=True)
            self._packed.copy_(packed, non_blocking=True)
            self._arrived = cuda.Event()
            self._arrived.record()

    def wait(self) -> HostSampled:
        """What was sampled, as Python and numpy values."""
        if self._arrived is not None:
            self._arrived.synchronize()
        given, packed = self._logprobs, self._packed
        if given is None:
            return HostSampled(packed.tolist())
        assert self._rows is not None
        shape = given.top_ids.shape
        ends = np.cumsum([self._rows, shape[0], shape[0] * shape[1]])
        tokens, ranks, top_ids, reals = np.split(packed.numpy(), ends)
        reals = reals.view(np.float64)
        return HostSampled(
            tokens.tolist(),
            HostLogprobs(
                index={row: i for i, row in enumerate(given.rows)},
                counts=given.counts,
                logprob=reals[: shape[0]],
                rank=ranks,
                top_ids=top_ids.reshape(shape),
                top_logprobs=reals[shape[0] :].reshape(shape),
            ),
        )


@dataclass(frozen=True)
class HostLogprobs:
    """:class:`Logprobs` as numpy arrays."""

    index: dict[int, int]  # by row of the step
    counts: list[int]
    logprob: npt.NDArray[np.float64]
    rank: npt.NDArray[np.int64]
    top_ids: npt.NDArray[np.int64]
    top_logprobs: npt.NDArray[np.float64]


class HostSampled:
    """The next tokens on the host.

    Args:
        marked: a token per row, -1 for a bad one.
        logprobs: of the rows that asked for them.
    """

    __slots__ = ("_bad", "logprobs", "token_ids")

    def __init__(self, marked: list[int], logprobs: HostLogprobs | None = None) -> None:
        self.token_ids = marked
        self.logprobs = logprobs
        self._bad = [i for i, token in enumerate(marked) if token < 0] if -1 in marked else []

    def bad_rows(self) -> list[int]:
        """Rows without a distribution; their token is -1."""
        return self._bad

    def entry(self, row: int, token: int) -> dict[int, Logprob] | None:
        """Log probabilities of a row: of the sampled token first, then of the likeliest.

        Returns:
            By token id: as many as were asked for, and the sampled one. None if none were.
        """
        given = self.logprobs
        if given is None or row not in given.index:
            return None
        i = given.index[row]
        entry = {token: Logprob(float(given.logprob[i]), int(given.rank[i]))}
        count = given.counts[i]
        ids, values = given.top_ids[i, :count].tolist(), given.top_logprobs[i, :count].tolist()
        for rank, (other, value) in enumerate(zip(ids, values, strict=True), 1):
            if other != token:
                entry[other] = Logprob(value, rank)
        return entry
