"""The frontier as a plot, in a file of its own or in a page that needs nothing else. Needs matplotlib."""

from __future__ import annotations

import html
import io
from pathlib import Path

from matplotlib.figure import Figure

from orchestrator.ops.tune import undoing
from orchestrator.ops.tune.choosing import frontier
from orchestrator.ops.tune.errors import TuneError
from orchestrator.ops.tune.figures import Figures
from orchestrator.ops.tune.knobs import Point, key
from orchestrator.ops.tune.tuning import Result

KINDS = (".png", ".svg")
_STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}"
    "table{border-collapse:collapse}td,th{padding:.3rem .8rem;border-bottom:1px solid #ddd;text-align:right}"
    "tr.winner{font-weight:bold}svg{width:100%;height:auto}"
)


def check(plot: Path | None, page: Path | None) -> None:
    """Raises TuneError for a plot that is of no kind of picture, and for files whose folder is not there."""
    if plot is not None and plot.suffix.lower() not in KINDS:
        raise TuneError(f"plot: {plot.name} ends neither in .png nor in .svg", "give such a name, or --html")
    for path in (plot, page):
        if path is not None and not path.parent.is_dir():
            raise TuneError(f"there is no folder {path.parent} to write {path.name} into", "make it, or choose another")


def draw(path: Path, model: str, result: Result) -> None:
    """Write the plot. Raises TuneError."""
    data = io.BytesIO()
    _figure(model, result).savefig(data, format=path.suffix.lower()[1:], dpi=150)
    _written(path, data.getvalue())


def page(path: Path, model: str, titles: list[str], rows: list[tuple[list[str], bool]], result: Result) -> None:
    """Write one HTML file: the plot, and a table of these rows, of which the winner's is marked. Raises TuneError."""
    data = io.StringIO()
    _figure(model, result).savefig(data, format="svg")
    svg = data.getvalue()
    svg = svg[svg.index("<svg") :]
    heads = "".join(f"<th>{html.escape(title)}</th>" for title in titles)
    body = "".join(
        f'<tr{" class=winner" if wins else ""}>' + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>"
        for cells, wins in rows
    )
    notes = [f"Under load: {result.plan.workload}.", f"Bounds (p99): {result.bounds}.", *result.notes]
    told = "".join(f"<p>{html.escape(note)}</p>" for note in notes)
    name = html.escape(f"truthgpt tune {model}")
    text = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{name}</title><style>{_STYLE}</style>'
        f"<h1>{name}</h1>{told}{svg}<table><tr>{heads}</tr>{body}</table></html>\n"
    )
    _written(path, text.encode())


def _figure(model: str, result: Result) -> Figure:
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    measured = result.measured()
    kept = [one for one in measured if result.bounds.kept(one[1])]
    beyond = [one for one in measured if not result.bounds.kept(one[1])]
    for rows, label, colour in ((kept, "measured", "tab:blue"), (beyond, "beyond the bounds", "tab:grey")):
        if rows:
            axes.scatter(*_columns(rows), s=24, color=colour, label=label)
    axes.plot(*_columns(frontier(measured)), color="tab:blue", linewidth=1)
    current = _of(measured, result.point) or result.current
    axes.scatter([current.throughput], [current.latency_s], s=90, marker="s", color="tab:orange", label="set now")
    if result.winner is not None:
        best = _of(measured, result.winner.point) or result.winner.figures
        axes.scatter([best.throughput], [best.latency_s], s=140, marker="*", color="tab:green", label="winner")
    axes.set_xlabel("output tokens/s" if result.plan.workload.output_tokens else "requests/s")
    axes.set_ylabel("latency, 99th percentile (s)")
    axes.set_title(model, parse_math=False)
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def _columns(rows: list[tuple[Point, Figures]]) -> tuple[list[float], list[float]]:
    return [figures.throughput for _, figures in rows], [figures.latency_s for _, figures in rows]


def _of(measured: list[tuple[Point, Figures]], wanted: Point) -> Figures | None:
    return next((figures for point, figures in measured if key(point) == key(wanted)), None)


def _written(path: Path, data: bytes) -> None:
    try:
        undoing.write_bytes(path, data, mode=0o644)
    except OSError as error:
        raise TuneError(f"{path} cannot be written: {error.strerror}", "choose another file") from error
