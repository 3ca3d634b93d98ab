"""`truthgpt config`: the settings with where each came from, and whether the deployment holds together."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from orchestrator.cli import table
from orchestrator.cli.base import Command, Group, json_option, print_json, settings_options
from orchestrator.settings import Settings, SettingsError


@click.group("config", cls=Group)
def config() -> None:
    """Show and check the settings."""


_SHOW_EPILOG = """\b
Examples:
  truthgpt config show
  ENVIRONMENT=production truthgpt config show --json
"""


@config.command("show", cls=Command, epilog=_SHOW_EPILOG)
@json_option
@settings_options("environment", "home")
def show(settings: Settings, as_json: bool) -> None:
    """Print every setting, its value and where it came from; secrets are masked.

    A value comes from, weakest first: its default, the profile that ENVIRONMENT names, the file (TRUTHGPT_CONFIG, else
    ./truthgpt.toml), the environment, a flag.
    """
    sources, known = settings.sources(), Settings.table()
    if as_json:
        print_json({
            "settings": [
                {
                    "name": name, "value": _value(settings, name), "source": sources[name],
                    "env": spec.env, "help": spec.help,
                }
                for name, spec in known.items()
            ],
            "file": None if settings.config_file is None else str(settings.config_file),
            "warnings": list(settings.warnings),
        })  # fmt: skip
        return
    rows = [(name, settings.shown(name) or "(unset)", sources[name]) for name in known]
    table.show(("SETTING", "VALUE", "SOURCE"), rows, folds=("VALUE",))


def _value(settings: Settings, name: str) -> object:
    value, spec = getattr(settings, name), Settings.table()[name]
    return settings.shown(name) if value is not None and (spec.secret or isinstance(value, Path)) else value


_CHECK_EPILOG = """\b
Examples:
  truthgpt config check
  TRUTHGPT_MODEL=DialoGPT-small truthgpt config check --json
"""


@config.command("check", cls=Command, epilog=_CHECK_EPILOG)
@json_option
@settings_options("environment", "home", "model", "model_repository", load=False)
def check(overrides: dict[str, Any], as_json: bool) -> None:
    """Validate a whole deployment offline; exit code 1 with each problem and its hint.

    Looks at the settings (types, ranges, ports used twice), the folders, the server and its libraries, the form of the
    Redis URL, and every file of the chosen model. Nothing is started and nothing is asked over the network.
    """
    from orchestrator.ops import offline
    from orchestrator.ops.finding import Deployment

    warnings: tuple[str, ...] = ()
    try:
        settings = Settings.load(overrides)
    except SettingsError as error:
        hint = "correct the flag, variable or file that it names; docs/settings.md describes every setting"
        problems = [offline.Problem(problem, hint) for problem in error.problems]
    else:
        problems, warnings = offline.problems(Deployment(settings)), settings.warnings
    for warning in warnings:
        click.echo(f"warning: {warning}", err=True)
    if as_json:
        rows = [asdict(problem) for problem in problems]
        print_json({"ok": not problems, "problems": rows, "warnings": list(warnings)})
    elif not problems:
        click.echo("the deployment is sound")
    for problem in [] if as_json else problems:
        click.echo(f"error: {problem.problem}", err=True)
        click.echo(f"hint: {problem.hint}", err=True)
    if problems:
        raise click.exceptions.Exit(1)
