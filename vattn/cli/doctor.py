"""``vattn doctor``: what this machine offers, what is missing and how to get it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vattn.cli.console import BadInput
from vattn.config import env_bytes, format_bytes

if TYPE_CHECKING:
    from rich.table import Table

Report = dict[str, Any]
Row = tuple[str, str, str]  # what, status, details

# A host cache of many sequences takes one mapping per run of pages.
_AMPLE_MAPPINGS = 262_144
_STYLES = {
    "ok": "green",
    "failed": "bold red",
    "missing": "yellow",
    "none": "yellow",
    "note": "cyan",
}


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Say what this machine offers to vattn, and how to get what is missing.

    Maps, writes, aliases and unmaps a page on each driver. Exits with 1 only if the host driver
    fails; a machine without a GPU is in order.
    """
    try:
        env_bytes("VATTN_BUDGET")
    except ValueError as error:
        raise BadInput(str(error)) from error
    report = examine()
    if as_json:
        typer.echo(json.dumps(report, indent=2))
    else:
        _print(report)
    if not report["host"]["self_test"]["ok"]:
        raise typer.Exit(1)


def examine() -> Report:
    """Everything that the doctor knows, ready for JSON."""
    from vattn.cli import probes

    return {
        "versions": probes.versions(),
        "host": probes.host(),
        "cuda": probes.cuda(),
        "attention": probes.attention(probes.gpu_of_torch()),
    }


def _print(report: Report) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)
    found = report["versions"]
    console.print(
        f"[bold]vattn {found['vattn']}[/]   Python {found['python']}, torch {found['torch']}, "
        f"transformers {found['transformers']}, {found['system']}"
    )
    for title, rows in (
        ("host driver", _host_rows(report["host"])),
        ("cuda driver", _cuda_rows(report["cuda"], found)),
        ("attention backends", _attention_rows(report["attention"])),
    ):
        console.print()
        console.print(Text(title, "bold"))
        console.print(_table(rows))


def _table(rows: Iterator[Row]) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True, min_width=23)
    table.add_column(no_wrap=True, min_width=7)
    table.add_column(overflow="fold")
    for what, status, details in rows:
        table.add_row(Text(f"  {what}"), Text(status, _STYLES.get(status, "")), Text(details))
    return table


def _host_rows(host: Report) -> Iterator[Row]:
    yield _self_test(host["self_test"])
    if "page_bytes" in host:
        yield from _size_rows(host)
    limit, used = host["max_map_count"], host["mappings"]
    if limit is not None:
        ample = limit >= _AMPLE_MAPPINGS
        remedy = "" if ample else "; for large caches: sysctl -w vm.max_map_count=1048576"
        yield "vm.max_map_count", "ok" if ample else "note", f"{limit}, {used} in use{remedy}"
    yield "memfd", "ok" if host["memfd"] else "missing", "" if host["memfd"] else "needs Linux 3.17"


def _cuda_rows(cuda: Report, versions: Report) -> Iterator[Row]:
    if not cuda["found"]:
        yield (
            "libcuda",
            "none",
            f"{cuda['error']}. Needs an NVIDIA GPU and its driver; see also VATTN_LIBCUDA",
        )
        return
    if "error" in cuda:
        yield "libcuda", "failed", f"{cuda['library']}: {cuda['error']}; see nvidia-smi"
        return
    yield "libcuda", "ok", f"{cuda['library']}, driver for CUDA {cuda['driver_version']}"
    if not cuda["devices"]:
        yield "devices", "none", "the driver shows no GPU; check CUDA_VISIBLE_DEVICES"
    for device in cuda["devices"]:
        yield f"cuda:{device['index']}", "", f"{device['name']}, capability {device['capability']}"
        for what, status, details in _device_rows(device):
            yield f"  {what}", status, details
    if cuda["devices"] and versions["torch_cuda"] is None:
        yield (
            "PyTorch",
            "missing",
            f"{versions['torch']} has no CUDA; install a CUDA build (see pytorch.org)",
        )


def _device_rows(device: Report) -> Iterator[Row]:
    yield _self_test(device["self_test"])
    if "page_bytes" in device:
        yield "virtual memory", "ok", "cuMemMap is supported"
        yield from _size_rows(device)
    yield from _property_rows(device["properties"])


def _property_rows(properties: Report | None) -> Iterator[Row]:
    if properties is None:
        yield "more properties", "missing", "pip install 'vattn[cuda]'"
    elif "error" in properties:
        yield "more properties", "failed", f"cuda.bindings: {properties['error']}"
    else:
        shown = [
            f"{format_bytes(n) if name.endswith('_bytes') else n} {_words(name)}"
            for name, n in properties.items()
        ]
        yield "more properties", "ok", ", ".join(shown)


def _words(name: str) -> str:
    return name.removesuffix("_bytes").replace("_khz", "_kHz").replace("_", " ")


def _size_rows(sizes: Report) -> Iterator[Row]:
    page, granularity = sizes["page_bytes"], sizes["granularity_bytes"]
    yield "page", "", f"{format_bytes(page)}; any multiple of {format_bytes(granularity)} will do"
    free, total = format_bytes(sizes["free_bytes"]), format_bytes(sizes["total_bytes"])
    yield "memory", "", f"{free} free of {total}"
    budget = format_bytes(sizes["default_budget_bytes"])
    yield "default budget", "", f"{budget}; VATTN_BUDGET or --budget sets another"


def _self_test(result: Report) -> Row:
    if result["ok"]:
        return "self test", "ok", f"mapped, wrote, aliased and unmapped in {result['ms']:.1f} ms"
    return "self test", "failed", result["error"]


def _attention_rows(backends: list[Report]) -> Iterator[Row]:
    for backend in backends:
        if backend["usable"]:
            yield backend["name"], "ok", backend["version"]
        elif backend["version"] is not None:
            yield backend["name"], "none", f"{backend['version']}, but {backend['lacks']}"
        else:
            lacks = f"; {backend['lacks']}" if backend["lacks"] else ""
            yield backend["name"], "missing", f"{backend['remedy']}{lacks}"
