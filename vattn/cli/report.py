"""What a run shows after its text: figures, the memory map and the JSON file."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

import vattn
from vattn.cli.console import BadInput
from vattn.cli.memory_map import describe_column, render
from vattn.cli.run import Output, Timing
from vattn.config import format_bytes
from vattn.kv.layout import Layout


def print_map(console: Console, memory: vattn.MemoryMap, layout: Layout) -> None:
    """Draws the map under a rule."""
    _rule(console, "memory map")
    windows = [region.spec.window for region in layout.regions]
    labels = ["full" if window is None else f"window {window}" for window in windows]
    console.print(
        render(
            memory,
            width=console.width,
            labels=labels if len(set(labels)) > 1 else (),
            slot_tokens=layout.regions[0].slot_tokens,
            plain_ascii=not (console.encoding or "").lower().startswith("utf"),
        ),
        no_wrap=True,
    )
    console.print(Text(describe_column(memory), "dim"))


def print_figures(console: Console, stats: vattn.CacheStats, timing: Timing, reserved: int) -> None:
    """Prints a run's figures under a rule.

    Args:
        console: where to.
        stats: of the cache, while its sequences are open.
        timing: of the run.
        reserved: bytes of addresses that the cache has reserved.
    """
    _rule(console, "figures")
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    for name, value in figures(stats, timing, reserved):
        table.add_row(name, value)
    console.print(table)


def figures(stats: vattn.CacheStats, timing: Timing, reserved: int) -> list[tuple[str, str]]:
    """The figures as (name, value) pairs for people."""
    density = stats.token_bytes / stats.live_bytes if stats.live_bytes else 0
    size = format_bytes
    speed = f"{timing.tokens_per_s:.0f} tokens/s"
    if timing.first_token_s is not None:
        speed += f", first token after {timing.first_token_s * 1e3:.0f} ms"
    cached = f"{stats.tokens} tokens of {stats.open_slots} sequences"
    physical = (
        f"{size(stats.live_bytes)} in live pages, {density:.2f} bytes of K and V in each byte"
    )
    cover, stale, pooled = map(size, (stats.cover_bytes, stats.stale_bytes, stats.pooled_bytes))
    budget = f"budget {size(stats.budget_bytes)} in pages of {size(stats.page_bytes)}"
    calls = {kind: n for kind, n in stats.driver_calls.items() if n}
    return [
        ("generated", f"{timing.tokens} tokens in {timing.total_s:.2f} s"),
        ("speed", speed),
        ("cached", f"{cached}, {size(stats.token_bytes)} of K and V"),
        ("physical", physical),
        ("shared", f"{size(stats.shared_bytes)} of that, in several sequences at once"),
        ("beside it", f"cover {cover}, stale {stale}, pooled {pooled}"),
        ("limits", f"{budget}, addresses {size(reserved)}"),
        ("driver calls", ", ".join(f"{n} {kind}" for kind, n in calls.items()) or "none"),
    ]


def write_json(
    path: Path,
    run: dict[str, Any],
    outputs: Sequence[Output],
    stats: vattn.CacheStats | None,
    timing: Timing,
) -> None:
    """Writes the run's settings, outputs and figures.

    Raises:
        BadInput: the file cannot be written.
    """
    record = {
        **run,
        "outputs": [dataclasses.asdict(output) for output in outputs],
        "timing": {**dataclasses.asdict(timing), "tokens_per_s": timing.tokens_per_s},
        "cache": dataclasses.asdict(stats) if stats is not None else None,
    }
    try:
        path.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise BadInput(f"--json {path} cannot be written: {error.strerror}") from error


def _rule(console: Console, title: str) -> None:
    console.print()
    console.print(Rule(title, align="left", style="dim", characters="─"))
