"""Whether the native module is what its sources would give.

    python -m bench.gpu.native    # notes, after a build, what it was built from

A copy of the tree may have new times for old files, so what was built is known by contents; only
without a note of them do times decide.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from pathlib import Path

from bench.provenance import ROOT

NOTE = ROOT / "build" / "native-sources.json"


def sources() -> list[Path]:
    """All that the module is built from."""
    folders = [ROOT / "csrc", ROOT / "allocator"]
    found = [path for folder in folders for kind in ("*.cpp", "*.h") for path in folder.glob(kind)]
    return [ROOT / "CMakeLists.txt", *sorted(found)]


def digest(paths: list[Path]) -> str:
    """Of names and contents."""
    found = hashlib.sha256()
    for path in paths:
        content = hashlib.sha256(path.read_bytes()).hexdigest()
        found.update(f"{path.name} {content}\n".encode())
    return found.hexdigest()


def note_build(module: Path, note: Path = NOTE) -> None:
    """Writes that this module was built from the sources as they are now."""
    note.parent.mkdir(parents=True, exist_ok=True)
    note.write_text(json.dumps({"sources": digest(sources()), "module": digest([module])}) + "\n")


def native_module_problem(note: Path = NOTE) -> str | None:
    """Why the native module has to be built; None if it is there and of its sources."""
    try:
        module = find_module()
    except ImportError as error:
        return f"vattn cannot be imported: {error}"
    if module is None:
        return "vattn._core is not built"
    noted = _read(note)
    if noted.get("module") == digest([module]):
        if noted.get("sources") == digest(sources()):
            return None
        return "the sources are not those that vattn._core was built from"
    newest = max(sources(), key=lambda path: path.stat().st_mtime)
    if newest.stat().st_mtime > module.stat().st_mtime:
        return f"{newest.relative_to(ROOT)} is newer than vattn._core"
    return None


def find_module() -> Path | None:
    """The file of ``vattn._core``; None if there is none.

    Raises:
        ImportError: vattn itself cannot be imported.
    """
    spec = importlib.util.find_spec("vattn._core")
    return None if spec is None or spec.origin is None else Path(spec.origin)


def _read(note: Path) -> dict[str, str]:
    try:
        found = json.loads(note.read_text())
    except (OSError, json.JSONDecodeError):
        return {}
    return found if isinstance(found, dict) else {}


if __name__ == "__main__":
    built = find_module()
    if built is None:
        raise SystemExit("error: vattn._core is not built; run: pip install -e .")
    note_build(built)
