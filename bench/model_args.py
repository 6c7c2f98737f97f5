"""The arguments that the benchmarks of a whole model share, and the model that they name."""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from bench.common import Budget, Json, counts, parser
from bench.provenance import gpu_missing
from bench.shapes import DTYPES, SHAPES, Shape, build_model
from vattn.attention.select import BACKENDS
from vattn.hf.model import LoadedModel, load_model

LEAST_FOR_P99 = 20
COMPILE_HELP = "seconds that compiling may take; with less left of --budget-s it is not begun"


def model_parser(module: str, description: str | None) -> argparse.ArgumentParser:
    """With --json, --device, --shape, --dtype, --backend and --budget-s."""
    cli = parser(module, description)
    cli.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda where there is one")
    cli.add_argument("--shape", choices=sorted(SHAPES), help="of the model")
    cli.add_argument("--dtype", choices=sorted(DTYPES))
    cli.add_argument("--backend", choices=list(BACKENDS), help="default: the engine's choice")
    cli.add_argument("--budget-s", type=float, help="seconds after which nothing new is begun")
    return cli


def parse(
    cli: argparse.ArgumentParser, argv: Sequence[str] | None, defaults: Mapping[str, Json]
) -> argparse.Namespace:
    """The arguments, what was not given filled in from the device's defaults."""
    args = cli.parse_args(argv)
    if args.device is None:
        args.device = "cpu" if gpu_missing() else "cuda"
    elif args.device == "cuda" and (reason := gpu_missing()):
        cli.error(f"--device cuda: {reason}")
    for name, value in defaults[args.device].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args


def settings_of(args: argparse.Namespace) -> Json:
    """The arguments as a result says them."""
    settings = {k: v for k, v in vars(args).items() if k != "json"}
    return settings | {"model": SHAPES[args.shape].as_json(), "threads": torch.get_num_threads()}


def load_shape(args: argparse.Namespace, positions: int) -> LoadedModel:
    """The model of a shape with random weights, its attention taken over.

    Args:
        args: after :func:`parse`.
        positions: longest sequence in tokens.
    """
    model = build_model(SHAPES[args.shape], args.device, DTYPES[args.dtype], positions)
    return load_model(model)


def shape_of(args: argparse.Namespace) -> Shape:
    """The shape that ``--shape`` names."""
    return SHAPES[args.shape]


def has_time(budget: Budget, what: str, needed_s: float = 0.0) -> bool:
    """Whether there is time for ``what``, which takes so many seconds that cannot be cut short."""
    if budget.seconds is not None and budget.spent_s + needed_s > budget.seconds:
        budget.cut.append(what)
        return False
    return True


def points(text: str) -> list[tuple[int, int]]:
    """``"1x1K,64x2K"``: pairs of positive integers, K is 1024."""
    found = []
    for part in text.split(","):
        numbers = [n for word in part.split("x") for n in counts(word)]
        if len(numbers) != 2:
            raise argparse.ArgumentTypeError(f"{part!r} is not two numbers such as 64x2K")
        found.append((numbers[0], numbers[1]))
    return found


def names(known: Sequence[str]) -> Callable[[str], list[str]]:
    """An argument type: some of these names, separated by commas."""

    def read(text: str) -> list[str]:
        chosen = text.split(",")
        if unknown := [name for name in chosen if name not in known]:
            raise argparse.ArgumentTypeError(f"{unknown[0]!r} is not one of {', '.join(known)}")
        return chosen

    return read


def release(device: str) -> None:
    """Gives back what was held by objects that are gone."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def quantiles(values: Any, unit: float = 1.0) -> Json:
    """Median, p99 and mean of some numbers in a unit; None without any.

    p99 is None below 20 numbers, of which it would be little but the largest.
    """
    tensor = torch.as_tensor(list(values), dtype=torch.float64) / unit
    if not len(tensor):
        return {"p50": None, "p99": None, "mean": None}
    p50, p99 = torch.quantile(tensor, torch.tensor([0.5, 0.99], dtype=torch.float64)).tolist()
    enough = len(tensor) >= LEAST_FOR_P99
    return {"p50": p50, "p99": p99 if enough else None, "mean": float(tensor.mean())}
