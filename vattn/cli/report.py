"""What a run shows after its text: figures, the memory map and the JSON file."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from vattn.cli.console import CONTROL, BadInput, one_line
from vattn.cli.memory_map import describe_column, render
from vattn.cli.run import Output, Timing
from vattn.config import format_bytes
from vattn.kv.layout import Layout
from vattn.kv.report import CacheStats, MemoryMap
from vattn.metrics import EngineStats


def print_map(console: Console, memory: MemoryMap, layout: Layout) -> None:
    """Draws the slots of the map that hold something under a rule."""
    _rule(console, "memory map, when most tokens were live")
    used = tuple(slot for slot in memory.slots if slot.open or slot.kept)
    memory = dataclasses.replace(memory, slots=used)
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


def print_figures(
    console: Console,
    peak: CacheStats | None,
    engine: EngineStats,
    timing: Timing,
    *,
    speculates: bool = False,
) -> None:
    """Prints a run's figures under a rule.

    Args:
        console: where to.
        peak: of the cache when most tokens were live; None if that moment never came.
        engine: at the end of the run.
        timing: of the run.
        speculates: drafts were to be made.
    """
    _rule(console, "figures")
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    for name, value in figures(peak or engine.cache, engine, timing):
        table.add_row(name, value)
    if speculates:
        table.add_row("speculation", acceptance(engine))
    console.print(table)


def acceptance(engine: EngineStats) -> str:
    """How many drafts were accepted, for people."""
    drafts, accepted = engine.spec_decode_num_draft_tokens, engine.spec_decode_num_accepted_tokens
    if not drafts:
        return "no drafts were made"
    length = 1 + accepted / engine.spec_decode_num_drafts
    share = f"{accepted} of {drafts} drafts accepted ({accepted / drafts:.0%})"
    return f"{share}, {length:.2f} tokens per verification"


def print_results(console: Console, outputs: Sequence[Output], *, is_search: bool) -> None:
    """Lists the outputs with their scores under a rule, a line each.

    Args:
        console: where to; texts are cut to its width.
        outputs: of all prompts; those without an end are left out.
        is_search: they are beams.
    """
    _rule(console, "results")
    table = Table(box=None, pad_edge=False, header_style="bold", expand=True)
    several = len({output.prompt_index for output in outputs}) > 1
    names = ["prompt"] if several else []
    names += ["beam", "score"] if is_search else ["sample"]
    names += ["log prob.", "tokens", "end", "pages (shared)"]
    for name in names:
        table.add_column(name, no_wrap=True, justify="left" if name == "end" else "right")
    table.add_column("text", no_wrap=True, overflow="ellipsis", ratio=1)
    for output in outputs:
        if output.finish_reason is not None:
            cells = [str(output.prompt_index + 1)] if several else []
            table.add_row(*cells, *_result(output, is_search))
    console.print(table)
    for output in outputs:
        if output.prompt_logprobs is not None:
            console.print(Text(_prompt_line(output, several), "dim"))


def _result(output: Output, is_search: bool) -> list[str | Text]:
    """The cells of an output, without its prompt."""
    total, kv = output.cumulative_logprob, output.kv
    cells: list[str | Text] = [str(output.sample + 1)]
    if is_search:
        cells.append("-" if output.score is None else f"{output.score:.4f}")
    cells.append("-" if total is None else f"{total:.2f}")
    cells += [str(len(output.token_ids)), str(output.finish_reason)]
    cells += [f"{kv.pages} ({kv.shared_pages})", Text(one_line(CONTROL.sub("", output.text)))]
    return cells


def _prompt_line(output: Output, several: bool) -> str:
    """The log probability of a prompt, for people."""
    known = [entry for entry in output.prompt_logprobs or () if entry is not None]
    total = sum(next(iter(entry.values())).logprob for entry in known)
    name = f"prompt {output.prompt_index + 1}" if several else "the prompt"
    if not known:
        return f"{name}: the first token of a prompt has no log probability"
    return (
        f"{name}: log probability {total:.2f} over {len(known)} tokens, perplexity "
        f"{_exp(-total / len(known)):.2f}"
    )


def _exp(value: float) -> float:
    """The exponential, infinite where it is too large for a float."""
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf


def figures(peak: CacheStats, engine: EngineStats, timing: Timing) -> list[tuple[str, str]]:
    """The figures as (name, value) pairs for people."""
    size = format_bytes
    speed = f"{timing.tokens_per_s:.0f} tokens/s"
    if timing.first_token_s is not None:
        speed += f", first token after {timing.first_token_s * 1e3:.0f} ms"
    sequences = "1 sequence" if peak.open_slots == 1 else f"{peak.open_slots} sequences at once"
    cached = f"at most {peak.tokens} tokens of {sequences}"
    density = peak.token_bytes / peak.live_bytes if peak.live_bytes else 0
    physical = f"{size(peak.live_bytes)} in live pages, {density:.2f} bytes of K and V in each byte"
    beside = {
        "cover": peak.cover_bytes,
        "kept": peak.kept_bytes,
        "stale": peak.stale_bytes - peak.kept_bytes,
        "pooled": peak.pooled_bytes,
    }
    hits, queries = engine.prefix_cache_hits, engine.prefix_cache_queries
    preemptions = f"{engine.num_preemptions}"
    if engine.requests_swapped_out:
        preemptions += f", {engine.requests_swapped_out} of them swapped to host memory"
    budget = f"budget {size(peak.budget_bytes)} in pages of {size(peak.page_bytes)}"
    calls = [f"{n} {kind}" for kind, n in engine.cache.driver_calls.items() if n]
    return [
        ("generated", f"{timing.tokens} tokens in {timing.total_s:.2f} s"),
        ("speed", speed),
        ("cached", f"{cached}, {size(peak.token_bytes)} of K and V"),
        ("physical", physical),
        ("shared", f"{size(peak.shared_bytes)} of that, in several sequences at once"),
        ("beside it", ", ".join(f"{name} {size(n)}" for name, n in beside.items())),
        ("prefix hits", f"{hits} of {queries} prompt tokens were found in the cache"),
        ("preemptions", preemptions),
        ("limits", f"{budget}, addresses {size(peak.reserved_bytes)}"),
        ("driver calls", ", ".join(calls) or "none"),
    ]


def write_json(
    path: Path,
    run: dict[str, Any],
    outputs: Sequence[Output],
    peak: CacheStats | None,
    engine: EngineStats | None,
    timing: Timing,
) -> None:
    """Writes the run's settings, outputs and figures.

    Args:
        path: of the file. Numbers that JSON has not, infinite ones and NaN, are null in it.
        run: its settings.
        outputs: as far as they have come.
        peak: of the cache when most tokens were live, under ``cache``.
        engine: at the end of the run.
        timing: of the run.

    Raises:
        BadInput: the file cannot be written.
    """
    record = {
        **run,
        "outputs": [dataclasses.asdict(output) for output in outputs],
        "timing": {**dataclasses.asdict(timing), "tokens_per_s": timing.tokens_per_s},
        "cache": dataclasses.asdict(peak) if peak is not None else None,
        "engine": dataclasses.asdict(engine) if engine is not None else None,
    }
    try:
        text = json.dumps(_finite(record), indent=2, ensure_ascii=False, allow_nan=False)
        path.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise BadInput(f"--json {path} cannot be written: {error.strerror}") from error


def _finite(value: Any) -> Any:
    """A value with None in place of every number in it that is not finite."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return value


def _rule(console: Console, title: str) -> None:
    console.print()
    console.print(Rule(title, align="left", style="dim", characters="─"))
