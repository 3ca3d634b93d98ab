"""A result of the gateway benchmark for people: tables in the terminal and as Markdown, and a plot."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

FIGURES = (
    ("requests/s", "per_s", 0),
    ("p50 ms", "p50_ms", 3),
    ("p90 ms", "p90_ms", 3),
    ("p99 ms", "p99_ms", 3),
    ("first chunk p50 ms", "first_p50_ms", 3),
    ("added p50 ms", "added_p50_ms", 3),
    ("added p99 ms", "added_p99_ms", 3),
    ("CPU µs", "cpu_us", 0),
    ("events", "events", 1),
)
SHORT = ("requests/s", "p50 ms", "p99 ms", "first chunk p50 ms", "added p50 ms", "CPU µs")


def rows(result: dict[str, Any], names: tuple[str, ...]) -> Iterator[list[str]]:
    """System, run, and a cell for each named figure."""
    for system, runs in result["systems"].items():
        for run, figures in runs.items():
            if "errors" in figures:
                yield [system, run, "no result", *[""] * (len(names) - 1)]
                continue
            yield [system, run, *(_cell(figures.get(key), digits) for name, key, digits in FIGURES if name in names)]


def failures(result: dict[str, Any]) -> Iterator[str]:
    """A line for each run that is no result."""
    for system, runs in result["systems"].items():
        for run, figures in runs.items():
            for errors in figures.get("errors", ()):
                said = "; ".join(f"{count} × {' '.join(str(what).split())[-200:]}" for what, count in errors.items())
                yield f"{system}, {run}: {said}"


def bar_rows(result: dict[str, Any]) -> Iterator[list[str]]:
    for bar in result["bars"]:
        verdict = {True: "reached", False: "MISSED", None: "no result"}[bar["reached"]]
        sides = "" if bar["ours"] is None or bar["theirs"] is None else f"{bar['ours']:,.6g} / {bar['theirs']:,.6g}"
        figure = "" if bar["figure"] is None else f"{bar['figure']:,.4g} {bar['unit']}"
        yield [bar["bar"], bar["what"], figure, f"{'≤' if bar['at_most'] else '≥'} {bar['limit']:,g}", verdict, sides]


BAR_COLUMNS = ("bar", "", "measured", "promised", "", "ours / theirs")


def show(result: dict[str, Any], console: Console) -> None:
    """Two tables: the figures, and the bars."""
    console.width = max(console.width, 130)
    table = Table(title=f"Gateways: medians of {result['rounds']} rounds")
    for name in ("system", "run", *SHORT):
        table.add_column(name, justify="left" if name in ("system", "run") else "right")
    for row in rows(result, SHORT):
        table.add_row(*row)
    console.print(table)
    for line in failures(result):
        console.print(line, markup=False, style="red")
    table = Table(title="Bars")
    for name in BAR_COLUMNS:
        table.add_column(name)
    for row in bar_rows(result):
        table.add_row(*row, style={"reached": "green", "MISSED": "red"}.get(row[4], ""))
    console.print(table)


def markdown(result: dict[str, Any]) -> str:
    """The whole result as one page."""
    machine, growth = result["machine"], result["memory_growth"]
    parts = [
        "# The gateway, side by side",
        f"{result['date']} · commit {result['commit']} · {result['rounds']} interleaved rounds, medians · "
        f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB, {machine['system']}, "
        f"Python {machine['python']} · {', '.join(f'{name} {v}' for name, v in result['versions'].items())}",
        result["how"],
        "" if result["publishable"] else f"**Not for publication: {result['unpublishable']}.**",
        "## Bars",
        _table(BAR_COLUMNS, bar_rows(result)),
        "## Figures",
        _table(("system", "run", *(name for name, _, _ in FIGURES)), rows(result, tuple(f[0] for f in FIGURES))),
        "\n".join(f"- no result: {line}" for line in failures(result)),
        "## Memory (10^6 bytes, all processes of a system together)",
        _table(
            ("system", "requests so far", "PSS", "USS", "RSS"),
            ([name, f"{mb['requests']:,}", *(f"{mb[k]:.1f}" for k in ("pss", "uss", "rss"))]
             for name, mb in result["memory"].items()),
        ),
    ]  # fmt: skip
    if growth:
        points = ", ".join(f"{p['requests']:,}: {p['pss']:.1f}" for p in growth["points"])
        slope = growth["slope_mb_per_10000"]
        parts.append(
            "PSS is what is compared; ours is that of a fresh gateway, alone of its kind, misses only, after requests: "
            f"{points}. Slope: {slope} a 10,000."
        )
    if result["stages"]:
        parts.append("## Stages of ours, one client (mean µs, from truthgpt_stage_seconds)")
        for run, stages in result["stages"].items():
            parts.append(f"- {run}: " + ", ".join(f"{name} {us:g}" for name, us in stages.items()))
    parts.append("How to run it again, and what each system is told: [README.md](../README.md).")
    return "\n\n".join(part for part in parts if part) + "\n"


def plot(result: dict[str, Any], path: Path) -> bool:
    """Four bar charts, logarithmic; False where matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        return False
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    charts = (
        ("added p50, ms", "request, C=1", "added_p50_ms"),
        ("requests/s, 32 clients", "request, C=32", "per_s"),
        ("streams of 16/s, 32 clients", "stream of 16, C=32", "per_s"),
        ("CPU µs a request", "request, C=32", "cpu_us"),
    )
    names = [name for name in ("ours", "portkey", "litellm", "litellm-full") if name in result["systems"]]
    figure, axes = pyplot.subplots(1, len(charts), figsize=(13, 3.4), layout="constrained")
    for axis, (title, run, key) in zip(axes, charts, strict=True):
        values = [result["systems"][name].get(run, {}).get(key) or 0 for name in names]
        drawn = axis.bar(names, values, color=["#2b7a3d" if name == "ours" else "#9aa5b1" for name in names])
        labels = [f"{value:,.0f}" if value >= 100 else f"{value:.3g}" for value in values]
        axis.bar_label(drawn, labels=labels, fontsize=8)
        axis.set_title(title, fontsize=10)
        if any(value > 0 for value in values):
            axis.set_yscale("log")
        axis.tick_params(axis="x", labelrotation=25, labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return True


def _cell(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:,.{digits}f}"


def _table(columns: tuple[str, ...], cells: Iterator[list[str]]) -> str:
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in cells]
    return "\n".join(lines)
