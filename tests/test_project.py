"""Rules that hold for the repository as a whole: layers, version, size, no leftovers."""

import ast
import re
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import vattn

ROOT = Path(__file__).resolve().parent.parent

# Each module of vattn may import its own layer and those above it in this list. A package stands
# for all that is in it; "vattn" is the package's own __init__, which re-exports the rest.
PYTHON_LAYERS = (
    {
        "vattn._core",
        "vattn.config",
        "vattn.logs",
        "vattn.metrics",
        "vattn.models",
        "vattn.outputs",
        "vattn.request",
        "vattn.sampling_params",
        "vattn.structural_tag",
        "vattn.texts",
        "vattn.tracing",
        "vattn.version",
    },
    {"vattn.kv"},
    {"vattn.attention", "vattn.hf", "vattn.virtual_tensor"},
    {"vattn.engine"},
    {"vattn.llm"},
    {"vattn.engine_process"},
    {"vattn.async_llm"},
    {"vattn.server"},
    {"vattn", "vattn.allocator", "vattn.cli", "vattn.run"},
)
NO_TORCH = (
    "vattn/engine/beams.py",
    "vattn/engine/gangs.py",
    "vattn/engine/lifecycle.py",
    "vattn/engine/policy.py",
    "vattn/engine/running.py",
    "vattn/engine/scheduler.py",
    "vattn/engine/speculation/config.py",
    "vattn/engine/speculation/counts.py",
    "vattn/engine/speculation/proposer.py",
    "vattn/engine/steps.py",
    "vattn/engine/trace.py",
    "vattn/engine/waiting.py",
    "vattn/engine/wrapping.py",
    "vattn/kv/prefix.py",
    "vattn/metrics.py",
    "vattn/outputs.py",
    "vattn/request.py",
    "vattn/sampling_params.py",
    "vattn/tracing.py",
)

# A file of csrc/ may include its own header and those of the layers before its own.
CSRC_LAYERS = (
    {"call_trace", "errors", "index_set", "row_set", "stats_page"},
    {"driver"},
    {"cuda_api"},
    {"cuda_driver", "host_driver"},
    {"page_pool"},
    {"region"},
    {"slots", "dlpack_export", "virtual_range"},
    {"mapper"},
    {"bindings"},
)
# Nothing above driver.h knows which driver it is on; only the bindings choose one.
CONCRETE_DRIVERS = {"cuda_api", "cuda_driver", "host_driver"}

MAX_FILE_BYTES = 4_200_000
MAX_TREE_BYTES = 8 << 20
SOURCE_SUFFIXES = {".cpp", ".h", ".py", ".pyi", ".toml", ".yaml", ".yml"}
SOURCE_NAMES = {"CMakeLists.txt", "Makefile", "run"}


def python_layer(module: str) -> int | None:
    """The index of the layer that holds `module` of vattn, None if no layer names it."""
    component = ".".join(module.split(".")[:2])
    return next((i for i, layer in enumerate(PYTHON_LAYERS) if component in layer), None)


def module_name(path: Path) -> str:
    """`vattn/kv/__init__.py` is `vattn.kv`."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def is_module(name: str) -> bool:
    """Whether the dotted name is a module of this repository, the native one included."""
    path = ROOT.joinpath(*name.split("."))
    return path.is_dir() or any(path.with_suffix(end).exists() for end in (".py", ".pyi"))


def imported_modules(path: Path) -> Iterator[str]:
    """Full names of the modules that a Python file imports, anywhere in it."""
    package = module_name(path).split(".")
    if path.name != "__init__.py":
        package.pop()
    for node in ast.walk(ast.parse(path.read_text(), filename=str(path))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                name = f"{source}.{alias.name}"
                yield name if is_module(name) else source


def python_files(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def test_imports_point_downward() -> None:
    upward = []
    for path in python_files("vattn"):
        module = module_name(path)
        layer = python_layer(module)
        assert layer is not None, f"{module} has no place in PYTHON_LAYERS"
        for imported in imported_modules(path):
            if imported.split(".")[0] != "vattn":
                continue
            target = python_layer(imported)
            if target is None or target > layer:
                upward.append(f"{module} imports {imported}")
    assert upward == []


def test_package_needs_no_bench_and_no_tests() -> None:
    outside = [
        f"{module_name(path)} imports {imported}"
        for path in python_files("vattn")
        for imported in imported_modules(path)
        if imported.split(".")[0] in {"bench", "examples", "tests"}
    ]
    assert outside == []


def test_policy_imports_no_torch() -> None:
    """Scheduler and prefix index decide on integers, as soon as they exist."""
    for path in filter(Path.exists, (ROOT / name for name in NO_TORCH)):
        assert not any(m.split(".")[0] == "torch" for m in imported_modules(path)), path


def csrc_unit(stem: str) -> str:
    """The name in CSRC_LAYERS that a file belongs to: `slots_fork` is a part of `slots`."""
    units = {unit for layer in CSRC_LAYERS for unit in layer}
    return next((unit for unit in units if stem == unit or stem.startswith(f"{unit}_")), stem)


def test_includes_point_downward() -> None:
    layer_of = {unit: i for i, layer in enumerate(CSRC_LAYERS) for unit in layer}
    wrong = []
    for path in sorted([*(ROOT / "csrc").glob("*.cpp"), *(ROOT / "csrc").glob("*.h")]):
        unit = csrc_unit(path.stem)
        assert unit in layer_of, f"csrc/{path.name} has no place in CSRC_LAYERS"
        for header in re.findall(r'^\s*#\s*include\s+"([^"]+)"', path.read_text(), re.MULTILINE):
            target = csrc_unit(Path(header).stem)
            if target == unit:
                continue
            is_lower = layer_of.get(target, len(CSRC_LAYERS)) < layer_of[unit]
            may_choose = unit == "bindings" or unit in CONCRETE_DRIVERS
            if not is_lower or (target in CONCRETE_DRIVERS and not may_choose):
                wrong.append(f"csrc/{path.name} includes {header}")
    assert wrong == []


def test_version_is_stated_once() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert vattn.__version__ == project["version"]


def git_files(*options: str) -> list[Path]:
    """Files of the checkout that git names, without those removed from the working tree."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    command = ["git", "ls-files", "-z", *options]
    names = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return [path for name in names.split("\0") if name and (path := ROOT / name).is_file()]


def test_repository_is_small() -> None:
    sizes = {path: path.stat().st_size for path in git_files()}
    large = {str(path.relative_to(ROOT)): n for path, n in sizes.items() if n > MAX_FILE_BYTES}
    assert large == {}
    assert sum(sizes.values()) < MAX_TREE_BYTES


def test_sources_have_no_leftovers() -> None:
    marker = re.compile(r"\b(TO" + r"DO|FIX" + r"ME)\b")
    files = [
        path
        for path in git_files("--cached", "--others", "--exclude-standard")
        if (path.suffix in SOURCE_SUFFIXES or path.name in SOURCE_NAMES)
        and not path.is_relative_to(ROOT / "tests" / "data")
    ]
    leftovers = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in files
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if marker.search(line)
    ]
    assert leftovers == []
