"""The comparison of contiguous with paged memory, level by level.

    python -m bench kernels                     # attention alone
    python -m bench memory --trace FILE         # bytes and driver calls, no model
    python -m bench offline                     # requests per minute through the engine
    python -m bench serving                     # arrivals in time, latencies, goodput
    python -m bench allocator                   # PyTorch's memory
    python -m bench ablations                   # our own choices, one by one
    python -m bench peers                       # transformers, vLLM, nano-vllm, where installed
    python -m bench kernels --preset paper-prefill
    python -m bench kernels --small             # seconds, to see that it runs

Each prints tables, and writes a JSON file with --json and a plot with --plot. The full setting of
the device is the default. docs/benchmarks.md has the method and a reading of the results.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from bench.common import Budget, Json, Target
from bench.levels import registry
from bench.levels.level import Level, absent_table, published_table
from bench.levels.plot import write_plot
from bench.partial import Partial
from bench.provenance import gpu_missing


def make_parser(level: Level) -> argparse.ArgumentParser:
    """Of one level, with the arguments that all have."""
    cli = argparse.ArgumentParser(
        prog=f"python -m bench {level.name}",
        description=level.summary,
        epilog="\n".join(f"{name}: {p.help}" for name, p in level.presets.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    cli.add_argument("--json", type=Path, metavar="FILE", help="write the results there")
    cli.add_argument("--plot", type=Path, metavar="FILE.svg", help="draw them there")
    cli.add_argument("--small", action="store_true", help="seconds, to see that it runs")
    cli.add_argument("--preset", choices=sorted(level.presets), help="settings; see below")
    cli.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda where there is one")
    cli.add_argument("--budget-s", type=float, help="seconds after which nothing new is begun")
    level.add_arguments(cli)
    return cli


def parse(level: Level, argv: Sequence[str]) -> argparse.Namespace:
    """The arguments, what was not given filled in from preset and defaults."""
    cli = make_parser(level)
    args = cli.parse_args(argv)
    if args.device is None:
        args.device = "cpu" if gpu_missing() else "cuda"
    elif args.device == "cuda" and (reason := gpu_missing()):
        cli.error(f"--device cuda: {reason}")
    defaults = dict(level.defaults[args.device])
    preset = level.presets.get(args.preset) if args.preset else None
    if preset is not None:
        defaults |= preset.settings[args.device]
    if args.small:
        defaults |= level.small
        if preset is not None:
            defaults |= preset.small
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.budget = Budget(args.budget_s)
    return args


def settings_of(args: argparse.Namespace) -> Json:
    """The arguments as a result says them."""
    left_out = ("json", "plot", "budget")
    settings = {k: v for k, v in vars(args).items() if k not in left_out}
    return settings | {"threads": torch.get_num_threads()}


def print_results(level: Level, results: Json) -> None:
    """Every table of a level, the figures of others, and what is absent."""
    for table in level.tables(results):
        table.print()
    if results.get("published"):
        published_table(results["published"]).print()
    if results.get("absent"):
        absent_table(results["absent"]).print()
    if results.get("cut_for_time"):
        print(f"no time for: {', '.join(results['cut_for_time'])}")


def run(level: Level, argv: Sequence[str]) -> int:
    """Measures, prints, writes; the exit code is 1 if something failed or was not measured."""
    args = parse(level, argv)
    settings = settings_of(args)

    def targets(results: Json) -> list[Target]:
        return [] if args.small else list(level.targets(settings, results))

    out = Partial(args.json, level.name, settings, targets)
    if args.preset:
        published = level.presets[args.preset].published
        out.set(preset=args.preset, published=[asdict(figure) for figure in published])
    level.measure(args, out)
    out.set(cut_for_time=args.budget.cut, seconds=args.budget.spent_s)
    print_results(level, out.results)
    if args.plot is not None and write_plot(level, out.results, args.plot):
        print(f"wrote {args.plot}")
    return out.end(rows=level.rows)


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    cli = argparse.ArgumentParser(
        prog="python -m bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    cli.add_argument("level", choices=registry.NAMES)
    name = cli.parse_args(words[:1]).level
    return run(registry.load(name), words[1:])


if __name__ == "__main__":
    raise SystemExit(main())
