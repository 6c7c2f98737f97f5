"""What a step's sampling gave, on the device and on the host."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from vattn.engine.beam_scores import BeamScores
from vattn.engine.beams import BeamGroup, Candidates
from vattn.engine.logprobs import Logprobs, Scores
from vattn.outputs import Logprob

cuda: Any = torch.cuda  # parts of it are untyped


@dataclass(frozen=True)
class Sampled:
    """The next tokens on the device. Reading them waits; :meth:`to_host` does so once.

    ``token_ids`` int64 ``[R]`` are valid ids in every row; ``bad`` bool ``[R]`` marks those whose
    logits were not a distribution. ``scores`` travel with them and are of other rows; ``beams``
    are what groups of beams can go on with.
    """

    token_ids: torch.Tensor
    bad: torch.Tensor
    logprobs: tuple[Logprobs, ...] = ()
    scores: Scores | None = None
    beams: tuple[BeamScores, ...] = ()

    def with_scored(self, scores: Scores) -> Sampled:
        """The same, with log probabilities of tokens of prompts, see ``Sampler.score``."""
        return replace(self, scores=scores)

    def with_beams(self, beams: tuple[BeamScores, ...]) -> Sampled:
        """The same, with what groups of beams can go on with."""
        return replace(self, beams=beams)

    def send(self) -> Arriving:
        """Starts one copy of everything to the host, and does not wait for it."""
        parts = [torch.where(self.bad, -1, self.token_ids).int()]
        groups = [*self.logprobs, *(self.scores.logprobs if self.scores is not None else ())]
        for given in groups:
            # The bits of float32 as they are.
            reals = [given.logprob.view(torch.int32), given.top_logprobs.reshape(-1)]
            parts += [given.rank.int(), given.top_ids.reshape(-1).int()]
            parts += [reals[0], reals[1].view(torch.int32)]
        for beams in self.beams:
            parts += beams.parts()
        return Arriving(parts[0] if len(parts) == 1 else torch.cat(parts), self)

    def to_host(self) -> HostSampled:
        """The same as Python and numpy values; waits for the device."""
        return self.send().wait()


class Arriving:
    """Sampled tokens on their way to the host.

    Args:
        packed: int32 on the device: tokens, and log probabilities if there are any.
        sampled: what it was packed from; its shapes are used.
    """

    __slots__ = ("_arrived", "_beams", "_groups", "_packed", "_rows", "_targets")

    def __init__(self, packed: torch.Tensor, sampled: Sampled) -> None:
        scores = sampled.scores
        self._rows = len(sampled.token_ids)
        self._targets = None if scores is None else scores.targets
        self._groups = [_Shape.of(given) for given in sampled.logprobs]
        if scores is not None:
            self._groups += [_Shape.of(given, is_score=True) for given in scores.logprobs]
        self._beams = sampled.beams
        self._arrived: Any = None  # an event of CUDA
        self._packed = packed
        if packed.is_cuda:
            # Into pinned memory: to any other the copy would wait for the device.
            self._packed = torch.empty(packed.shape, dtype=torch.int32, pin_memory=True)
            self._packed.copy_(packed, non_blocking=True)
            self._arrived = cuda.Event()
            self._arrived.record()

    def wait(self) -> HostSampled:
        """What was sampled, as Python and numpy values."""
        if self._arrived is not None:
            self._arrived.synchronize()
        if not self._groups and not self._beams:
            return HostSampled(self._packed.tolist(), targets=self._targets)
        packed = self._packed.numpy()
        sampled: list[HostLogprobs] = []
        scored: list[HostLogprobs] = []
        first = self._rows
        for shape in self._groups:
            found, first = shape.read(packed, first)
            (scored if shape.is_score else sampled).append(found)
        beams = []
        for given in self._beams:
            candidates, first = given.read(packed, first)
            beams += candidates
        return HostSampled(
            packed[: self._rows].tolist(),
            *sampled,
            scores=scored,
            targets=self._targets,
            beams=beams,
        )


@dataclass(frozen=True, slots=True)
class _Shape:
    """How log probabilities of some rows are packed."""

    rows: list[int]
    counts: list[int]
    width: int
    is_score: bool

    @staticmethod
    def of(given: Logprobs, *, is_score: bool = False) -> _Shape:
        return _Shape(given.rows, given.counts, given.top_ids.shape[1], is_score)

    def read(self, packed: npt.NDArray[np.int32], first: int) -> tuple[HostLogprobs, int]:
        """What begins at ``first``, and where it ends."""
        rows, width = len(self.rows), self.width
        ends = list(itertools.accumulate([rows, rows * width, rows, rows * width], initial=first))
        ranks, ids, chosen, top = (packed[a:b] for a, b in itertools.pairwise(ends))
        found = HostLogprobs(
            index={row: i for i, row in enumerate(self.rows)},
            counts=self.counts,
            logprob=chosen.view(np.float32),
            rank=ranks,
            top_ids=ids.reshape(rows, width),
            top_logprobs=top.view(np.float32).reshape(rows, width),
        )
        return found, ends[-1]


@dataclass(frozen=True)
class HostLogprobs:
    """:class:`Logprobs` as numpy arrays."""

    index: dict[int, int]  # by row of the step
    counts: list[int]
    logprob: npt.NDArray[np.floating]
    rank: npt.NDArray[np.integer]
    top_ids: npt.NDArray[np.integer]
    top_logprobs: npt.NDArray[np.floating]

    @functools.cached_property
    def _lists(self) -> tuple[list[float], list[int], list[list[int]], list[list[float]]]:
        """All of it as Python's numbers: to convert rows one by one takes many times as long."""
        return (
            self.logprob.tolist(),
            self.rank.tolist(),
            self.top_ids.tolist(),
            self.top_logprobs.tolist(),
        )

    def entry(self, row: int, token: int) -> dict[int, Logprob]:
        """Of a row that is in ``index``, whose chosen token is given: that one first."""
        i = self.index[row]
        count = self.counts[i]
        logprobs, ranks, ids, values = self._lists
        chosen = Logprob(logprobs[i], ranks[i])
        entry = {token: chosen}
        if count:
            likeliest = map(Logprob, values[i][:count], itertools.count(1))
            entry.update(zip(ids[i][:count], likeliest, strict=True))
            entry[token] = chosen  # as likely as others, it may come later among them
        return entry


class HostSampled:
    """The next tokens on the host.

    Args:
        marked: a token per row, -1 for a bad one.
        logprobs: of the rows that asked for them, each row in one of them.
        scores: of tokens of prompts.
        targets: these tokens.
        beams: groups of beams, and what they can go on with.
    """

    __slots__ = ("_bad", "_found", "_scored", "_targets", "beams", "token_ids")

    def __init__(
        self,
        marked: list[int],
        *logprobs: HostLogprobs,
        scores: Sequence[HostLogprobs] = (),
        targets: list[int] | None = None,
        beams: Sequence[tuple[BeamGroup, Candidates]] = (),
    ) -> None:
        self.token_ids = marked
        self.beams = beams
        self._found = {row: given for given in logprobs for row in given.index}
        self._scored = {row: given for given in scores for row in given.index}
        self._targets = targets or []
        self._bad = [i for i, token in enumerate(marked) if token < 0] if -1 in marked else []

    def bad_rows(self) -> list[int]:
        """Rows without a distribution; their token is -1."""
        return self._bad

    def entry(self, row: int, token: int) -> dict[int, Logprob] | None:
        """Log probabilities of a row: of the sampled token first, then of the likeliest.

        Returns:
            By token id: as many as were asked for, and the sampled one. None if none were.
        """
        given = self._found.get(row)
        return None if given is None else given.entry(row, token)

    def scored(self, number: int) -> dict[int, Logprob]:
        """Log probabilities of a token that was scored, by its number: its own first.

        Raises:
            KeyError: there is no such token.
        """
        return self._scored[number].entry(number, self._targets[number])
