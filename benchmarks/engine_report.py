"""A contest's result: as JSON, as tables in the terminal and in Markdown, and drawn."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import common, figures
from benchmarks.contest import Outcome, Plan
from benchmarks.workloads import PER_TOKEN_S, TTFT_S

COLUMNS = (
    ("tokens/s", "tokens_per_s", 1), ("best", "best_tokens_per_s", 1), ("ms/token", "ms_per_token", 2),
    ("first token s", "ttft_s", 3), ("p99", "ttft_p99_s", 3), ("distinct", "distinct", 2), ("good", "good", 2),
    ("good tokens/s", "goodput_tokens_per_s", 1),
)  # fmt: skip
BAR_COLUMNS = ("bar", "", "measured", "promised", "")
_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")


def machine(bandwidth_gb_s: list[float]) -> dict[str, Any]:
    """The machine, with the best read bandwidth that was seen in between and the load when the run ended."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    flags = next((line.split() for line in lines if line.startswith("flags")), [])
    return {
        **common.machine(), "flags": [flag for flag in _FLAGS if flag in flags],
        "read_gb_s": round(max(bandwidth_gb_s, default=0.0), 1), "load_average": os.getloadavg(),
    }  # fmt: skip


def result(outcome: Outcome, plan: Plan, weights: dict[str, int], **more: Any) -> dict[str, Any]:
    """All of it. `weights`: bytes of our graphs' weights that a token reads, by precision."""
    here = machine(outcome.bandwidth_gb_s)
    floors = {name: size / here["read_gb_s"] / 1e6 for name, size in weights.items() if here["read_gb_s"]}
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"), "commit": commit(), "rounds": plan.rounds,
        "workloads": [workload.name for workload in plan.workloads], "machine": here,
        "rows": figures.rows(outcome.samples), "ratios": figures.ratios(outcome.samples),
        "bars": [bar.to_json() for bar in figures.bars(outcome.samples, floors)],
        "floors": {
            name: {"weight_bytes": size, "ms_per_token": round(floors[name], 3)}
            for name, size in weights.items() if name in floors
        },
        "agreement": {
            name: {"same": same, "answers": count} for name, (same, count) in outcome.agreement.items()
        },
        "left_out": [{**vars(case), "said": said} for case, said in outcome.samples.failed.items()],
        "settings": outcome.settings, **more,
    }  # fmt: skip


def commit() -> str:
    argv = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    return subprocess.run(argv, capture_output=True, text=True).stdout.strip() or "unknown"


def rows(found: dict[str, Any], workload: str) -> Iterator[list[str]]:
    """Engine, precision, load and a cell a column, by load."""
    chosen = [row for row in found["rows"] if row["workload"] == workload]
    for row in sorted(chosen, key=lambda row: (row["clients"], -row["tokens_per_s"])):
        cells = ["" if row.get(key) is None else f"{row[key]:,.{digits}f}" for _, key, digits in columns(chosen)]
        yield [row["engine"], row["precision"], f"{row['clients']:g}", *cells]


def columns(chosen: list[dict[str, Any]]) -> list[tuple[str, str, int]]:
    return [column for column in COLUMNS if any(column[1] in row for row in chosen)]


def heading(found: dict[str, Any], workload: str) -> list[str]:
    chosen = [row for row in found["rows"] if row["workload"] == workload]
    load = "requests/s" if workload == "mixed" else "clients"
    return ["engine", "precision", load, *(name for name, _, _ in columns(chosen))]


def bar_rows(found: dict[str, Any]) -> Iterator[list[str]]:
    for bar in found["bars"]:
        verdict = {True: "reached", False: "MISSED", None: ""}[bar["reached"]]
        yield [
            bar["bar"],
            bar["what"],
            f"{bar['figure']:.2f}",
            f"{'≤' if bar['at_most'] else '≥'} {bar['limit']:g}",
            verdict,
        ]


def show(found: dict[str, Any], console: Console) -> None:
    console.width = max(console.width, 120)
    for workload in found["workloads"]:
        table = Table(title=f"{workload}: medians of {found['rounds']} rounds")
        for name in heading(found, workload):
            table.add_column(name, justify="left" if name in ("engine", "precision") else "right")
        for row in rows(found, workload):
            table.add_row(*row, style="bold" if row[0].startswith(figures.OURS) else "")
        console.print(table)
    if found["bars"]:
        table = Table(title="Bars")
        for name in BAR_COLUMNS:
            table.add_column(name)
        for row in bar_rows(found):
            table.add_row(*row, style={"reached": "green", "MISSED": "red"}.get(row[4], ""))
        console.print(table)
    for line in notes(found):
        console.print(line, markup=False, highlight=False)


def notes(found: dict[str, Any]) -> Iterator[str]:
    here = found["machine"]
    yield f"Two threads read {here['read_gb_s']:g} GB/s here; load average at the end {here['load_average'][0]:.1f}."
    for name, floor in found["floors"].items():
        size, least = floor["weight_bytes"] / 1e6, floor["ms_per_token"]
        yield f"{name}: a token reads {size:,.1f} MB of weights, {least:.2f} ms at least."
    for name, seen in found["agreement"].items():
        yield f"{name}: {seen['same']} of {seen['answers']} answers have exactly transformers' tokens."
    for one in found["left_out"]:
        yield f"left out: {one['workload']} {one['engine']} {one['precision']}: {' '.join(one['said'].split())[:300]}"


def markdown(found: dict[str, Any], title: str) -> str:
    here = found["machine"]
    parts = [
        f"# {title}",
        f"{found['date']} · commit {found['commit']} · {found['rounds']} interleaved rounds, medians · {here['cpu']}, "
        f"{here['cores']} cores ({', '.join(here['flags'])}), {here['memory_gib']} GiB, {here['system']}, "
        f"Python {here['python']}",
        "\n".join(f"- {line}" for line in notes(found)),
    ]
    if found["bars"]:
        parts += ["## Bars", _table(BAR_COLUMNS, bar_rows(found))]
    for workload in found["workloads"]:
        parts += [f"## {workload}", _table(heading(found, workload), rows(found, workload))]
    parts.append(
        "Workloads, what a figure means, each engine's settings and how to run it again: [README.md](../README.md). "
        f"A request of mixed is good with its first token within {TTFT_S:g} s and the others within "
        f"{PER_TOKEN_S * 1000:g} ms each."
    )
    return "\n\n".join(parts) + "\n"


def plot(found: dict[str, Any], path: Path) -> bool:
    """tokens/s (good ones where it is open loop) of every engine, a chart a workload; False without matplotlib."""
    if importlib.util.find_spec("matplotlib") is None or not found["rows"]:
        return False
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = [name for name in found["workloads"] if any(row["workload"] == name for row in found["rows"])]
    tallest = max(len(list(rows(found, name))) for name in shown)
    figure, axes = pyplot.subplots(
        1, len(shown), figsize=(6.2 * len(shown), 1.2 + 0.22 * tallest), layout="constrained", squeeze=False
    )
    for axis, name in zip(axes[0], shown, strict=True):
        chosen = [row for row in found["rows"] if row["workload"] == name]
        chosen.sort(key=lambda row: (-row["clients"], row["tokens_per_s"]))
        key = "goodput_tokens_per_s" if "goodput_tokens_per_s" in chosen[0] else "tokens_per_s"
        labels = [f"{row['engine']} {row['precision']}, {row['clients']:g}" for row in chosen]
        colours = ["#2b7a3d" if row["engine"].startswith(figures.OURS) else "#9aa5b1" for row in chosen]
        drawn = axis.barh(range(len(chosen)), [row[key] for row in chosen], color=colours)
        axis.set_yticks(range(len(chosen)), labels, fontsize=7)
        axis.bar_label(drawn, fmt="%.0f", fontsize=7)
        axis.set_title(
            f"{name}: {'good ' if key != 'tokens_per_s' else ''}tokens/s, {heading(found, name)[2]}", fontsize=9
        )
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return True


def save(found: dict[str, Any], page: str, draw: Callable[[dict[str, Any], Path], bool], path: Path) -> None:
    """FILE.json, .md and, where it can be drawn, .png, each whole or as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _replace(path, json.dumps(found, indent=1) + "\n")
    _replace(path.with_suffix(".md"), page)
    drawn = path.with_suffix(".partial.png")
    if draw(found, drawn):
        drawn.replace(path.with_suffix(".png"))


def line(found: dict[str, Any]) -> str:
    """The last line of the output."""
    return json.dumps({"machine": found["machine"], "rows": found["rows"], "ratios": found["ratios"] | _named(found)})


def _named(found: dict[str, Any]) -> dict[str, float]:
    return {f"{bar['bar']} {bar['what']}": bar["figure"] for bar in found["bars"]}


def _replace(path: Path, text: str) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(text)
    partial.replace(path)


def _table(columns: Any, cells: Iterator[list[str]]) -> str:
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in cells]
    return "\n".join(lines)
