"""Tables, targets and plot of the memory level, from its results alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from bench.common import Json, Target, short_bytes, short_count
from bench.levels.fold import unfold
from bench.levels.memory.shapes import PUBLISHED_LAYOUT
from bench.levels.repeat import cell
from bench.levels.table import Table

LEAST_LIVE_SHARE = 0.95


def unit(row: Json) -> str:
    """What memory is given in: a page, or a block in tokens."""
    if "block_tokens" in row:
        return f"{row['block_tokens']} tokens"
    return short_bytes(row["page_bytes"]) if "page_bytes" in row else "a slot"


def tables(results: Json) -> list[Table]:
    """One for each part that was measured."""
    made = {
        "waste": waste_table,
        "batch": batch_table,
        "calls": calls_table,
        "rate": rate_table,
        "prefill": prefill_table,
        "tables": steps_table,
        "latency": latency_table,
    }
    return [make(results) for name, make in made.items() if results.get(name)]


def waste_table(results: Json) -> Table:
    rows = []
    for r in unfold(results["waste"]):
        kind = r.get("driver", "-")
        layers = r.get("measured_layers")
        rows.append(
            [
                *(r["shape"], f"{kind} (default)" if r.get("default") else kind),
                *(r["layout"], unit(r), f"{r['live_share']:.3f}", f"{r['cover_share']:.3f}"),
                short_bytes(r["tail_bytes_per_request"]),
                *(r.get(k) for k in _CALLS_OF_WASTE),
                None if "table_bytes" not in r else short_bytes(r["table_bytes"]),
                "measured" if layers or "table_bytes" in r else "computed",
            ]
        )
    return Table(
        "waste: K and V / pages or blocks with a token in them; cover; lost per request",
        [
            *("shape", "driver", "layout", "unit", "live share", "cover", "lost/request"),
            *("map/admission", "access/admission", "calls/1000 tokens", "tables", "how"),
        ],
        rows,
        "Pages below 2 MiB need a patched driver on a GPU. Blocks of a paged cache have no cover; "
        "preallocated: each request has the longest one's memory.",
    )


_CALLS_OF_WASTE = ("map_per_admission", "access_per_admission", "calls_per_1000_tokens")


def batch_table(results: Json) -> Table:
    conditions = {row["shape"]: row for row in results["budgets"]}
    published = {
        (shape, short_bytes(page)): figure
        for shape, figures in results.get("published_most", {}).items()
        for page, figure in zip(results["published_pages"], figures, strict=True)
    }
    rows = []
    for r in unfold(results["batch"]):
        at = conditions[r["shape"]]
        is_theirs = r["layout"] == PUBLISHED_LAYOUT
        rows.append(
            [
                *(r["shape"], r["layout"], unit(r), r["requests"], f"{r['low']}-{r['high']}"),
                published.get((r["shape"], unit(r))) if is_theirs else None,
                *(r["how"], short_bytes(at["budget_bytes"]), at["mean_tokens"]),
            ]
        )
    return Table(
        "most requests at once, at full length: median and range over stretches of the trace",
        [
            *("shape", "layout", "unit", "requests", "range", "published"),
            *("how", "budget", "mean tokens"),
        ],
        rows,
        batch_note(results),
    )


def batch_note(results: Json) -> str:
    """What published figures were used for."""
    if not results.get("published_most"):
        return "Measured: the trace's first stretch was admitted, and agrees with the formula."
    return (
        "Budget and mean length are those that the two published figures imply, so the first "
        "layout's level is no finding; that a trace's lengths give its gain is one, and so are "
        "the figures of the other layouts."
    )


def calls_table(results: Json) -> Table:
    columns = [
        f"{what}_{per}"
        for per in ("per_admission", "per_1000_tokens")
        for what in ("create", "map", "set_access", "unmap", "modelled_us")
    ]
    rows = [
        [
            *(r["shape"], r["layout"], "yes" if r["reuse_stale"] else "no", r["phase"]),
            *(r[column] for column in columns),
        ]
        for r in unfold(results["calls"])
    ]
    return Table(
        "driver calls per admission, then per 1000 decoded tokens; us at published costs",
        [
            *("shape", "layout", "stale reuse", "phase"),
            *("create", "map", "access", "unmap", "us"),
            *("create ", "map ", "access ", "unmap ", "us "),
        ],
        rows,
        "With stale reuse the budget is 1.1 times the peak that the way without it had. Cold: the "
        "first admission of every slot; nothing is decoded then.",
    )


def rate_table(results: Json) -> Table:
    return Table(
        "new memory that decoding needs, MB/s, and mapping it at published costs, ms",
        [
            *("shape", "batch", "layout", "mean tokens", "step ms", "of", "K and V", "mapped"),
            *("peak second", "largest step", "driver/s", "with create"),
        ],
        [
            [
                *(r["shape"], r["batch"], r["layout"], r["mean_tokens"], r["step_ms"]),
                *(r["step_from"], r["tokens_mb_per_s"], r["mapped_mb_per_s"], r["peak_mb_per_s"]),
                *(r["largest_step_ms"], r["driver_ms_per_s"], r["driver_ms_per_s_create"]),
            ]
            for r in unfold(results["rate"])
        ],
        "A step of bytes / bandwidth is the shortest that the assumed GPU could do, so the need is "
        "at most this. largest step: mapping what one step needs, were it not done ahead.",
    )


def prefill_table(results: Json) -> Table:
    return Table(
        "new memory that a prompt needs at the assumed GPU's full rate",
        ["shape", "tokens/s", "MB/s"],
        [[r["shape"], r["tokens_per_s"], r["mb_per_s"]] for r in unfold(results["prefill"])],
    )


def steps_table(results: Json) -> Table:
    rows = []
    for r in unfold(results["tables"]):
        ratio = r | {"repeats": (r["repeats_low"], r["repeats_high"])}
        rows.append(
            [
                *(r["sequences"], short_count(r["context"]), r["block_tokens"]),
                *(short_bytes(r["table_bytes"]), r["entries_per_step"], r["sent_bytes_per_step"]),
                *(r["base_us"], r["candidate_us"], cell(ratio)),
                *(r["modelled_driver_us_per_step"], r["rebuilt_us"]),
            ]
        )
    return Table(
        "host time of a decode step's memory, us: block tables / ensure_many",
        [
            *("sequences", "tokens each", "block", "table", "entries/step", "bytes/step"),
            *("tables us", "ensure us", "ratio", "driver us, published", "rebuilt us"),
        ],
        rows,
        "Above 1 ensure_many takes less, with the calls of this machine's driver: of the fake one "
        "on a CPU. What they cost by published figures, all pages being new, stands beside it; it "
        "comes on top where it is not mapped ahead. rebuilt: a table made of lists at each step, "
        "without taking blocks; on no side. Batches have at most "
        f"{short_count(results['most_tokens'])} tokens in all.",
    )


def latency_table(results: Json) -> Table:
    return Table(
        "latency of driver calls on this GPU, us per page, in one call / a call per page",
        ["call", "page", "pages", "us/page", "alone us/page"],
        [
            [
                *(r["op"], short_bytes(r["page_bytes"]), r["run_pages"]),
                *(r["run_us_per_page"], r["single_us_per_page"]),
            ]
            for r in unfold(results["latency"])
        ],
    )


# Targets and plot ---------------------------------------------------------------------------------


def targets(settings: Json, results: Json) -> list[Target]:
    """The default layouts' waste."""
    made = []
    for r in unfold(results.get("waste", ())):
        if not r.get("default") or r["shape"] != settings["shapes"][0]:
            continue
        note = (
            f"cover {r['cover_share']:.3f}; {r['live_share_of_all']:.3f} over all requests; "
            f"{r['live_share_low']:.3f}-{r['live_share_high']:.3f} in {r['stretches']} stretches"
        )
        name = f"live share, {r['driver']}, default layout"
        share = r["live_share"]
        made.append(Target(name, share, LEAST_LIVE_SHARE, "", at_least=True, note=note))
    return made


def draw(figure: Any, results: Json) -> bool:
    """Live share by page size and layout, and most requests at once; blocks as level lines."""
    panels = [name for name in ("waste", "batch") if results.get(name)]
    if not panels:
        return False
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    of_layout = [unfold(results[name]) for name in panels]
    layouts = _in_order(r["layout"] for rows in of_layout for r in rows if "page_bytes" in r)
    colors = {layout: f"C{i}" for i, layout in enumerate(layouts)}
    for axis, name in zip(axes, panels, strict=True):
        of = "live_share" if name == "waste" else "requests"
        shape = results[name][0]["shape"]
        rows = [r for r in unfold(results[name]) if r["shape"] == shape]
        _lines(axis, [r for r in rows if r.get("driver") != "host"], of, colors)
        axis.set_xscale("log", base=2)
        pages = sorted({r["page_bytes"] for r in rows if r.get("driver") != "host" and _paged(r)})
        axis.set_xticks(pages, [short_bytes(page) for page in pages])
        axis.minorticks_off()
        axis.set_xlabel("page")
        axis.set_ylabel("K and V / physical bytes" if name == "waste" else "most requests at once")
        axis.set_ylim(bottom=0)
        axis.set_title(shape)
    named: dict[str, Any] = {}
    for axis in axes:
        named |= dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    figure.legend(
        named.values(), named.keys(), fontsize="x-small", loc="outside lower center", ncols=3
    )
    return True


def _paged(row: Json) -> bool:
    return "page_bytes" in row


def _lines(axis: Any, rows: Sequence[Json], of: str, colors: Mapping[str, str]) -> None:
    for layout in _in_order(r["layout"] for r in rows if _paged(r)):
        points = sorted((r["page_bytes"], r[of]) for r in rows if r["layout"] == layout)
        style = {"marker": "o", "markersize": 3, "color": colors[layout]}
        axis.plot(*zip(*points, strict=True), label=layout, **style)
    blocks = _ends([r for r in rows if "block_tokens" in r])
    for line, row in zip(("--", ":"), blocks, strict=False):
        label = f"blocks of {row['block_tokens']}"
        axis.axhline(row[of], linestyle=line, color="black", linewidth=1, label=label)


def _ends(rows: Sequence[Json]) -> list[Json]:
    """Those of the smallest and of the largest blocks."""
    found = sorted(rows, key=lambda row: int(row["block_tokens"]))
    return [found[0], found[-1]] if len(found) > 1 else found


def _in_order(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))
