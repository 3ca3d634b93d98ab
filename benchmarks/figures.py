"""From answers to rows, ratios and bars. Pure.

A token's time is that between two tokens of an answer, (last - first) / (tokens - 1); the first counts as time to
the first token, from when the request was due. tokens/s are all tokens over the time from the start to the last one.
Figures are medians over rounds, ratios medians of the ratios within a round: a machine whose speed drifts favours none.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from benchmarks.workloads import PER_TOKEN_S, TTFT_S

OURS, GATEWAY, ENGINE, RUNNER, REFERENCE = "truthgpt", "truthgpt gateway", "engine loop", "runner loop", "transformers"
OPENVINO = "openvino"
WIDTHS = {"fp32": 32, "f32": 32, "float32": 32, "bf16": 16, "bfloat16": 16, "fp16": 16, "int4": 4}  # else 8


@dataclass(frozen=True)
class Case:
    """What one row is about. `load` is a number of clients, or requests a second in an open loop."""

    workload: str
    engine: str
    precision: str
    load: float


@dataclass
class Samples:
    """All runs so far: for each case, figures by round. A run that failed is `failed` with what was said."""

    runs: dict[Case, dict[int, dict[str, float]]] = field(default_factory=dict)
    failed: dict[Case, str] = field(default_factory=dict)

    def add(self, case: Case, round_number: int, figures: dict[str, float]) -> None:
        self.runs.setdefault(case, {})[round_number] = figures


def of_run(answers: Iterable[Mapping[str, Any]], open_loop: bool = False) -> dict[str, float]:
    """One run's figures. An answer is as in peers/serving.py; raises ValueError for none."""
    answers = list(answers)
    if not answers:
        raise ValueError("a run without answers")
    first = [a["first_s"] - a["due_s"] for a in answers]
    gaps = [(a["last_s"] - a["first_s"]) / (len(a["ids"]) - 1) for a in answers if len(a["ids"]) > 1]
    tokens = sum(len(a["ids"]) for a in answers)
    took = max(a["last_s"] for a in answers) - min(a["due_s"] for a in answers)
    found = {
        "tokens_per_s": tokens / took,
        "ms_per_token": statistics.median(gaps) * 1000,
        "ttft_s": statistics.median(first),
        "ttft_p99_s": quantile(first, 0.99),
        "distinct": statistics.fmean(len(set(a["ids"])) / len(a["ids"]) for a in answers),
    }
    if open_loop:
        good = [a for a in answers if is_good(a)]
        found |= {"good": len(good) / len(answers), "goodput_tokens_per_s": sum(len(a["ids"]) for a in good) / took}
    return found


def is_good(answer: Mapping[str, Any]) -> bool:
    """Whether an answer meets the limits of `mixed`, its first token counted from when it was due."""
    gaps = (answer["last_s"] - answer["first_s"]) / max(1, len(answer["ids"]) - 1)
    return bool(answer["first_s"] - answer["due_s"] <= TTFT_S and gaps <= PER_TOKEN_S)


def quantile(values: list[float], q: float) -> float:
    """Nearest rank."""
    ranked = sorted(values)
    return ranked[min(len(ranked) - 1, max(0, -int(-len(ranked) * q // 1) - 1))]


def rows(samples: Samples) -> list[dict[str, Any]]:
    """A row a case, in the order in which they were run first."""
    found: list[dict[str, Any]] = []
    for case, runs in samples.runs.items():
        row: dict[str, Any] = {
            "workload": case.workload, "engine": case.engine, "precision": case.precision, "clients": case.load,
        }  # fmt: skip
        for key in next(iter(runs.values())):
            row[key] = round(statistics.median(run[key] for run in runs.values()), 4)
        row["best_tokens_per_s"] = round(max(run["tokens_per_s"] for run in runs.values()), 1)
        row["best_ms_per_token"] = round(min(run["ms_per_token"] for run in runs.values()), 3)
        row["tokens_per_s_all"] = [round(run["tokens_per_s"], 1) for run in runs.values()]
        found.append(row)
    return found


def ratio(samples: Samples, ours: Case, theirs: Case, key: str = "tokens_per_s") -> float | None:
    """The median of ours / theirs within a round; None where no round has both."""
    one, other = samples.runs.get(ours, {}), samples.runs.get(theirs, {})
    pairs = [one[number][key] / other[number][key] for number in one if number in other and other[number][key]]
    return round(statistics.median(pairs), 3) if pairs else None


@dataclass(frozen=True)
class Bar:
    """A promise and what became of it. `figure` is None where it was not measured."""

    bar: str
    what: str
    limit: float
    figure: float | None
    at_most: bool = False

    @property
    def reached(self) -> bool | None:
        if self.figure is None:
            return None
        return self.figure <= self.limit if self.at_most else self.figure >= self.limit

    def to_json(self) -> dict[str, Any]:
        return {
            "bar": self.bar, "what": self.what, "limit": self.limit, "at_most": self.at_most, "figure": self.figure,
            "reached": self.reached,
        }  # fmt: skip


def width(precision: str) -> int:
    """Bits a weight of a precision's name; what stands behind a + is how it computes."""
    return WIDTHS.get(precision.split("+")[0], 8)


def _best(samples: Samples, workload: str, engine: str, load: float, bits: int) -> Case | None:
    """The fastest of an engine's settings with weights of so many bits."""
    fitting = [
        case
        for case in samples.runs
        if (case.workload, case.engine, case.load) == (workload, engine, load) and width(case.precision) == bits
    ]
    return max(
        fitting, key=lambda c: statistics.median(r["tokens_per_s"] for r in samples.runs[c].values()), default=None
    )


def bars(samples: Samples, floors_ms: Mapping[str, float]) -> list[Bar]:
    """B1 to B5 of what was measured. `floors_ms`: for each of our precisions what a token's weights take to be read."""
    ours = {case.precision for case in samples.runs if case.engine == OURS}
    found: list[Bar] = []
    for precision in sorted(ours):
        found.append(_b1(samples, precision))
        if precision in floors_ms:
            found.append(_b4(samples, precision, floors_ms[precision]))
        for engine, name in ((OURS, "Triton"), (GATEWAY, "Triton and the gateway")):
            figure = ratio(samples, Case("W", engine, precision, 16), Case("W", ENGINE, precision, 16))
            found.append(Bar("B5", f"{precision}, C=16, through {name} / bare engine loop", 0.9, figure))
    for bits, limits in ((8, {1: 1.3, 8: 1.1, 16: 1.15}), (32, {1: 1.0, 8: 1.0, 16: 1.0})):
        for load, limit in limits.items():
            found.append(_against_openvino(samples, "B2", "W", load, bits, limit))
    for bits in (8, 32):
        found.append(_against_openvino(samples, "B3", "chat", 16, bits, 2.0))
    return [bar for bar in found if bar.figure is not None]


def _b1(samples: Samples, precision: str) -> Bar:
    figure = ratio(samples, Case("W", OURS, precision, 16), Case("W", REFERENCE, "fp32", 16))
    return Bar("B1", f"{precision}, C=16 / transformers fp32", 6.0, figure)


def _b4(samples: Samples, precision: str, floor_ms: float) -> Bar:
    runs = samples.runs.get(Case("W", OURS, precision, 1), {})
    figure = round(statistics.median(run["ms_per_token"] for run in runs.values()) / floor_ms, 3) if runs else None
    limit = 1.1 if width(precision) == 32 else 1.25
    return Bar(
        "B4", f"{precision}, C=1: a token / reading its weights ({floor_ms:.2f} ms)", limit, figure, at_most=True
    )


def _against_openvino(samples: Samples, bar: str, workload: str, load: float, bits: int, limit: float) -> Bar:
    mine, theirs = (_best(samples, workload, engine, load, bits) for engine in (OURS, OPENVINO))
    figure = ratio(samples, mine, theirs) if mine and theirs else None
    names = f"{mine.precision} / OpenVINO {theirs.precision}" if mine and theirs else f"{bits} bits"
    return Bar(bar, f"{workload}, C={load:g}, {names}", limit, figure)


def ratios(samples: Samples) -> dict[str, float]:
    """tokens/s of each of our rows over every other engine's with weights of as many bits, transformers' always."""
    found: dict[str, float] = {}
    for mine in samples.runs:
        if mine.engine not in (OURS, GATEWAY):
            continue
        for theirs in samples.runs:
            same = (theirs.workload, theirs.load) == (mine.workload, mine.load) and theirs.engine != mine.engine
            fits = theirs.engine == REFERENCE or width(theirs.precision) == width(mine.precision)
            if same and fits and theirs.engine != GATEWAY and (value := ratio(samples, mine, theirs)) is not None:
                sides = f"{mine.engine} {mine.precision} / {theirs.engine} {theirs.precision}"
                found[f"{mine.workload} {mine.load:g}: {sides}"] = value
    return found


def agreement(answers: Iterable[Mapping[str, Any]], reference: Iterable[Mapping[str, Any]]) -> tuple[int, int]:
    """How many answers of W have exactly the reference's tokens, and how many there are."""
    wanted = {answer["conversation"]: answer["ids"] for answer in reference}
    given = {answer["conversation"]: answer["ids"] for answer in answers}
    return sum(wanted[number] == ids for number, ids in given.items()), len(given)
