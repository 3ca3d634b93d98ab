"""A report as one HTML file: tables and plots, no scripts, nothing loaded from elsewhere.

Needs matplotlib. Whatever came from a server or a file is escaped.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from orchestrator.bench.result import COMPARED, NOTHING, differences, figure, pairs, place, ratio

Result = Mapping[str, Any]
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #1a1a1a; }
table { border-collapse: collapse; margin: 1rem 0; } th, td { padding: .3rem .7rem; border-bottom: 1px solid #ddd; }
td { text-align: right; font-variant-numeric: tabular-nums; } td:first-child, th { text-align: left; }
.bad { color: #b00020; } .good { color: #146c2e; } svg { max-width: 100%; height: auto; } .small { color: #555; }
"""
_COLUMNS = (
    ("output tokens/s", "output_tokens_per_s", 1), ("requests/s", "requests_per_s", 1),
    ("goodput/s", "goodput_per_s", 1), ("errors", "errors", 1), ("first token p50 ms", "ttft_s.p50", 1000),
    ("p99", "ttft_s.p99", 1000), ("between tokens p50 ms", "itl_s.p50", 1000), ("p99", "itl_s.p99", 1000),
    ("latency p50 ms", "latency_s.p50", 1000), ("p99", "latency_s.p99", 1000),
)  # fmt: skip


def html(results: Sequence[tuple[str, Result]]) -> str:
    """A page about one result, or about two of which the second is compared with the first; each with its name.

    Raises ModuleNotFoundError where matplotlib is missing.
    """
    first = results[0][1]
    parts = [f"<h1>{escape(str(first['target'].get('model')))}</h1>", _about(first["target"], first)]
    if len(results) == 2:
        parts += [_comparison(*results[0], *results[1])]
    for name, result in results:
        parts += [f"<h2>{escape(name)}</h2>" if len(results) > 1 else "", _table(result), _errors(result)]
    parts += [_plots(results), _definitions()]
    head = f"<meta charset='utf-8'><title>truthgpt bench</title><style>{_STYLE}</style>"
    return f"<!doctype html><html lang='en'><head>{head}</head><body>{''.join(parts)}</body></html>\n"


def _about(target: Mapping[str, Any], result: Result) -> str:
    load = result["runs"][0].get("load") or {}
    words = [
        f"{target.get('protocol')} at {target.get('url')}", f"measured {result.get('time')}",
        f"{load.get('prompt_tokens')} prompt tokens, at most {load.get('output_tokens')} output tokens",
        "streaming" if target.get("stream") else "not streaming",
    ]  # fmt: skip
    return f"<p>{escape('; '.join(map(str, words)))}</p>"


def _table(result: Result) -> str:
    head = "".join(f"<th>{escape(title)}</th>" for title, _, _ in _COLUMNS)
    rows = []
    for run in result["runs"]:
        cells = "".join(f"<td>{_shown(figure(run, name), scale)}</td>" for _, name, scale in _COLUMNS)
        rows.append(f"<tr><td>{escape(place(run))}</td>{cells}</tr>")
    return f"<table><tr><th>load</th>{head}</tr>{''.join(rows)}</table>"


def _comparison(name: str, one: Result, other_name: str, other: Result) -> str:
    found = pairs(one, other)
    rows = []
    for column, more in COMPARED.items():
        ratios = [ratio(figure(before, column), figure(after, column)) for before, after in found]
        cells = "".join(f"<td class='{_verdict(value, more)}'>{_times(value)}</td>" for value in ratios)
        rows.append(f"<tr><td>{escape(column)}</td>{cells}</tr>")
    head = "".join(f"<th>{escape(place(before))}</th>" for before, _ in found)
    told = "".join(f"<li>{escape(text)}</li>" for text in differences(one, other))
    unlike = f"<p>Not measured alike:</p><ul>{told}</ul>" if told else ""
    title = f"<h2>{escape(other_name)} to {escape(name)}</h2>"
    return f"{title}<table><tr><th>figure</th>{head}</tr>{''.join(rows)}</table>{unlike}"


def _verdict(change: float | None, more: bool) -> str:
    if change is None or abs(change - 1) < NOTHING:
        return ""
    return "good" if (change > 1) == more else "bad"


def _times(change: float | None) -> str:
    return "" if change is None else f"{change:.3f} ×"


def _errors(result: Result) -> str:
    rows = []
    for run in result["runs"]:
        for kind, row in (run.get("error_kinds") or {}).items():
            count, said = (row.get("count"), row.get("first")) if isinstance(row, Mapping) else (row, "")
            text = f"{place(run)}: {count} × {kind}: {said}"
            rows.append(f"<li class='bad'>{escape(text)}</li>")
    return f"<ul>{''.join(rows)}</ul>" if rows else ""


def _definitions() -> str:
    return (
        "<p class='small'>First token: from sending a request until its first token came out of the socket. Between "
        "tokens: the time between two moments at which tokens came, shared among those that came. Latency: until the "
        "answer's end; with a rate all times count from when a request was due. Failed requests are in none of these."
        "</p>"
    )


def _shown(value: Any, scale: float) -> str:
    return "" if value is None else escape(f"{value * scale:.4g}")


def _plots(results: Sequence[tuple[str, Result]]) -> str:
    import matplotlib

    matplotlib.use("svg")
    from matplotlib.figure import Figure

    panels = (
        ("output tokens/s", ("output_tokens_per_s",), 1), ("first token, ms", ("ttft_s.p50", "ttft_s.p99"), 1000),
        ("between tokens, ms", ("itl_s.p50", "itl_s.p99"), 1000),
        ("latency, ms", ("latency_s.p50", "latency_s.p90", "latency_s.p99"), 1000),
    )  # fmt: skip
    # words stay words: an SVG with text is small and can be searched
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "truthgpt", "font.family": "sans-serif"}):
        drawn = Figure(figsize=(10, 7), layout="constrained")
        axes = drawn.subplots(2, 2).flat
        for axis, (title, names, scale) in zip(axes, panels, strict=True):
            for at, (label, result) in enumerate(results):
                for number, name in enumerate(names):
                    _line(axis, result, name, scale, f"C{at}", number, label if len(results) > 1 else "")
            axis.set_title(_plain(title))
            axis.set_xlabel("clients" if results[0][1]["runs"][0].get("rate") is None else "requests/s")
            axis.set_ylim(bottom=0)
            if axis.lines:
                axis.legend(fontsize=8)
        text = io.StringIO()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # letters that its font lacks: the reader's browser has one
            drawn.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    svg = text.getvalue()
    return re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)


def _line(axis: Any, result: Result, name: str, scale: float, color: str, number: int, label: str) -> None:
    points = [
        (run.get("concurrency") or run.get("rate"), value * scale)
        for run in result["runs"] if (value := figure(run, name)) is not None
    ]  # fmt: skip
    if points:
        percentile = name.partition(".")[2]
        # the name last: what begins with an underscore would be in no legend
        told = _plain(f"{percentile or 'mean'} {label}".strip())
        style = ("-", "--", ":")[number]
        axis.plot(*zip(*sorted(points), strict=True), style, marker="o", markersize=4, color=color, label=told)


def _plain(text: str) -> str:
    """A text in which matplotlib sees no formula."""
    return text.replace("$", r"\$")
