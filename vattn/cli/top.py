"""``vattn top``: the physical memory of running processes that use vattn."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import typer

from vattn.cli.console import CONTROL, BadInput, CliError
from vattn.cli.options import to_float, to_int
from vattn.config import format_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from rich.console import Console, RenderableType
    from rich.table import Table

    from vattn.allocator.figures_page import ProcessFigures, Unreadable

    Look = tuple[list[ProcessFigures], list[Unreadable]]

_DEFAULT_INTERVAL_S = 1.0
_SHORTEST_INTERVAL_S = 0.05

Pid: TypeAlias = Annotated[
    int | None,
    typer.Argument(metavar="PID", parser=to_int, help="A process; default: all that use vattn."),
]
Interval: TypeAlias = Annotated[
    float | None,
    typer.Option(
        "--interval",
        metavar="SECONDS",
        parser=to_float,
        show_default=False,
        help="Time between two looks; default 1.",
    ),
]
Once: TypeAlias = Annotated[
    bool,
    typer.Option(
        "--once", help="Look once and end; default where stdout is no terminal and no interval set."
    ),
]
AsJson: TypeAlias = Annotated[
    bool, typer.Option("--json", help="Print each look as one line of JSON, sizes in bytes.")
]
Ranges: TypeAlias = Annotated[bool, typer.Option("--ranges", help="Show the ranges of addresses.")]


def top(
    pid: Pid = None,
    interval: Interval = None,
    once: Once = False,
    as_json: AsJson = False,
    ranges: Ranges = False,
) -> None:
    """Show pools, tags and ranges of running processes, live.

    The figures are read from outside: processes need no option, and notice nothing.

    Shown are those of the same user, and to root all. Ctrl-C ends it.
    """
    if interval is not None and once:
        raise BadInput(f"--interval {interval:g} has no meaning with --once; leave one of them out")
    if interval is not None and not interval >= _SHORTEST_INTERVAL_S:
        raise BadInput(f"--interval {interval:g} must be at least {_SHORTEST_INTERVAL_S:g} seconds")
    if pid is not None and pid <= 0:
        raise BadInput(f"PID {pid} must be at least 1")
    first = _look(pid)
    if once or (interval is None and not sys.stdout.isatty()):
        looks = iter([first])
    else:
        looks = _looks(first, pid, interval or _DEFAULT_INTERVAL_S)
    try:
        if as_json:
            _print_json(looks, ranges)
        elif not sys.stdout.isatty() or once:
            _print(looks, ranges)
        else:
            _show(looks, ranges)
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


def _look(pid: int | None) -> Look:
    from vattn.allocator import figures_page

    if pid is None:
        return figures_page.processes()
    try:
        return [figures_page.process(pid)], []
    except (ProcessLookupError, figures_page.NoFiguresError) as error:
        raise BadInput(f"{error}; `vattn top` shows all processes that can be looked at") from error
    except PermissionError as error:
        raise CliError(str(error)) from error


def _looks(first: Look, pid: int | None, interval_s: float) -> Iterator[Look]:
    """The first look and more of them, until the process of interest has ended."""
    from vattn.allocator import figures_page

    yield first
    while True:
        time.sleep(interval_s)
        if pid is None:
            yield figures_page.processes()
            continue
        try:
            yield [figures_page.process(pid)], []
        except (OSError, figures_page.NoFiguresError):
            return


# JSON ---------------------------------------------------------------------------------------------


def _print_json(looks: Iterator[Look], ranges: bool) -> None:
    for found, unreadable in looks:
        report = {
            "processes": [_as_dict(each, ranges) for each in found],
            "unreadable": [dataclasses.asdict(each) for each in unreadable],
        }
        typer.echo(json.dumps(report))


def _as_dict(figures: ProcessFigures, ranges: bool) -> dict[str, Any]:
    report = dataclasses.asdict(figures)
    for pool, entry in zip(figures.pools, report["pools"], strict=True):
        entry["other_bytes"] = pool.other_bytes
    if not ranges:
        del report["ranges"]
    return report


# For people ---------------------------------------------------------------------------------------


def _console() -> Console:
    from rich.console import Console

    return Console(highlight=False)


def _print(looks: Iterator[Look], ranges: bool) -> None:
    console = _console()
    for at, look in enumerate(looks):
        if at:
            console.print()
        console.print(render(*look, ranges=ranges))


def _show(looks: Iterator[Look], ranges: bool) -> None:
    from rich.live import Live

    console = _console()
    with Live(console=console, auto_refresh=False, screen=False) as live:
        for look in looks:
            live.update(render(*look, ranges=ranges), refresh=True)
    console.print("[dim]the process has ended[/]")


def render(
    found: Sequence[ProcessFigures], unreadable: Sequence[Unreadable], *, ranges: bool
) -> RenderableType:
    """Tables of processes, or a sentence if there is none.

    Args:
        found: what to show.
        unreadable: what to tell of in a line.
        ranges: show the ranges of addresses, too.
    """
    from rich.console import Group
    from rich.text import Text

    parts: list[RenderableType] = []
    for figures in found:
        if parts:
            parts.append("")
        title = Text(f"{figures.pid}", "bold", no_wrap=True, overflow="ellipsis")
        parts.append(title.append(f"  {_plain(figures.command)}", "not bold"))
        parts += _tables(figures, ranges)
    for each in unreadable:
        parts.append(Text(f"{each.pid}  {_plain(each.command)}: {each.reason}", "yellow"))
    if not parts:
        parts.append("no process that can be looked at has a pool of vattn now")
    return Group(*parts)


def _tables(figures: ProcessFigures, ranges: bool) -> Iterator[RenderableType]:
    names = _pool_names(figures)
    yield _table(
        ("pool", "budget", "exists", "free", "stale", "torch", "idle", "others", "failures"),
        [
            (
                names[i],
                format_bytes(pool.budget_bytes),
                format_bytes(pool.created_bytes),
                format_bytes(pool.free_bytes),
                format_bytes(pool.stale_bytes),
                format_bytes(pool.torch_mapped_bytes),
                format_bytes(pool.torch_idle_bytes),
                format_bytes(pool.other_bytes),
                str(pool.refused + pool.out_of_memory),
            )
            for i, pool in enumerate(figures.pools)
        ],
    )
    if figures.tags:
        yield _table(
            ("tag", "pool", "live", "peak", "mapped", "budget", "blocks", "state"),
            [
                (
                    _plain(tag.name),
                    names.get(tag.pool, "?"),
                    format_bytes(tag.live_bytes),
                    format_bytes(tag.peak_live_bytes),
                    format_bytes(tag.mapped_bytes),
                    "-" if tag.budget_bytes is None else format_bytes(tag.budget_bytes),
                    str(tag.blocks),
                    tag.state,
                )
                for tag in figures.tags
            ],
        )
    if ranges and figures.ranges:
        yield _table(
            ("range", "pool", "tag", "for", "stream", "reserved", "mapped"),
            [
                (
                    f"{each.address:#x}",
                    names.get(each.pool, "?"),
                    _plain(each.tag),
                    each.kind,
                    f"{each.stream:#x}" if each.stream else "default",
                    format_bytes(each.reserved_bytes),
                    format_bytes(each.mapped_bytes),
                )
                for each in figures.ranges
            ],
        )


def _pool_names(figures: ProcessFigures) -> dict[int, str]:
    """The names of drivers, numbered where one has several pools."""
    drivers = [pool.driver for pool in figures.pools]
    return {
        i: driver if drivers.count(driver) == 1 else f"{driver}/{drivers[:i].count(driver)}"
        for i, driver in enumerate(drivers)
    }


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """Text left, numbers right; figures are never cut, names are."""
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 1), pad_edge=False)
    for name in head:
        is_text = name in ("pool", "tag", "state", "range", "for", "stream")
        table.add_column(
            justify="left" if is_text else "right",
            no_wrap=True,
            overflow="ellipsis",
            min_width=4 if name == "tag" else None,
        )
    table.add_row(*(Text(name, "dim") for name in head))
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def _plain(text: str) -> str:
    """Another process's words, which must not steer the terminal."""
    return CONTROL.sub("", " ".join(text.split()))
