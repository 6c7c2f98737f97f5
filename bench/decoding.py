"""Ways of decoding: what structured output, drafts, penalties and beams cost, and what they save.

    python -m bench.decoding                        # all sections, some minutes
    python -m bench.decoding --section beams        # repeatable
    python -m bench.decoding --small                # at the smallest, to see that it runs
    python -m bench.decoding --save                 # into bench/results/cpu/decoding.json

Sections, each of which is described in its own module:

structured   a JSON schema for every sequence against none (`bench.decoding_structured`)
speculation  drafts by prompt lookup and by a draft model against none
             (`bench.decoding_speculation`)
penalties    penalties, biases and log probabilities for all against plain greedy
             (`bench.decoding_penalties`)
beams        memory, copies and time of beam search (`bench.decoding_beams`)

Everything is on the CPU, with models that are made here or packaged. What is compared takes turns.
Torch has one thread unless told otherwise: the masks of structured output are made by a thread of
their own, which on a GPU machine has the CPU nearly to itself.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from bench import decoding_beams, decoding_penalties, decoding_speculation, decoding_structured
from bench.common import RESULTS, Json, Target, parser, print_targets, report, write_json

SAVED = RESULTS / "cpu" / "decoding.json"


@dataclass(frozen=True)
class Section:
    """A part of the benchmark: what measures, what prints, and what it should find."""

    run: Callable[[bool], Json]  # True: at its smallest
    print_results: Callable[[Json], None]
    make_targets: Callable[[Json], list[Target]]


SECTIONS = {
    name: Section(module.run, module.print_results, module.make_targets)
    for name, module in {
        "structured": decoding_structured,
        "speculation": decoding_speculation,
        "penalties": decoding_penalties,
        "beams": decoding_beams,
    }.items()
}


def main(argv: Sequence[str] | None = None) -> int:
    cli = parser("bench.decoding", __doc__)
    cli.add_argument(
        "--section", action="append", choices=SECTIONS, help="repeatable; default: all"
    )
    cli.add_argument("--small", action="store_true", help="at the smallest, for CI")
    cli.add_argument("--save", action="store_true", help=f"write {SAVED.name} of bench/results/cpu")
    cli.add_argument("--threads", type=int, default=1, help="of torch")
    args = cli.parse_args(argv)
    if args.save and (args.small or args.section):
        cli.error("--save is for all sections at full size; use --json FILE")
    threads = torch.get_num_threads()
    torch.set_num_threads(args.threads)
    try:
        document = measure(args.section or list(SECTIONS), args.small)
    finally:
        torch.set_num_threads(threads)
    for path in filter(None, [args.json, SAVED if args.save else None]):
        write_json(path, document)
    return 0


def measure(names: Sequence[str], small: bool) -> Json:
    """Runs and prints sections; the document that is saved of them."""
    results: dict[str, Json] = {}
    targets: list[Target] = []
    for name in dict.fromkeys(names):
        section = SECTIONS[name]
        results[name] = section.run(small)
        section.print_results(results[name])
        targets += [] if small else section.make_targets(results[name])
        gc.collect()  # engines of one section give their memory back before the next
    print_targets(targets)
    settings = {
        "sections": list(results),
        "small": small,
        "threads": torch.get_num_threads(),
    }
    return report("decoding", settings, results, targets)


if __name__ == "__main__":
    raise SystemExit(main())
