"""How a summary's figures (monitor/summary.py) read at a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def lines(figures: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(what, how it is), for people; what nobody can tell is left out."""
    if not figures:
        return []
    rows = [
        ("requests", _requests(figures)),
        ("latency", _quantiles(figures.get("latency_s"))),
        ("to token", _quantiles(figures.get("ttft_s"))),
        ("tokens", f"{figures.get('tokens_per_s', 0):g} generated a second"),
        ("users", _users(figures.get("active_users"))),
        ("breaker", _breakers(figures.get("models") or ())),
        ("cache", _cache(figures.get("cache") or {})),
        ("memory", _memory(figures.get("memory") or {})),
        *((f"gpu {gpu.get('gpu')}", _part(gpu.get("used_bytes"), gpu.get("total_bytes")))
          for gpu in figures.get("gpus") or ()),
        ("disk", _disks(figures.get("disks") or ())),
        ("jobs", _jobs(figures.get("jobs") or ())),
        ("backup", _backup(figures.get("backup") or {}, figures.get("time"))),
        ("alerts", _alerts(figures.get("alerts") or {})),
    ]  # fmt: skip
    return [(what, how) for what, how in rows if how]


def size(count: float | None) -> str:
    """Bytes for people."""
    if count is None:
        return "?"
    unit = 0
    while count >= 1024 and unit + 1 < len(_UNITS):
        count, unit = count / 1024, unit + 1
    return f"{count:.0f} {_UNITS[unit]}" if unit == 0 or count >= 100 else f"{count:.1f} {_UNITS[unit]}"


def seconds(value: float | None) -> str:
    """A duration for people."""
    if value is None:
        return "-"
    return f"{value * 1000:.3g} ms" if value < 1 else f"{value:.3g} s"


def ago(age_s: float) -> str:
    """An age for people."""
    for unit, length in (("d", 86_400), ("h", 3600), ("min", 60)):
        if age_s >= 2 * length:
            return f"{age_s / length:.0f} {unit}"
    return f"{max(0, age_s):.0f} s"


def _requests(figures: Mapping[str, Any]) -> str:
    window = ago(figures.get("window_s") or 0)
    failed = f"{figures.get('errors', 0)} failed ({figures.get('error_rate', 0):.1%})"
    others = ", ".join(f"{figures[name]} {name}" for name in ("refused", "cancelled") if figures.get(name))
    rate = f"{figures.get('requests_per_s', 0):g} a second, {figures.get('in_flight', 0)} now"
    return f"{figures.get('requests', 0)} in {window}, {failed}{', ' if others else ''}{others}, {rate}"


def _quantiles(values: Mapping[str, Any] | None) -> str:
    if not values or all(value is None for value in values.values()):
        return ""
    return ", ".join(f"{name} {seconds(value)}" for name, value in values.items())


def _users(count: int | None) -> str:
    return "" if count is None else f"about {count} in five minutes"


def _breakers(models: Any) -> str:
    """Of the models that are left alone, or that the next request tries."""
    shown = {"open": "open", "half_open": "half open"}
    found = [f"{model['name']} {shown[model['breaker']]}" for model in models if model.get("breaker") in shown]
    return f"{', '.join(found)} (`truthgpt breaker show`)" if found else ""


def _cache(cache: Mapping[str, Any]) -> str:
    asked = cache.get("hits", 0) + cache.get("misses", 0)
    return f"{cache['hits']} of {asked} answers ({cache['hit_rate']:.1%})" if asked else ""


def _memory(memory: Mapping[str, Any]) -> str:
    known = [f"gateway {size(memory['gateway_bytes'])}"] if memory.get("gateway_bytes") is not None else []
    whole = _part(memory.get("used_bytes"), memory.get("total_bytes"))
    return ", ".join([*known, *([f"machine {whole}"] if whole else [])])


def _part(used: float | None, total: float | None) -> str:
    return f"{size(used)} of {size(total)} ({used / total:.0%})" if used is not None and total else ""


def _disks(disks: Any) -> str:
    known = [disk for disk in disks if disk.get("free_bytes") is not None]
    return ", ".join(f"{disk['folder']} {size(disk['free_bytes'])} free" for disk in known)


def _jobs(jobs: Any) -> str:
    failing = [job["name"] for job in jobs if job.get("failing")]
    if failing:
        return f"{', '.join(failing)} failed (`truthgpt jobs history`)"
    return f"{len(jobs)} scheduled, none failing" if jobs else ""


def _backup(backup: Mapping[str, Any], now: object) -> str:
    from datetime import datetime

    if not backup.get("wanted") or "newest_at" not in backup:
        return ""
    newest = backup["newest_at"]
    if newest is None:
        return "none yet"
    return f"the newest is {ago(datetime.fromisoformat(str(now)).timestamp() - newest)} old"


def _alerts(alerts: Mapping[str, Any]) -> str:
    firing = alerts.get("firing")
    if firing is None:
        return ""
    critical = f", {alerts['critical']} critical" if alerts.get("critical") else ""
    return f"{firing} firing{critical} (`truthgpt alerts list`)" if firing else "none firing"
