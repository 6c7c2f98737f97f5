"""``python -m vattn.run``: programs run as Python runs them, and VATTN_ALLOCATOR decides."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

PROGRAM = """\
import atexit, os, sys
print(__name__, __file__, sys.argv, sys.path[0], sys.modules["__main__"].__dict__ is globals())
LATE = 5
atexit.register(lambda: print("at exit", LATE))
def fail():
    raise KeyError(sys.argv[1])
what = sys.argv[1:] and sys.argv[1]
if what == "error":
    fail()
if what == "cause":
    try:
        fail()
    except KeyError as error:
        raise ValueError("caused") from error
if what == "code":
    sys.exit(7)
if what == "text":
    sys.exit("goodbye")
if what == "hook":
    sys.excepthook = lambda kind, error, trace: print("hook", kind.__name__, trace.tb_lineno)
    fail()
"""


def python(
    *arguments: object, allocator: str | None = "0", cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if k != "VATTN_ALLOCATOR"}
    if allocator is not None:
        env["VATTN_ALLOCATOR"] = allocator
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(
        command, env=env, cwd=cwd, capture_output=True, text=True, timeout=120, check=False
    )


def assert_same(*arguments: object, cwd: Path | None = None, options: tuple[str, ...] = ()) -> None:
    """What `python ...` does and what it says, and nothing else."""
    expected = python(*options, *arguments, cwd=cwd)
    done = python(*options, "-m", "vattn.run", *arguments, cwd=cwd)
    assert (done.returncode, done.stdout, done.stderr) == (
        expected.returncode,
        expected.stdout,
        expected.stderr,
    )


@pytest.mark.parametrize("arguments", [(), ("a", "-m", "--b c"), ("code",), ("text",), ("hook",)])
def test_a_script_runs_as_python_runs_it(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    assert_same(tmp_path / "program.py", *arguments)
    assert_same("program.py", *arguments, cwd=tmp_path)


@pytest.mark.parametrize("what", ["error", "cause"])
def test_errors_look_as_python_shows_them(tmp_path: Path, what: str) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    assert_same(tmp_path / "program.py", what)
    (tmp_path / "bad.py").write_text("x = (\n")
    assert_same(tmp_path / "bad.py")


def test_modules_folders_and_archives(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM.replace("__file__, ", ""))
    assert_same("-m", "program", "one", "two", cwd=tmp_path)
    assert_same("-m", "program", "code", cwd=tmp_path)
    assert_same("-m", "program", "error", cwd=tmp_path)
    assert_same(tmp_path)  # without a __main__.py
    assert_same("-m", "json.tool", "--help")
    assert_same("-m", "no_such_module")
    assert_same("-m", "json.no_such_module")
    (tmp_path / "folder").mkdir()
    simple = "import sys\nprint(__name__, sys.argv)\nsys.exit(3)\n"
    (tmp_path / "folder" / "__main__.py").write_text(simple)
    assert_same(tmp_path / "folder", "x")
    with zipfile.ZipFile(tmp_path / "program.zip", "w") as archive:
        archive.writestr("__main__.py", simple)
    assert_same(tmp_path / "program.zip", "x")


def test_a_thread_outlives_the_script(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(
        "import pickle, sys, threading\n"
        "class Thing: pass\n"
        "def late():\n"
        "    threading.main_thread().join()\n"
        "    print(type(pickle.loads(pickle.dumps(Thing()))) is Thing)\n"
        "threading.Thread(target=late).start()\n"
    )
    assert_same(tmp_path / "program.py")
    assert_same("-m", "program", cwd=tmp_path)
    (tmp_path / "program.py").rename(tmp_path / "__main__.py")
    assert_same(tmp_path)


def test_a_link_finds_what_is_beside_its_target(tmp_path: Path) -> None:
    for folder in ("real", "links"):
        (tmp_path / folder).mkdir()
    (tmp_path / "real" / "beside.py").write_text("HERE = 3\n")
    program = tmp_path / "real" / "program.py"
    program.write_text("import sys, beside\nprint(beside.HERE, __file__, sys.path[0])\n")
    link = tmp_path / "links" / "other.py"
    link.symlink_to(program)
    assert_same(link)
    assert_same("other.py", cwd=tmp_path / "links")


@pytest.mark.parametrize("option", ["-P", "-u"])
def test_options_of_python(tmp_path: Path, option: str) -> None:
    """With -P neither the script's folder nor the working directory is searched."""
    program = tmp_path / "program.py"
    program.write_text(
        "import sys\nprint([p for p in sys.path if 'zip' not in p][:2], sys.flags.unbuffered)\n"
        "import beside\n"
    )
    (tmp_path / "beside.py").write_text("")
    assert_same(program, options=(option,))
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "__main__.py").write_text("import sys\nprint(sys.path, __file__, __spec__.name)\n")
    assert_same(folder, options=(option,))
    assert_same("folder", "x", options=(option,), cwd=tmp_path)


def test_an_interrupt_looks_as_python_shows_it(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text("def wait():\n    raise KeyboardInterrupt\nwait()\n")
    assert_same(program)
    assert_same("-m", "program", cwd=tmp_path)
    program.write_text(
        "import sys\n"
        "sys.excepthook = lambda kind, error, trace: print(kind, trace.tb_lineno)\n"
        "raise KeyboardInterrupt\n"
    )
    assert_same(program)


@pytest.mark.parametrize(
    "arguments", [(), ("-c", "pass"), ("-",), ("-u", "x.py"), ("-m",), ("-h",)]
)
def test_a_bad_command_line_is_explained(arguments: tuple[str, ...]) -> None:
    done = python("-m", "vattn.run", *arguments)
    assert done.returncode == 2
    assert "usage: python -m vattn.run" in done.stderr
    assert "python -u -m vattn.run script.py" in done.stderr


def test_a_missing_script_is_an_error(tmp_path: Path) -> None:
    done = python("-m", "vattn.run", tmp_path / "none.py")
    assert done.returncode == 2
    assert "No such file" in done.stderr
    assert "none.py" in done.stderr


@pytest.mark.parametrize("value", ["", "yes", "2"])
def test_a_bad_switch_is_an_error(tmp_path: Path, value: str) -> None:
    (tmp_path / "program.py").write_text("print('ran')")
    done = python("-m", "vattn.run", tmp_path / "program.py", allocator=value)
    assert (done.returncode, done.stdout) == (2, "")
    assert f"VATTN_ALLOCATOR={value!r}" in done.stderr


@pytest.mark.parametrize("value", ["1", None])
def test_the_allocator_is_enabled_before_the_program(tmp_path: Path, value: str | None) -> None:
    """With torch replaced by the fake one, which has CUDA; without it, the reason is told."""
    program = tmp_path / "program.py"
    program.write_text("from vattn import allocator\nprint(allocator.is_enabled())\n")
    start = tmp_path / "start.py"
    start.write_text(
        "import sys\n"
        "from tests.fake_torch import install\n"
        "install()\n"
        f"sys.argv = ['run', {str(program)!r}]\n"
        "from vattn.run import main\n"
        "main()\n"
    )
    root = Path(__file__).resolve().parents[1]
    done = python("-c", f"exec(open({str(start)!r}).read())", allocator=value, cwd=root)
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr
    done = python("-c", f"exec(open({str(start)!r}).read())", allocator="0", cwd=root)
    assert (done.returncode, done.stdout) == (0, "False\n"), done.stderr


def test_a_torch_without_cuda_is_told(tmp_path: Path) -> None:
    import torch

    if torch.version.cuda is not None:
        pytest.skip("this torch is built with CUDA")
    program = tmp_path / "program.py"
    program.write_text("print('ran')")
    done = python("-m", "vattn.run", program, allocator=None)
    assert (done.returncode, done.stdout) == (2, "")
    assert "built without CUDA" in done.stderr
    assert "VATTN_ALLOCATOR=0" in done.stderr
