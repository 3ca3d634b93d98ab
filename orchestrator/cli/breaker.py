"""`truthgpt breaker`: which models are being left alone, and trying them again at once."""

from __future__ import annotations

import dataclasses

import click

from orchestrator.cli.base import Command, CommandError, Group, audited, json_option, print_json, settings_options
from orchestrator.settings import Settings


@click.group("breaker", cls=Group)
def breaker() -> None:
    """Show and reset the models' circuit breakers.

    A model that fails several times in a row (breaker_failures) is refused with 503 for a while (breaker_open_s); then
    one request tries it.
    """


_SHOW_EPILOG = """\b
Examples:
  truthgpt breaker show
  truthgpt breaker show --json
"""


@breaker.command("show", cls=Command, epilog=_SHOW_EPILOG)
@json_option
@settings_options("home")
def show(settings: Settings, as_json: bool) -> None:
    """Show the breakers that have ever opened: closed, half_open or open, and for how long."""
    from orchestrator.ops import breakers
    from orchestrator.ops.redis import connect

    with connect(settings) as client:
        found = breakers.read(client)
    if as_json:
        print_json({"breakers": {row.model: dataclasses.asdict(row) for row in found}})
    elif not found:
        click.echo("no breaker has opened")
    for row in found if not as_json else ():
        wait = f", tries again in {row.open_s:.1f} s" if row.state == "open" else ""
        click.echo(f"{row.model}: {row.state}, {row.failures} failures in a row{wait}")


_RESET_EPILOG = """\b
Examples:
  truthgpt breaker reset
  truthgpt breaker reset demo
"""


@breaker.command("reset", cls=Command, epilog=_RESET_EPILOG)
@click.argument("model", required=False)
@json_option
@settings_options("home")
def reset(settings: Settings, model: str | None, as_json: bool) -> None:
    """Close MODEL's breaker, or all of them, in every worker."""
    from orchestrator.ops import breakers
    from orchestrator.ops.redis import connect

    with connect(settings) as client:
        heard = breakers.reset(client, model)
    if not heard:
        raise CommandError("no gateway heard it", "`truthgpt status` shows whether one runs")
    audited(settings, "breaker reset", detail=f"model={model}" if model else "all models")
    if as_json:
        print_json({"reset": model, "workers": heard})
    else:
        click.echo(f"closed {'all breakers' if model is None else f'the breaker of {model}'} in {heard} workers")
