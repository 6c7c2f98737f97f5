"""A help page that is text: names of flags and variables are whole, however narrow it is."""

from __future__ import annotations

from typing import Any

from typer.core import TyperCommand


class PlainHelp(TyperCommand):
    """A command whose many long flags would be cut in the columns of a table."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **{**options, "rich_markup_mode": None})

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Writes arguments and flags, panel by panel."""
        panels: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record is not None:
                is_option = param.param_type_name == "option"
                panel = getattr(param, "rich_help_panel", None)
                panels.setdefault(panel or ("Options" if is_option else "Arguments"), []).append(
                    record
                )
        for panel, records in panels.items():
            with formatter.section(panel):
                formatter.write_dl(records)
