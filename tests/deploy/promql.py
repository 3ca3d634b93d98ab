"""Which series and labels a PromQL expression names; and every expression of deploy/."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from backends.inflight import metrics as backend
from orchestrator.metrics_table import TABLE

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
DASHBOARD: dict[str, Any] = json.loads((DEPLOY / "grafana" / "truthgpt.json").read_text(encoding="utf-8"))
RULES: list[dict[str, Any]] = [
    rule
    for group in yaml.safe_load((DEPLOY / "alerts.yml").read_text(encoding="utf-8"))["groups"]
    for rule in group["rules"]
]

_TOKEN = re.compile(
    r"""(?P<space>\s+)|(?P<text>"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*')|(?P<range>\[[^\]]*\])|(?P<name>[A-Za-z_:][\w:]*)"""
    r"""|(?P<number>\d[\w.]*)|(?P<sign>=~|!~|!=|==|>=|<=|[-+*/%^(){},=<>])"""
)
_GROUPING = {"by", "without", "on", "ignoring", "group_left", "group_right"}
_WORDS = {"and", "or", "unless", "bool", "offset"}
SCRAPED = {"job", "instance"}  # the labels that Prometheus itself adds
OF_BACKEND = {backend.PREFIX + series.name for series in backend.SERIES}  # at Triton's metrics port
OF_PROMETHEUS = {"up": set[str](), "ALERTS": {"alertname", "alertstate", "severity"}}


@dataclass
class Use:
    """A series and the matchers beside it, label -> values that are spelt out."""

    series: str
    matchers: dict[str, list[str]] = field(default_factory=dict)


def parse(expression: str) -> tuple[list[Use], set[str]]:
    """The series of an expression, and the labels that it groups by. Raises ValueError for what is no PromQL."""
    tokens, place = [], 0
    while place < len(expression):
        found = _TOKEN.match(expression, place)
        if found is None:
            raise ValueError(f"not PromQL at {expression[place : place + 20]!r}")
        place = found.end()
        if found.lastgroup != "space":
            tokens.append((str(found.lastgroup), found.group()))
    uses: list[Use] = []
    groups: set[str] = set()
    place = 0
    while place < len(tokens):
        kind, text = tokens[place]
        following = tokens[place + 1][1] if place + 1 < len(tokens) else ""
        place += 1
        if kind != "name" or text in _WORDS:
            continue
        if text in _GROUPING:
            if following == "(":
                end = tokens.index(("sign", ")"), place)
                groups |= {word for what, word in tokens[place:end] if what == "name"}
                place = end + 1
        elif following == "{":
            end = tokens.index(("sign", "}"), place)
            use = Use(text)
            for at in range(place + 1, end, 4):  # label, sign, text, comma
                (_, label), (_, sign), (what, value) = tokens[at : at + 3]
                if what != "text":
                    raise ValueError(f"no matcher of {text}: {label}{sign}{value}")
                spelt = value[1:-1].split("|") if re.fullmatch(r"[\w|]+", value[1:-1]) else []
                use.matchers[label] = spelt
            uses.append(use)
            place = end + 1
        elif following != "(" and following not in ("by", "without"):  # those are functions and aggregations
            uses.append(Use(text))
    return uses, groups


def labels_of(series: str) -> set[str] | None:
    """The labels of a series of ours, with those that Prometheus adds; None where there is none of this name."""
    if series in OF_PROMETHEUS:
        return OF_PROMETHEUS[series] | SCRAPED
    if series in OF_BACKEND:
        return {*backend.LABELS} | SCRAPED
    if series in TABLE and TABLE[series].kind != "histogram":
        return {*TABLE[series].labels} | SCRAPED
    base, _, suffix = series.rpartition("_")
    if base in TABLE and TABLE[base].kind == "histogram" and suffix in ("bucket", "sum", "count"):
        return {*TABLE[base].labels} | SCRAPED | ({"le"} if suffix == "bucket" else set())
    return None


def panels() -> Iterator[dict[str, Any]]:
    """Those of the dashboard that show something."""
    yield from (panel for panel in DASHBOARD["panels"] if panel["type"] != "row")


def of_dashboard() -> Iterator[tuple[str, str]]:
    """(where, expression), Grafana's variables replaced by what Prometheus understands."""
    for panel in panels():
        for target in panel["targets"]:
            yield panel["title"], target["expr"].replace("$__rate_interval", "1m")
    for annotation in DASHBOARD["annotations"]["list"]:
        if "expr" in annotation:
            yield f"annotation {annotation['name']}", annotation["expr"]
    for variable in DASHBOARD["templating"]["list"]:
        if variable["type"] == "query":
            found = re.fullmatch(r"label_values\((.+), (\w+)\)", variable["definition"])
            assert found is not None, variable["name"]
            yield f"variable {variable['name']}", f"group by ({found[2]}) ({found[1]})"


EXPRESSIONS = [*((rule["alert"], rule["expr"]) for rule in RULES), *of_dashboard()]
