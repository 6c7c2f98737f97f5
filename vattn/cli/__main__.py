"""``python -m vattn.cli``: the same as the ``vattn`` command."""

from vattn.cli import app

app(prog_name="vattn")
