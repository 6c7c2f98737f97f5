"""Tables of the offline level, from its results."""

from __future__ import annotations

from collections.abc import Sequence

from bench.common import Json, short_count
from bench.levels.repeat import cell
from bench.levels.table import Table


def contexts_table(rows: Sequence[Json]) -> Table:
    """Decode steps of batches whose sequences are all so long."""
    return Table(
        "decode at fixed contexts: paged time / contiguous time",
        [
            *("model", "paged kernel", "block", "batch", "context", "contiguous is x"),
            *("contiguous tok/s", "paged tok/s", "K and V of bytes read"),
            *("attention of step", "equal texts"),
        ],
        [
            [
                *(r["shape"], r["kernel"], r["block_tokens"]),
                *(r["batch"], short_count(r["context"])),
                cell(r["ratio"]),
                *(r[side]["output_throughput"] for side in ("contiguous", "paged")),
                f"{r['kv_share']:.0%}",
                _shares(r),
                f"{r['equal_texts']}/{r['compared_texts']}",
            ]
            for r in sorted(rows, key=lambda r: str(r["workload"]))
        ],
        "The share of attention is of the steps of contiguous / paged.",
    )


def _shares(row: Json) -> str | None:
    shares = [row[side]["attention_share"] for side in ("contiguous", "paged")]
    return None if None in shares else " / ".join(f"{share:.0%}" for share in shares)


def rounds_table(rows: Sequence[Json]) -> Table:
    """Whole requests."""
    return Table(
        "whole requests: paged time / contiguous time",
        [
            *("workload", "model", "paged kernel", "block", "requests", "mean prompt", "answer"),
            *("contiguous is x", "contiguous req/min", "paged req/min", "equal texts"),
        ],
        [
            [
                *(r["workload"], r["shape"], r["kernel"], r["block_tokens"], r["requests"]),
                *(round(r["prompt_mean"]), round(r["answer_mean"])),
                cell(r["ratio"]),
                *(r[side]["requests_per_minute"] for side in ("contiguous", "paged")),
                f"{r['equal_texts']}/{r['compared_texts']}",
            ]
            for r in rows
        ],
        " ".join(dict.fromkeys(f"{r['workload']}: {r['source']}." for r in rows)),
    )
