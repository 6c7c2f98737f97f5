"""Runs a Python program with all of its CUDA memory from vattn: ``python -m vattn.run script.py``.

``python -m vattn.run script.py ARGUMENTS`` and ``python -m vattn.run -m module ARGUMENTS`` do what
``python`` does without the ``-m vattn.run``, after :func:`vattn.allocator.enable`.

Environment:
    VATTN_ALLOCATOR: 1, or not set, for that; 0 runs the program as it is.
    VATTN_BUDGET: most physical memory of each device, such as ``40GiB``.
"""

from __future__ import annotations

import io
import os
import pkgutil
import runpy
import sys
import zipfile
from types import CodeType, ModuleType, TracebackType
from typing import Any, NoReturn

_USAGE = """\
usage: python -m vattn.run [-m module | script.py] [argument ...]
Options of Python come first, as in `python -u -m vattn.run script.py`. Programs on the command line
(-c) or the standard input (-) are not run: put them in a file."""
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
    try:
        if as_module:
            # sys.path[0] is the working directory already, as `python -m` has it.
            sys.argv = ["-m", *arguments[1:]]
            _run_as_main(target, alter_argv=True)
        else:
            sys.argv = arguments
            _run_script(target)
    except SystemExit:
        raise
    except KeyboardInterrupt as error:
        _show_from_below_us(error)
        raise  # for Python's exit code
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


def _run_as_main(name: str, *, alter_argv: bool) -> None:
    """Runs a module as the interpreter itself does, which calls this function of runpy for it."""
    _new_main()
    python: Any = runpy
    python._run_module_as_main(name, alter_argv)


def _run_script(path: str) -> None:
    if os.path.isdir(path) or (os.path.isfile(path) and zipfile.is_zipfile(path)):
        # A folder or an archive with a __main__.py: it comes first, whatever the options.
        sys.path[0 : _own_places()] = [os.path.abspath(path)]
        _run_as_main("__main__", alter_argv=False)
        return
    code = _read(path)
    if _own_places():
        sys.path[0] = os.path.dirname(os.path.realpath(path))  # of a link's target
    module = _new_main()
    module.__file__ = os.path.abspath(path)
    module.__dict__["__cached__"] = None
    exec(code, module.__dict__)


def _own_places() -> int:
    """How many places of sys.path Python took for us: none with -P, -I or PYTHONSAFEPATH."""
    return 0 if sys.flags.safe_path else 1


def _new_main() -> ModuleType:
    """The program's module, instead of ours.

    It stays when the program is done: threads and exit functions may need its names.
    """
    module = ModuleType("__main__")
    module.__dict__["__builtins__"] = sys.modules["builtins"]
    sys.modules["__main__"] = module
    return module


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


def _show_from_below_us(error: BaseException) -> None:
    """Has an error that goes on to Python, gathering our frames again, reported without them."""
    below, hook = _below_us(error.__traceback__), sys.excepthook

    def report(kind: Any, value: BaseException, traceback: TracebackType | None) -> None:
        if value is error:
            value, traceback = value.with_traceback(below), below
        hook(kind, value, traceback)

    sys.excepthook = report


def _below_us(traceback: TracebackType | None) -> TracebackType | None:
    while traceback is not None and traceback.tb_frame.f_code.co_filename == __file__:
        traceback = traceback.tb_next
    return traceback


def _refuse(message: str) -> NoReturn:
    print(f"vattn.run: {message}", file=sys.stderr)
    sys.exit(_BAD_USE)


if __name__ == "__main__":
    main()
