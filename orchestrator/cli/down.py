"""`truthgpt down`: stop the stack of a home, and clear away what a killed one left."""

from __future__ import annotations

import click

from orchestrator.cli.base import Command, json_option, print_json, settings_options
from orchestrator.settings import Settings

_EPILOG = """\b
Examples:
  truthgpt down
  truthgpt down --timeout 5
  truthgpt down --home /srv/truthgpt --json
"""


@click.command("down", cls=Command, epilog=_EPILOG, short_help="Stop the running stack.")
@click.option("--timeout", "timeout_s", type=click.FloatRange(min=0), metavar="SECONDS",
              help="Kill the stack if it has not stopped by then.  [default: drain_s + 30]")  # fmt: skip
@json_option
@settings_options("home", "drain_s")
def down(settings: Settings, timeout_s: float | None, as_json: bool) -> None:
    """Stop the running stack; with nothing running that is a success too.

    Running requests get drain_s seconds to end. Processes, shared memory and the state file that a killed stack left
    behind are removed.
    """
    from orchestrator.ops import stopping

    result = stopping.stop(settings, settings.drain_s + stopping.SLACK_S if timeout_s is None else timeout_s)
    if as_json:
        print_json({
            "stopped": result.pid is not None, "pid": result.pid, "killed": result.killed,
            "leftovers": {"processes": result.processes, "shared_memory": result.regions, "state_file": result.stale},
        })  # fmt: skip
        return
    if result.pid is not None:
        click.echo(f"stopped (process {result.pid}{', killed' if result.killed else ''})")
    elif not result.leftovers:
        click.echo(f"nothing is running from {settings.home}")
    if result.leftovers:
        counts = f"{len(result.processes)} processes, {len(result.regions)} shared memory regions"
        click.echo(f"cleared what a killed stack left: {counts}")
