"""How well drafts were guessed; no torch here."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class DraftCounts:
    """Figures of verified drafts; names and meanings are those of vLLM's metrics.

    Args:
        drafts: how often a request had some.
        draft_tokens: how many these were.
        accepted_tokens: how many of them became tokens of an output.
        accepted_per_position: the same for the first draft, the second, ...
    """

    drafts: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0
    accepted_per_position: list[int] = field(default_factory=list)

    def count(self, drafts: int, accepted: int) -> None:
        """Takes in the drafts of one request in one step, of which the first were accepted."""
        self.drafts += 1
        self.draft_tokens += drafts
        self.accepted_tokens += accepted
        positions = self.accepted_per_position
        positions += [0] * (drafts - len(positions))
        for position in range(accepted):
            positions[position] += 1
