"""`truthgpt models load|unload|reload`: which models a running stack serves, and in which version."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import click

from orchestrator.cli.base import Command, CommandError, audited, json_option, print_json, settings_options
from orchestrator.cli.progress import Progress
from orchestrator.settings import Settings

if TYPE_CHECKING:
    from orchestrator.local import state
    from orchestrator.ops.modelcontrol import Control, Outcome

_version = click.option(
    "--version", "number", type=click.IntRange(min=1), metavar="N", help="A version.  [default: the newest]"
)
_timeout = click.option(
    "--timeout-s", type=click.FloatRange(0, 86_400), metavar="X",
    help="Longest wait for another operator, and for the model to load.  [default: start_timeout_s]",
)  # fmt: skip

_LOAD_EPILOG = """\b
Examples:
  truthgpt models load embedder
  truthgpt models load chat --version 3 --json
"""


@click.command("load", cls=Command, epilog=_LOAD_EPILOG)
@click.argument("name")
@_version
@_timeout
@json_option
@settings_options("model_repository", "home")
def load(settings: Settings, name: str, number: int | None, timeout_s: float | None, as_json: bool) -> None:
    """Serve another model of the repository, beside those that are served.

    Every file is checked against the manifest first. The model stays loaded until `truthgpt models unload` or
    `truthgpt down`, also over a crash of Triton; to have it with every start, name it in TRUTHGPT_MODELS.
    """
    done = _run(settings, timeout_s, lambda control: control.load(name, number))
    if done.changed:
        audited(settings, "models load", detail=f"{name} version {done.version}")
        _tell(done, "READY", as_json, f"{name} version {done.version} is loaded and answers")
    else:
        _tell(done, "READY", as_json, f"{name} version {done.version} is loaded already")


_RELOAD_EPILOG = """\b
Examples:
  truthgpt models reload demo
  truthgpt models reload demo --version 1
"""


@click.command("reload", cls=Command, epilog=_RELOAD_EPILOG)
@click.argument("name")
@_version
@_timeout
@json_option
@settings_options("model_repository", "home")
def reload(settings: Settings, name: str, number: int | None, timeout_s: float | None, as_json: bool) -> None:
    """Move a served model to its newest version, or back to an older one, without a failed request.

    Every file is checked, then the new version is loaded beside the old one, takes over all new requests in one step,
    and the old one goes when its requests have ended. While it lasts, both are in memory. A version that does not load
    changes nothing: the old one goes on serving, and the exit code is 1. A changed config.pbtxt is taken up, too.
    """
    done = _run(settings, timeout_s, lambda control: control.reload(name, number))
    if done.changed:
        audited(settings, "models reload", detail=f"{name} from version {done.before} to {done.version}")
        text = f"{name} is served in version {done.version}"
        if done.before != done.version:
            text += f", no longer in version {done.before}"
        if done.draining:
            text += "; what runs on the old one may end, then it leaves the memory"
        _tell(done, "READY", as_json, text)
    else:
        _tell(done, "READY", as_json, f"there is nothing new: {name} is served in version {done.version}")


_UNLOAD_EPILOG = """\b
Examples:
  truthgpt models unload embedder
  truthgpt models unload demo --force
"""


@click.command("unload", cls=Command, epilog=_UNLOAD_EPILOG)
@click.argument("name")
@click.option("--force", is_flag=True, help="Also the stack's default model.")
@_timeout
@json_option
@settings_options("model_repository", "home", "drain_s")
def unload(settings: Settings, name: str, force: bool, timeout_s: float | None, as_json: bool) -> None:
    """Stop serving a model and free its memory.

    New requests are refused at once. Running ones may end, for up to drain_s seconds; then they get an error.
    """

    def work(control: Control) -> Outcome:
        return control.unload(name)

    done = _run(settings, timeout_s, work, lambda found: _refuse_default(found, name, force))
    if done.changed:
        audited(settings, "models unload", detail=name)
        _tell(done, "NOT_LOADED", as_json, f"{name} is unloaded" + ("; its process was ended" if done.draining else ""))
    else:
        _tell(done, "NOT_LOADED", as_json, f"{name} is not loaded")


def _refuse_default(found: state.State, name: str, force: bool) -> None:
    if found.model == name and not force:
        raise CommandError(
            f"{name} is the model that this stack was started for",
            "give --force to unload it all the same; `truthgpt models reload` moves it to another version",
        )


def _run(
    settings: Settings, timeout_s: float | None, work: Callable[[Control], Outcome],
    check: Callable[[state.State], None] = lambda found: None,
) -> Outcome:  # fmt: skip
    from orchestrator.cli import stack
    from orchestrator.ops.modelcontrol import Control

    found = stack.require(settings)
    limit_s = settings.start_timeout_s if timeout_s is None else timeout_s
    with Progress() as progress:
        control = Control(settings, found, limit_s, progress.step)
        check(found)
        return work(control)


def _tell(done: Outcome, state: str, as_json: bool, text: str) -> None:
    if not done.noticed:
        click.echo("warning: the gateway does not confirm it; `truthgpt status` shows what it serves", err=True)
    if not as_json:
        return click.echo(text)
    return print_json({
        "name": done.name, "version": _text(done.version), "before": _text(done.before), "state": state,
        "changed": done.changed, "draining": [str(version) for version in done.draining],
    })  # fmt: skip


def _text(version: int | None) -> str | None:
    return None if version is None else str(version)
