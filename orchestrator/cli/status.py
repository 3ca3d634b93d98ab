"""`truthgpt status`: whether a stack runs, what it serves and how it is."""

from __future__ import annotations

from typing import Any

import click

from orchestrator.cli import figures
from orchestrator.cli.base import Command, json_option, print_json, settings_options
from orchestrator.settings import Settings

_EPILOG = """\b
Examples:
  truthgpt status
  truthgpt status --json
  until truthgpt status --json >/dev/null; do sleep 1; done
"""


@click.command("status", cls=Command, epilog=_EPILOG)
@json_option
@settings_options("home")
def status(settings: Settings, as_json: bool) -> None:
    """Show the running stack. Exit code 0 if it is ready to serve, 1 if not or if nothing runs.

    Rates and latencies are those of the last five minutes. Active users are callers, counted approximately (to within
    2 %) over all replicas.
    """
    from orchestrator.cli import stack

    found = stack.report(settings)
    if as_json:
        print_json(found)
    else:
        _show(found)
    if not found["ready"]:
        if not as_json:
            click.echo(f"error: {found['detail']}", err=True)
            what = "`truthgpt doctor` looks for the cause" if found["running"] else "`truthgpt up --detach` starts one"
            click.echo(f"hint: {what}", err=True)
        raise click.exceptions.Exit(1)


def _show(found: dict[str, Any]) -> None:
    if found["running"]:
        for line in shown(found):
            click.echo(line)


def shown(found: dict[str, Any]) -> list[str]:
    """A running stack for people, as `stack.report` has it."""
    word = "ready" if found["ready"] else "not ready"
    grpc = f", gRPC {found['grpc']}" if found["grpc"] else ""
    lines = [f"{word}, up for {_duration(found['uptime_s'])}, {found['http']}{grpc} (process {found['pid']})"]
    for row in found["models"]:
        what = {"embed": ", embeds", "classify": ", classifies", "infer": ", infers"}.get(row.get("operation"), "")
        load = f", {row['running']} running, {row['waiting']} waiting, {row['slots']} slots" if "slots" in row else ""
        name = f"{row['name']} version {row['version']}"
        lines.append(f"  {'model':<9} {name}: {row['state']}{what}{_device(row)}{load}")
    servers = found["tritons"] if len(found["tritons"]) > 1 else []
    lines += [f"  {'triton':<9} {row.get('state', 'unknown')}, {row['http']}{_share(row)}" for row in servers]
    for name in ("redis",) if servers else ("triton", "redis"):
        up = {True: "up", False: "away", None: "unknown"}[found[name]["up"]]
        lines.append(f"  {name:<9} {up}, {found[name]['url']}")
    if found["figures"] is None:
        return [*lines, f"  {'figures':<9} unknown: {found['ops']} does not answer"]
    return lines + [f"  {what:<9} {how}" for what, how in figures.lines(found["figures"])]


def _share(row: dict[str, Any]) -> str:
    """What a Triton server has of the requests, if the gateway says."""
    return f", {row['outstanding']} running" if "outstanding" in row else ""


def _device(row: dict[str, Any]) -> str:
    if row.get("fallback"):
        return ", on the CPU because its device failed"
    return f", on {row['device']}" if row.get("device") not in (None, "cpu") else ""


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
