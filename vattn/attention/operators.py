"""Finding kernels of other packages, and checking that they take the arguments we know.

Their interfaces move. Every kernel is called by argument names, and its signature is compared once,
when it is loaded, so that a build we do not know is refused instead of misunderstood.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

Kernel = Callable[..., Any]


class Unavailable(Exception):
    """A kernel is not installed or not one that we know; the message is the reason."""


def bind(
    name: str, kernel: Kernel, passed: str, constants: Mapping[str, Any] | None = None
) -> Kernel:
    """A kernel that needs no more than the arguments ``passed``, by name.

    Args:
        name: of the kernel, for messages.
        kernel: an operator of torch or a Python function.
        passed: names of what callers will pass, with spaces between.
        constants: values of further arguments, where the kernel has them.

    Raises:
        Unavailable: it lacks an argument, or demands one that is not known here.
    """
    parameters, names = _parameters(kernel), passed.split()
    missing = [argument for argument in names if argument not in parameters]
    if missing:
        raise Unavailable(f"{name} has no argument {', '.join(missing)}")
    fixed = {key: value for key, value in (constants or {}).items() if key in parameters}
    for parameter, default in parameters.items():
        if parameter in names or parameter in fixed or default is _DEFAULT:
            continue
        if default is _REQUIRED:
            raise Unavailable(f"{name} demands {parameter}, which vattn does not know")
        fixed[parameter] = None
    return functools.partial(kernel, **fixed)


def takes(kernel: Kernel, names: str) -> bool:
    """Whether a kernel, as it is or as :func:`bind` returns it, has all of these arguments."""
    inner = kernel.func if isinstance(kernel, functools.partial) else kernel
    return _parameters(inner).keys() >= set(names.split())


_REQUIRED, _OPTIONAL, _DEFAULT = object(), object(), object()


def _parameters(kernel: Kernel) -> dict[str, object]:
    """Names of a kernel's arguments, each with whether it must be given.

    In an operator's schema an argument may be optional in type without having a default.
    """
    schema = _schema(kernel)
    if schema is None:
        signature = inspect.signature(kernel).parameters
        return {
            name: _REQUIRED if p.default is inspect.Parameter.empty else _DEFAULT
            for name, p in signature.items()
        }
    return {
        argument.name: _DEFAULT
        if argument.has_default_value()
        else _OPTIONAL
        if argument.type.kind() == "OptionalType"
        else _REQUIRED
        for argument in schema.arguments
    }


def _schema(kernel: Any) -> Any:
    """The schema of an operator, a packet of one, or a custom operator; None of a function."""
    for source in (kernel, getattr(kernel, "default", None), getattr(kernel, "_opoverload", None)):
        schema = getattr(source, "_schema", None)
        if schema is not None:
            return schema
    return None


def python_function(module: str, name: str) -> Kernel:
    """A function of an installed package.

    Raises:
        Unavailable: the package is not installed, does not load, or has no such function.
    """
    try:
        loaded = importlib.import_module(module)
    except (ImportError, OSError, RuntimeError) as error:
        raise Unavailable(f"{module} does not load: {error}") from error
    function: Kernel | None = getattr(loaded, name, None)
    if function is None:
        raise Unavailable(f"{module} has no {name}")
    return function


def library_operator(package: str, file: str, namespace: str, name: str) -> Kernel:
    """An operator in a shared library of an installed package, without importing the package.

    Args:
        package: top-level.
        file: below the package's folder; ``*`` matches.
        namespace: of the operator.
        name: of the operator.

    Raises:
        Unavailable: the package is not installed, or its library does not load or lacks it.
    """
    spec = importlib.util.find_spec(package)
    folders = [] if spec is None else list(spec.submodule_search_locations or ())
    if not folders:
        raise Unavailable(f"{package} is not installed")
    files = [path for folder in folders for path in sorted(Path(folder).glob(file))]
    if not files:
        raise Unavailable(f"{package} has no {file}")
    try:
        torch.ops.load_library(files[0])  # type: ignore[no-untyped-call]
        operator: Kernel = getattr(getattr(torch.ops, namespace), name)
    except (AttributeError, OSError, RuntimeError) as error:
        raise Unavailable(f"{files[0].name} does not load: {error}") from error
    return operator
