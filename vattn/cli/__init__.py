"""The command line: ``vattn generate``, ``vattn serve``, ``vattn doctor`` and ``vattn top``.

Generated text goes to stdout; figures, maps, progress and errors go to stderr, so that pipes work.
Exit codes: 0, 1 for a failure such as memory that ran out, 2 for bad input, 130 after Ctrl-C.
"""

from __future__ import annotations

import io
import sys
from typing import Any

import typer
from typer.core import TyperGroup

import vattn
from vattn.cli import doctor, generate, serve, top
from vattn.cli.console import CliError, fail
from vattn.cli.plain_help import PlainHelp

__all__ = ["app"]


class OneLineErrors(TyperGroup):
    """A command group that reports each failure in one line on stderr, without a traceback."""

    def main(self, *args: Any, standalone_mode: bool = True, **extra: Any) -> Any:
        """Runs a command; with ``standalone_mode`` the process exits with the command's code."""
        if not standalone_mode:
            return super().main(*args, **{**extra, "standalone_mode": False})
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):  # a model may write what no locale can show
                stream.reconfigure(errors="replace")
        try:
            code = super().main(*args, **{**extra, "standalone_mode": False})
        except CliError as error:
            fail(str(error), error.exit_code)
        except typer.Abort:
            fail("aborted", 130)
        except Exception as error:
            # What the parser raises has this method wherever typer keeps its click.
            message = getattr(error, "format_message", None)
            if message is None:
                raise
            fail(f"{message()} (see --help)", getattr(error, "exit_code", 2))
        raise SystemExit(code if isinstance(code, int) else 0)


app = typer.Typer(
    cls=OneLineErrors,
    help="KV cache in contiguous virtual memory, with physical pages only where tokens are.",
    add_completion=False,
    pretty_exceptions_show_locals=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"vattn {vattn.__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def main(
    context: typer.Context,
    version: bool = typer.Option(
        False, "--version", callback=_print_version, is_eager=True, help="Print the version."
    ),
) -> None:
    """KV cache in contiguous virtual memory, with physical pages only where tokens are."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


app.command()(generate.generate)
app.command(cls=PlainHelp)(serve.serve)
app.command()(doctor.doctor)
app.command()(top.top)
