"""`truthgpt limits`: what a caller may do, what was used of it, and changing both while the stack runs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from orchestrator.cli import table
from orchestrator.cli.base import Command, Group, audited, json_option, print_json, settings_options
from orchestrator.cli.keyflags import UNSET, confirmed, limit_options
from orchestrator.settings import Settings

if TYPE_CHECKING:
    from orchestrator.domain import Window


@click.group("limits", cls=Group)
def limits() -> None:
    """Show, set and reset the rate limits of a caller: a key's id, or an address where no key is needed.

    Windows roll: no interval of a window's length has more than its limit. Each endpoint (generate, embed, classify,
    infer) is counted by itself, whatever protocol it is asked in.
    """


_SHOW_EPILOG = """\b
Examples:
  truthgpt limits show k2s7dhq3mzpa
  truthgpt limits show 192.0.2.7 --json
"""


@limits.command("show", cls=Command, epilog=_SHOW_EPILOG)
@click.argument("id")
@json_option
@settings_options("home")
def show(settings: Settings, id: str, as_json: bool) -> None:
    """Show what ID has used of each limit. Windows without a limit are not counted and not shown.

    Where neither `limits set` nor the key says anything, the limit is that of these settings (TRUTHGPT_LIMIT_PER_MINUTE
    and so on), which should be the gateway's. --json: id, tenant, limits, and for each endpoint and window used, limit,
    remaining and reset_s, the seconds until something of it is free again.
    """
    from orchestrator.app import default_limits
    from orchestrator.ops import usage
    from orchestrator.ops.redis import connect

    with connect(settings) as client:
        subject = usage.find(client, id)
        holding = subject.limits(default_limits(settings))
        found = usage.windows(client, subject, holding)
    if as_json:
        shown = {endpoint: {window.name: _facts(window) for window in each} for endpoint, each in found.items()}
        print_json({"id": subject.id, "tenant": subject.tenant, "limits": asdict(holding), "endpoints": shown})
        return
    rows = list(_rows(found))
    click.echo(f"{subject.id} of {subject.tenant}{'' if rows else ' has no limits'}")
    if rows:
        numbers = ("USED", "LIMIT", "REMAINING", "RESET")
        table.show(("ENDPOINT", "WINDOW", *numbers), rows, right=numbers)


_SET_EPILOG = """\b
Examples:
  truthgpt limits set k2s7dhq3mzpa --per-minute 120 --concurrency 0
  truthgpt limits set 192.0.2.7 --per-day default
"""


@limits.command("set", cls=Command, epilog=_SET_EPILOG)
@click.argument("id")
@limit_options(minimum=0)
@json_option
@settings_options("home")
def set_limits(settings: Settings, id: str, as_json: bool, **changes: int | None) -> None:
    """Set limits of ID, over those that its key was made with. 0 is no limit; `default` takes back what was set.

    Holds in every worker within a second. What is not named stays as it is, and so does what was used.
    """
    from orchestrator.app import default_limits
    from orchestrator.ops import usage
    from orchestrator.ops.keyring import Keyring
    from orchestrator.ops.redis import connect

    given = {name: None if value == UNSET else value for name, value in changes.items() if value is not None}
    if not given:
        raise click.UsageError("give at least one limit to set, such as --per-minute 60")
    with connect(settings) as client:
        subject = usage.find(client, id)
        Keyring(client).set_limits(subject.id, given)
        subject = usage.find(client, id)
    audited(settings, "limits set", subject.id, " ".join(f"{name}={value}" for name, value in given.items()))
    holding = asdict(subject.limits(default_limits(settings)))
    if as_json:
        document = {"id": subject.id, "tenant": subject.tenant, "limits": holding, "set": dict(subject.override)}
        print_json(document)
        return
    shown = ", ".join(f"{name} {value}" for name, value in holding.items() if value) or "no limits"
    click.echo(f"{subject.id} of {subject.tenant}: {shown}")


_RESET_EPILOG = """\b
Examples:
  truthgpt limits reset k2s7dhq3mzpa
  truthgpt limits reset 192.0.2.7 --yes
"""


@limits.command("reset", cls=Command, epilog=_RESET_EPILOG)
@click.argument("id")
@click.option("--yes", "-y", is_flag=True, help="Do not ask.  [default: ask only where somebody types]")
@json_option
@settings_options("home")
def reset(settings: Settings, id: str, yes: bool, as_json: bool) -> None:
    """Forget what ID has used, at every endpoint. Its limits stay, and running requests go on counting."""
    from orchestrator.ops import usage
    from orchestrator.ops.redis import connect

    with connect(settings) as client:
        subject = usage.find(client, id)
        confirmed(yes, f"Forget what {subject.id} of {subject.tenant} has used?")
        count = usage.forget(client, subject)
    audited(settings, "limits reset", subject.id)
    if as_json:
        print_json({"id": subject.id, "tenant": subject.tenant, "endpoints": count})
    else:
        click.echo(f"{subject.id} of {subject.tenant}: {'forgotten' if count else 'nothing had been used'}")


def _facts(window: Window) -> dict[str, Any]:
    return {
        "used": window.used, "limit": window.limit, "remaining": window.remaining, "reset_s": round(window.reset_s, 3),
    }  # fmt: skip


def _rows(found: dict[str, tuple[Window, ...]]) -> Iterator[tuple[str, ...]]:
    from orchestrator.keys import format_duration

    for endpoint, each in found.items():
        for window in each:
            counts = (str(count) for count in (window.used, window.limit, window.remaining))
            yield endpoint, window.name, *counts, format_duration(math.ceil(window.reset_s)) if window.used else "-"
