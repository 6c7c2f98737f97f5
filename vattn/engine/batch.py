"""What one step computes, as arrays: the runner's input."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vattn.attention.base import Int32
from vattn.engine.policy import Plan
from vattn.request import Request

Int64 = npt.NDArray[np.int64]

# In place of a token id: the one that was sampled last for the slot, which only the device knows.
SAMPLED = -1


@dataclass(frozen=True)
class StepBatch:
    """A packed batch of T new tokens of S sequences; after R of them a token is sampled.

    Args:
        slots: int32 ``[S]``, the decodes' slots ascending, then those of sequences that verify
            drafts, then the chunks'.
        query_lens: int32 ``[S]``, new tokens, drafts included; 1 for each decode.
        kv_lens: int32 ``[S]``, tokens in the slot, the new ones included; all of them ensured.
        num_decodes: how many of the S are decodes.
        input_ids: int64 ``[T]``, the new tokens; :data:`SAMPLED` for those still on the device.
        logit_rows: int64 ``[R + P]``, those of the T tokens after which logits are wanted. First
            the R: the decodes', the last token and the drafts of those that verify, and the last
            ones of the chunks that end a prompt; then P tokens of prompts that are scored.
        sample_slots: int64 ``[R]``, the slots of the R.
    """

    slots: Int32
    query_lens: Int32
    kv_lens: Int32
    num_decodes: int
    input_ids: Int64
    logit_rows: Int64
    sample_slots: Int64

    @property
    def decodes_only(self) -> bool:
        """Whether every sequence has one new token and gets another."""
        return self.num_decodes == len(self.slots)


def pack(plan: Plan) -> StepBatch:
    """A plan as arrays; before ``computed`` moves on."""
    decodes = len(plan.decodes)
    ids = [r.tokens[-1] if not r.in_flight else SAMPLED for r in plan.decodes]
    query_lens = [1] * decodes
    rows = list(range(decodes))
    sample_slots = plan.slots[:decodes]
    for request, drafts in plan.verifies:
        rows += range(len(ids), len(ids) + 1 + drafts)
        sample_slots += [request.slot] * (1 + drafts)
        query_lens.append(1 + drafts)
        ids.append(request.tokens[-1])
        ids += request.drafts[:drafts]
    begins: dict[Request, int] = {}  # where the token of position 0 would be among the ids
    for request, n in plan.chunks:
        first = request.computed
        begins[request] = len(ids) - first
        query_lens.append(n)
        ids += request.tokens[first : first + n]
        if first + n == len(request.tokens):
            rows.append(len(ids) - 1)
            sample_slots.append(request.slot)
    for request, first, count in plan.scored:
        begin = begins[request] + first
        rows += range(begin, begin + count)
    return StepBatch(
        slots=np.array(plan.slots, np.int32),
        query_lens=np.array(query_lens, np.int32),
        kv_lens=np.array(plan.kv_lens, np.int32),
        num_decodes=decodes,
        input_ids=np.array(ids, np.int64),
        logit_rows=np.array(rows, np.int64),
        sample_slots=np.array(sample_slots, np.int64),
    )
