"""`truthgpt doctor`: what is wrong with this set-up, and how to mend it."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import click

from orchestrator.cli.base import Command, json_option, print_json, settings_options

_EPILOG = """\b
Examples:
  truthgpt doctor
  truthgpt doctor --json
"""


@click.command("doctor", cls=Command, epilog=_EPILOG, short_help="Find set-up faults and say how to mend them.")
@json_option
@settings_options("home", load=False)
def doctor(overrides: dict[str, Any], as_json: bool) -> None:
    """Look for the commonest set-up faults, with or without a running stack.

    Looks at the system, packages, Triton's server and its libraries, folders, disk, shared memory, ports, Redis, the
    model and its files, the gateway, and what a killed stack left behind. Proves each switch of the production profile
    by using it: a test alert is sent, a scratch breaker tripped, an answer cached, the newest backup verified. Says how
    to mend each fault. Exit code 0 only if all is well.
    """
    from orchestrator.ops.doctor import examine
    from orchestrator.ops.finding import Deployment, Finding
    from orchestrator.settings import Settings, SettingsError

    try:
        settings = Settings.load(overrides)
    except SettingsError as error:
        hint = "correct the flag, variable or file that it names; docs/settings.md describes every setting"
        findings = [Finding("settings", False, "; ".join(error.problems), hint)]
    else:
        hint = "correct or unset it" if settings.warnings else ""
        told = "; ".join(settings.warnings) or f"profile {settings.environment}"
        findings = [Finding("settings", True, told, hint), *examine(Deployment(settings))]
    ok = all(found.ok is not False for found in findings)
    if as_json:
        print_json({"ok": ok, "checks": [asdict(found) for found in findings]})
    else:
        for found in findings:
            mark = "n/a" if found.ok is None else ("warn" if found.hint else "ok") if found.ok else "FAULT"
            click.echo(f"{mark:<6} {found.name:<14} {found.detail}")
            if found.hint:
                click.echo(f"{'':<21} -> {found.hint}")
    if not ok:
        raise click.exceptions.Exit(1)
