"""The README's GPU tables, those of the levels, and the plots, from committed results alone.

    python -m bench.report                # rewrites README.md, docs/levels.md and docs/images
    python -m bench.report --check                        # fails if they are not as it writes
    python -m bench.report --collect results/nvidia-h200  # takes over what a gpu-check measured
    python -m bench.report --suggest bench/results/nvidia-h200/layout.json

``--collect`` copies the stages that have something to show, without their logs and without paths of
the machine; then run it without arguments. Those are the stages that passed, and of benchmarks that
ran out of time or lost a part ("partial") what they had measured, each row with that status. One
that failed, was ended by a signal or was rehearsed on a CPU has no figures. ``--suggest`` says
which layout a result of bench.layout speaks for: the entry of vattn/kv/defaults.py.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from bench import report_levels, report_plots
from bench.common import Json
from bench.provenance import ROOT
from bench.report_files import StageFile, between, collect, gpu_folders, load
from bench.report_tables import UNMEASURED, render

BEGIN, END = "<!-- gpu-results:begin -->", "<!-- gpu-results:end -->"
IMAGES = "docs/images"


def load_all(root: Path) -> list[list[StageFile]]:
    """The files of every GPU that has any, by name of its folder."""
    results = root / "bench" / "results"
    return [files for folder in gpu_folders(results) if (files := load(folder, root))]


def block(gpus: Sequence[Sequence[StageFile]]) -> str:
    """What stands between the README's markers."""
    if not gpus:
        return UNMEASURED
    return "\n".join(
        render(files, [(t, f"{IMAGES}/{name}") for t, name, *_ in report_plots.plots_of(files)])
        for files in gpus
    )


def with_block(readme: str, text: str) -> str:
    """The README with that between its markers; see :func:`bench.report_files.between`."""
    return between(readme, (BEGIN, END), text, "the README")


def plot_names(gpus: Sequence[Sequence[StageFile]]) -> set[str]:
    """Of the files that the folder of images has to hold."""
    return {name for files in gpus for _, name, *_ in report_plots.plots_of(files)}


def problems(root: Path) -> list[str]:
    """What is not as :func:`update` would leave it; the contents of plots are not compared."""
    gpus = load_all(root)
    readme = (root / "README.md").read_text()
    found = []
    if with_block(readme, block(gpus)) != readme:
        found.append("README.md is not what the results say; run make report")
    names, there = plot_names(gpus), {p.name for p in (root / IMAGES).glob("gpu-*.svg")}
    found += [f"{IMAGES}/{name} is missing; run make report" for name in sorted(names - there)]
    found += [f"{IMAGES}/{name} has no result; run make report" for name in sorted(there - names)]
    return found + report_levels.problems(root)


def update(root: Path) -> None:
    """Writes the README's block and the plots, and removes plots whose results are gone."""
    gpus = load_all(root)
    path = root / "README.md"
    path.write_text(with_block(path.read_text(), block(gpus)))
    for files in gpus:
        report_plots.write(files, root / IMAGES)
    names = plot_names(gpus)
    for plot in (root / IMAGES).glob("gpu-*.svg"):
        if plot.name not in names:
            plot.unlink()
    report_levels.update(root)


def suggestion(path: Path) -> Json:
    """What a result of bench.layout speaks for.

    Raises:
        ValueError: the file is not one.
    """
    from bench.layout_choice import suggest

    document = json.loads(path.read_text())
    if "stage" in document:
        document = document["results"] or {}
    if document.get("benchmark") != "layout":
        raise ValueError(f"{path} is not a result of bench.layout")
    results = document["results"]
    return suggest(results["cells"], results["trace"]["layouts"])


def print_suggestion(path: Path) -> None:
    found = suggestion(path)
    choice = found["choice"]
    if choice is None:
        print(f"no layout: {found['reason']}")
        return
    entry = [choice[key] for key in ("order", "layers_per_region", "page_bytes")]
    print(f"LayoutDefault({', '.join(map(repr, entry))}, ...): {found['reason']}")
    print(f"speed {choice['speed']:.3f}, worst {choice['worst']:.3f}, live / physical ", end="")
    print(f"{choice['live_share']:.3f}, over {len(found['compared'])} points")


def main(argv: Sequence[str] | None = None, root: Path = ROOT) -> int:
    cli = argparse.ArgumentParser(
        prog="python -m bench.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = cli.add_mutually_exclusive_group()
    what.add_argument("--check", action="store_true", help="write nothing; fail if it would change")
    what.add_argument("--collect", type=Path, metavar="DIR", help="a folder that gpu-check wrote")
    what.add_argument("--suggest", type=Path, metavar="FILE", help="a layout.json")
    args = cli.parse_args(argv)
    try:
        if args.collect is not None:
            collect(args.collect, root / "bench" / "results")
        elif args.suggest is not None:
            print_suggestion(args.suggest)
        elif args.check:
            found = problems(root)
            print("\n".join(found) or "the tables and the plots are what the results say")
            return 1 if found else 0
        else:
            update(root)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
