"""A result file: the runs of one measurement with all that is needed to repeat it, written whole or not at all."""

from __future__ import annotations

import json
import os
import platform
import tempfile
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from orchestrator.bench.answers import BenchError, shown
from orchestrator.bench.plan import Target

FORMAT = "truthgpt-bench/1"
MAX_BYTES = 64 << 20
MOST = 1e15  # of a figure that makes sense
NOTHING = 0.05  # a change smaller than that is noise
FIGURES = ("ttft_s", "itl_s", "tpot_s", "latency_s")
# figure of a run -> whether more of it is better
COMPARED = {
    "output_tokens_per_s": True, "requests_per_s": True, "goodput_per_s": True, "ttft_s.p50": False,
    "ttft_s.p99": False, "itl_s.p50": False, "itl_s.p99": False, "latency_s.p50": False, "latency_s.p99": False,
    "errors": False,
}  # fmt: skip


def document(target: Target, runs: list[dict[str, Any]], at: datetime | None = None) -> dict[str, Any]:
    """What `truthgpt bench --json` prints."""
    return {
        "format": FORMAT,
        "time": (at or datetime.now(UTC)).isoformat(timespec="seconds"),
        "target": target.to_json(),
        "client": {"cores": os.cpu_count(), "system": platform.platform(), "python": platform.python_version()},
        "runs": runs,
    }


def write(path: Path, text: str) -> None:
    """Raises OSError."""
    path = path.resolve()  # a link stays one
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def read(path: Path) -> dict[str, Any]:
    """A file that `--output` has written. Raises BenchError, OSError."""
    hint = "give files that `truthgpt bench --output FILE` has written"
    with path.open("rb") as file:
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise BenchError(f"{path} is larger than {MAX_BYTES} bytes, which no result is", hint)
    try:
        found = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BenchError(f"{path} is not JSON: {error}", hint) from error
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise BenchError(f"{path} is no result of {FORMAT}", hint)
    runs = found.get("runs")
    if not isinstance(runs, list) or not runs or not all(_good(run) for run in runs):
        raise BenchError(f"{path} has runs without figures", hint)
    if not isinstance(found.get("target"), dict) or not isinstance(found.get("client", {}), dict):
        raise BenchError(f"{path} does not say what was measured", hint)
    return found


def _good(run: object) -> bool:
    if not isinstance(run, dict) or (run.get("concurrency") is None) == (run.get("rate") is None):
        return False
    if not all(isinstance(run.get(name) or {}, dict) for name in (*FIGURES, "load", "error_kinds")):
        return False
    numbers = [run.get(name) for name in COMPARED if "." not in name]
    numbers += [value for name in FIGURES for value in (run.get(name) or {}).values()]
    told = [run.get("concurrency") or run.get("rate"), *(value for value in numbers if value is not None)]
    return all(_number(value) for value in told)


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < MOST


def figure(run: Mapping[str, Any], name: str) -> Any:
    """One figure of a run, by a name of COMPARED; None where it has none."""
    outer, _, inner = name.partition(".")
    value = run.get(outer)
    if not inner:
        return value
    return value.get(inner) if isinstance(value, Mapping) else None


def place(run: Mapping[str, Any]) -> str:
    """Where in a sweep a run is, for people."""
    clients = run.get("concurrency")
    return f"{run['rate']:g} requests/s" if clients is None else f"{clients} client{'' if clients == 1 else 's'}"


def pairs(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """The runs of two results at the same place of the sweep. Raises BenchError where there is none."""
    there = {place(run): run for run in other["runs"]}
    found = [(run, there[place(run)]) for run in one["runs"] if place(run) in there]
    if not found:
        ours, theirs = (", ".join(place(run) for run in result["runs"]) for result in (one, other))
        raise BenchError(f"the two have no run in common: {ours}; {theirs}", "measure both with the same --concurrency")
    return found


def ratio(before: float | None, after: float | None) -> float | None:
    """After to before; None where there is none."""
    return None if before is None or after is None or not before else after / before


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """What the two were not measured alike in, for people: their figures then say something else, too."""
    told = []
    for first, second in pairs(one, other)[:1]:
        loads = first.get("load") or {}, second.get("load") or {}
        for name in sorted({*loads[0], *loads[1]} - {"concurrency", "rate"}):
            if loads[0].get(name) != loads[1].get(name):
                told.append(shown(f"{name}: {loads[0].get(name)} and {loads[1].get(name)}"))
    for part in ("target", "client"):
        for name in sorted({*(one.get(part) or {}), *(other.get(part) or {})}):
            values = [(result.get(part) or {}).get(name) for result in (one, other)]
            if values[0] != values[1]:
                told.append(shown(f"{name}: {values[0]} and {values[1]}"))
    return told
