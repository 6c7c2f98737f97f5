"""What beams can go on with, computed from a step's logits for all groups at once.

Nothing here waits for the device. Groups of one width, and those that have computed their prompt
just now, are computed together. Log probabilities are float32, and added in the order in which
transformers adds them.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from vattn.attention.upload import Uploader
from vattn.engine.beams import BeamGroup, Candidates
from vattn.request import Request


@dataclass(frozen=True)
class BeamScores:
    """The best continuations of G groups of beams of one shape, on the device, best first."""

    groups: list[BeamGroup]
    scores: torch.Tensor  # float32 [G, K], log probability of all new tokens
    ids: torch.Tensor  # int64 [G, K], rank of the beam * vocab_size + token
    vocab_size: int

    def parts(self) -> list[torch.Tensor]:
        """Both as int32, to be sent."""
        return [self.scores.reshape(-1).view(torch.int32), self.ids.reshape(-1).int()]

    def read(
        self, packed: npt.NDArray[np.int32], first: int
    ) -> tuple[list[tuple[BeamGroup, Candidates]], int]:
        """What of :meth:`parts` has arrived at ``first``, and where it ends."""
        shape, n = tuple(self.ids.shape), self.ids.numel()
        scores = packed[first : first + n].view(np.float32).reshape(shape).tolist()
        beams, tokens = np.divmod(packed[first + n : first + 2 * n].reshape(shape), self.vocab_size)
        found = map(Candidates, scores, beams.tolist(), tokens.tolist())
        return list(zip(self.groups, found, strict=True)), first + 2 * n


class BeamScorer:
    """Finds the best continuations of beams.

    Args:
        device: where the logits are.
    """

    def __init__(self, device: torch.device | str) -> None:
        self._upload = Uploader(torch.device(device))

    @torch.inference_mode()
    def score(self, logits: torch.Tensor, requests: Sequence[Request]) -> tuple[BeamScores, ...]:
        """The candidates of all groups of beams among the rows of a step.

        Args:
            logits: float ``[R, V]``; stay as they are.
            requests: R of them. All beams of a group are among them or none is.
        """
        rows = {request: row for row, request in enumerate(requests) if request.group is not None}
        if not rows:
            return ()
        shapes: dict[tuple[int, int, int], list[BeamGroup]] = {}
        for group in dict.fromkeys(request.group for request in rows):
            shape = (group.width, len(group.ranked), group.candidates)
            shapes.setdefault(shape, []).append(group)
        return tuple(
            self._score(logits, groups, rows, candidates)
            for (_, _, candidates), groups in shapes.items()
        )

    def _score(
        self,
        logits: torch.Tensor,
        groups: list[BeamGroup],
        rows: dict[Request, int],
        candidates: int,
    ) -> BeamScores:
        beams, vocab_size = len(groups[0].ranked), logits.shape[1]
        at = [rows[beam] for group in groups for beam in group.ranked]
        before = list(itertools.chain.from_iterable(group.scores for group in groups))
        temperatures = [group.params.temperature or 1.0 for group in groups for _ in group.ranked]
        where, scores, scale = self._upload(
            np.array(at, np.int64),
            np.array(before, np.float32),
            np.array(temperatures, np.float32),
        )
        chosen = logits.index_select(0, where).float()
        if any(temperature != 1 for temperature in temperatures):
            chosen.div_(scale[:, None])
        logprobs = chosen.log_softmax(1).add_(scores[:, None])
        flat = logprobs.reshape(len(groups), beams * vocab_size)
        best, ids = flat.topk(min(candidates, flat.shape[1]), 1)
        return BeamScores(groups, best, ids, vocab_size)
