"""``python -m vattn.engine_process``: the engine process; started by its owner, not by hand."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import stat
import sys
import threading
from pathlib import Path

ORPHANED = 3  # exit code of one whose owner has gone


def main() -> int:
    """Runs until its owner says stop, goes away, or the engine fails; the exit code."""
    # These go to whole process groups. The owner decides when the engine ends, and if the owner is
    # gone, its end of the pipe that is our stdin is closed.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    parser = argparse.ArgumentParser(prog="python -m vattn.engine_process", description=__doc__)
    parser.add_argument("--commands", required=True, help="zmq address that commands come from")
    parser.add_argument("--news", required=True, help="zmq address that news go to")
    parser.add_argument("--directory", type=Path, help="of the sockets; removed with the owner")
    asked = parser.parse_args()
    threading.Thread(
        target=_end_with_owner, args=(asked.directory,), name="vattn-owner", daemon=True
    ).start()
    # Progress bars are for terminals; they look when they are imported.
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from vattn.engine_process.host import run  # takes seconds: imports torch

    return run(asked.commands, asked.news)


def _end_with_owner(directory: Path | None) -> None:
    """Ends this process when stdin does, whatever it is doing."""
    with contextlib.suppress(OSError):
        while os.read(0, 4096):
            pass
    if directory is not None:
        _remove_sockets(directory)
    os._exit(ORPHANED)


def _remove_sockets(directory: Path) -> None:
    with contextlib.suppress(OSError):
        for each in directory.iterdir():
            if stat.S_ISSOCK(each.lstat().st_mode):
                each.unlink()
        directory.rmdir()


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # to take the interpreter and its libraries down takes seconds
