"""Runs a Python program with all of its CUDA memory from vattn: ``python -m vattn.run script.py``.

``python -m vattn.run script.py ARGUMENTS`` and ``python -m vattn.run -m module ARGUMENTS`` do what
``python`` does without the ``-m vattn.run``, after :func:`vattn.allocator.enable`.

Environment:
    VATTN_ALLOCATOR: 1, or not set, for that; 0 runs the program as it is.
    VATTN_BUDGET: most physical memory of each device, such as ``40GiB``.
"""

from __future__ import annotations

import importlib.util
import io
import os
import pkgutil
import runpy
import sys
import zipfile
from types import CodeType, ModuleType, TracebackType
from typing import NoReturn

_USAGE = "usage: python -m vattn.run [-m module | script.py] [argument ...]"
# What Python itself exits with when it cannot find what it is to run.
_BAD_USE = 2


def main() -> None:
    """Runs what the command line names; see the module."""
    arguments = sys.argv[1:]
    as_module = arguments[:1] == ["-m"]
    if as_module:
        arguments = arguments[1:]
    if not arguments or arguments[0].startswith("-"):
        _refuse(f"{_USAGE}\n(got {' '.join(sys.argv[1:]) or 'nothing'})")
    if _wanted():
        _enable()
    target = arguments[0]
    sys.argv = arguments
    try:
        if as_module:
            _run_module(target)
        else:
            _run_script(target)
    except (SystemExit, KeyboardInterrupt):
        raise
    except BaseException as error:
        _show(error)
        sys.exit(1)


def _wanted() -> bool:
    value = os.environ.get("VATTN_ALLOCATOR", "1")
    if value not in ("0", "1"):
        _refuse(f"VATTN_ALLOCATOR={value!r} must be 1, for vattn's allocator, or 0")
    return value == "1"


def _enable() -> None:
    from vattn import allocator

    try:
        allocator.enable()
    except (RuntimeError, ValueError) as error:
        _refuse(f"{error}\n(VATTN_ALLOCATOR=0 runs the program without vattn's allocator)")


def _run_module(name: str) -> None:
    # sys.path[0] is the working directory already, as `python -m` has it.
    try:
        found = importlib.util.find_spec(name)
    except ModuleNotFoundError:
        found = None  # a package that it would be in
    if found is None:
        print(f"{sys.executable}: No module named {name}", file=sys.stderr)
        sys.exit(1)
    runpy.run_module(name, run_name="__main__", alter_sys=True)


def _run_script(path: str) -> None:
    if os.path.isdir(path) or (os.path.isfile(path) and zipfile.is_zipfile(path)):
        # A folder or an archive with a __main__.py, which takes the first place of sys.path.
        sys.path.pop(0)
        runpy.run_path(path, run_name="__main__")
        return
    code = _read(path)
    path = os.path.abspath(path)
    sys.path[0] = os.path.dirname(path)
    # The module stays when the script is done: threads and exit functions may need its names.
    module = ModuleType("__main__")
    module.__file__ = path
    module.__dict__["__builtins__"] = sys.modules["builtins"]
    module.__dict__["__cached__"] = None
    sys.modules["__main__"] = module
    exec(code, module.__dict__)


def _read(path: str) -> CodeType:
    """The code of a script, source or compiled."""
    try:
        with io.open_code(os.path.abspath(path)) as file:
            code: CodeType | None = pkgutil.read_code(file)
        if code is not None:
            return code
        with io.open_code(os.path.abspath(path)) as file:
            source = file.read()
    except OSError as error:
        _refuse(f"can't open file {path!r}: [Errno {error.errno}] {error.strerror}")
    try:
        return compile(source, os.path.abspath(path), "exec")
    except SyntaxError as error:
        _show(error)
        sys.exit(1)


def _show(error: BaseException) -> None:
    """Reports an error that ends the program as Python does, from the program's first line on."""
    error = error.with_traceback(_below_us(error.__traceback__))
    sys.excepthook(type(error), error, error.__traceback__)


def _below_us(traceback: TracebackType | None) -> TracebackType | None:
    ours = (__file__, runpy.__file__, "<frozen runpy>")
    while traceback is not None and traceback.tb_frame.f_code.co_filename in ours:
        traceback = traceback.tb_next
    return traceback


def _refuse(message: str) -> NoReturn:
    print(f"vattn.run: {message}", file=sys.stderr)
    sys.exit(_BAD_USE)


if __name__ == "__main__":
    main()
