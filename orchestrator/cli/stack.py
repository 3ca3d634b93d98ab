"""The stack of a home as commands see it: found by its state file, asked through its gateway."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path
from typing import Any

from orchestrator.cli.base import CommandError
from orchestrator.client import GatewayClient, GatewayError
from orchestrator.local import lone, state
from orchestrator.settings import Settings, mask_url

ASK_S = 3.0


def running(settings: Settings) -> state.State | None:
    """The state of the running stack, or of a gateway that runs by itself; None when there is neither."""
    found = state.read(settings.home)
    return found if found is not None and found.running else lone.find(settings)


def require(settings: Settings) -> state.State:
    """The state of the running stack. Raises CommandError when there is none."""
    found = running(settings)
    if found is None:
        raise CommandError(f"no stack is running from {settings.home}", "start one with `truthgpt up --detach`")
    return found


def addresses(found: state.State) -> dict[str, object]:
    """What `up --json` prints of a stack."""
    return {
        "http": found.http, "grpc": found.grpc, "ops": found.ops, "triton_http": found.triton_http,
        "triton_grpc": found.triton_grpc, "tritons": tritons(found), "redis": mask_url(found.redis), "pid": found.pid,
    }  # fmt: skip


def tritons(found: state.State) -> list[dict[str, Any]]:
    """The stack's own Triton servers."""
    return [{"http": place.http, "grpc": place.grpc} for place in found.tritons]


def report(settings: Settings) -> dict[str, Any]:
    """What `status --json` prints: `ready`, `models`, `triton`, `redis`, `uptime_s`, `figures`, and what else is known.

    `figures` are the summary's (monitor/summary.py). Values that nobody can tell are null. `detail` says in one
    sentence why the stack is not ready.
    """
    found = running(settings)
    empty: dict[str, Any] = {"ready": False, "models": [], "triton": {"url": None, "up": None}}
    empty |= {"redis": {"url": None, "up": None}, "uptime_s": None, "running": found is not None, "figures": None}
    empty["tritons"] = []
    if found is None:
        return empty | {"detail": f"no stack is running from {settings.home}"}
    empty["uptime_s"] = round(max(0.0, time.time() - found.started), 1)
    empty["triton"]["url"], empty["redis"]["url"] = found.triton_http, mask_url(found.redis)
    empty["tritons"] = tritons(found)
    known: dict[str, Any] = {"pid": found.pid, "http": found.http, "grpc": found.grpc, "ops": found.ops}
    known["home"] = str(Path(settings.home).absolute())
    with contextlib.suppress(GatewayError):
        known["figures"] = GatewayClient(found.ops, ASK_S).summary()
    try:
        health = GatewayClient(found.http, ASK_S).health()
    except GatewayError as error:
        return empty | known | {"detail": f"the gateway does not answer: {error}"}
    models = [row | {"state": "READY" if row.get("ready") else "UNAVAILABLE"} for row in rows(health)]
    reasons = [f"{row.get('name')}: {row.get('reason') or 'not ready'}" for row in models if not row.get("ready")]
    ready = health.get("ready") is True
    detail = "" if ready else "; ".join(reasons) or ("draining" if health.get("draining") else "no model is served")
    return empty | known | {
        "ready": ready,
        "models": models,
        "triton": empty["triton"] | _object(health.get("triton")),
        "tritons": _with_health(empty["tritons"], health.get("tritons")),
        "redis": empty["redis"] | _object(health.get("redis")),
        "in_flight": health.get("in_flight"),
        "detail": detail,
    }  # fmt: skip


def rows(health: dict[str, Any]) -> list[dict[str, Any]]:
    """The models in a gateway's deep health."""
    models = health.get("models")
    return [row for row in models if isinstance(row, dict)] if isinstance(models, list) else []


def _with_health(own: list[dict[str, Any]], told: object) -> list[dict[str, Any]]:
    """Each Triton server with what the gateway says of it, and those that the gateway alone knows."""
    said = {str(row.get("url")): row for row in told if isinstance(row, dict)} if isinstance(told, list) else {}
    known = [row | said.pop(row["http"], {}) for row in own]
    return known + [{"http": url, "grpc": None} | row for url, row in said.items()]


def _object(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def flags(settings: Settings) -> str:
    """What a later command needs to find this stack: ` --home PATH` if it was given as a flag, else nothing."""
    chosen = settings.sources()["home"].startswith("flag")
    return f" --home {os.path.relpath(settings.home)}" if chosen else ""
