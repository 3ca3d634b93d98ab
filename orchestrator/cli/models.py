"""`truthgpt models`: what lies in the model repository, and what of it is served. Each further verb has a module."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from orchestrator.cli import table
from orchestrator.cli.base import Command, CommandError, Group, json_option, print_json, settings_options
from orchestrator.cli.modelcontrol import load, reload, unload
from orchestrator.cli.modelverify import verify
from orchestrator.settings import Settings

if TYPE_CHECKING:
    from pathlib import Path

    from orchestrator.models import Entry, Version


@click.group("models", cls=Group)
def models() -> None:
    """List, show, verify and remove exported models; load, reload and unload them in a running stack."""


_LIST_EPILOG = """\b
Examples:
  truthgpt models list
  truthgpt models list --json
"""


@models.command("list", cls=Command, epilog=_LIST_EPILOG)
@json_option
@settings_options("model_repository", "home")
def list_models(settings: Settings, as_json: bool) -> None:
    """List every version of every model, newest version first.

    \b
    STATE  READY        served by the running stack and answering
           UNAVAILABLE  served by the running stack and not answering now
           LOADING      being loaded into the running stack
           UNLOADING    takes no new requests; goes when what runs on it has ended
           NOT_LOADED   on disk only
           INVALID      its manifest.json cannot be read
    """
    from orchestrator import models as repository

    served = _served(settings)
    rows = []
    for entry in repository.read(settings.model_repository):
        for version in entry.versions:
            row: dict[str, object] = {"name": entry.name, "version": str(version.number), "task": version.fact("task")}
            row |= {"precision": version.fact("precision"), "target": _target(version)}
            rows.append(row | {"graph_only": version.graph_only, "state": _state(version, served)})
    if as_json:
        print_json(rows)
    elif not rows:
        click.echo(f"{settings.model_repository} has no models; `truthgpt export` adds one", err=True)
    else:
        for row in rows:
            row["task"] = "graph only" if row.pop("graph_only") else row["task"]
        titles = ("NAME", "VERSION", "TASK", "PRECISION", "TARGET", "STATE")
        table.show(titles, [[str(value or "?") for value in row.values()] for row in rows])


_SHOW_EPILOG = """\b
Examples:
  truthgpt models show demo
  truthgpt models show demo --version 1 --json
"""


@models.command("show", cls=Command, epilog=_SHOW_EPILOG)
@click.argument("name")
@click.option("--version", "number", type=click.IntRange(min=1), metavar="N", help="A version.  [default: the newest]")
@json_option
@settings_options("model_repository", "home")
def show(settings: Settings, name: str, number: int | None, as_json: bool) -> None:
    """Explain a model: where it came from, how exact it is, and what each of its batching settings does.

    --json has the manifest and the parameters of config.pbtxt as they are, and in `batching` each setting's name, value
    and words.
    """
    from orchestrator import models as repository
    from orchestrator import pbtxt
    from orchestrator.cli import batching, describe

    entry = repository.get(settings.model_repository, name)
    version = entry.newest if number is None else entry.version(number)
    config = entry.config()
    parameters = repository.parameters(config)
    explained = batching.settings(pbtxt.model_config(config), version.manifest or {}, parameters)
    state = _state(version, _served(settings))
    if as_json:
        print_json({
            "name": name, "version": str(version.number), "path": str(version.folder), "state": state,
            "manifest": version.manifest, "parameters": parameters,
            "batching": [asdict(setting) for setting in explained],
        })  # fmt: skip
        return
    if version.manifest is None:
        path = version.folder / "manifest.json"
        raise CommandError(f"{path} cannot be read: {version.fault}", f"export {name} again")
    click.echo("\n".join(describe.lines(version, version.manifest, parameters, state, explained)))


for _command in (verify, load, reload, unload):
    models.add_command(_command)

_REMOVE_EPILOG = """\b
Examples:
  truthgpt models remove old-model
  truthgpt models remove demo --version 1 --yes
"""


@models.command("remove", cls=Command, epilog=_REMOVE_EPILOG)
@click.argument("name")
@click.option("--version", "number", type=click.IntRange(min=1), metavar="N", help="Remove this version only.")
@click.option("--yes", "-y", is_flag=True, help="Do not ask.")
@json_option
@settings_options("model_repository", "home")
def remove(settings: Settings, name: str, number: int | None, yes: bool, as_json: bool) -> None:
    """Remove a model or one of its versions from the repository. What is served is never removed.

    The graph of a natively served model, an entry of its own, is removed with it.
    """
    from orchestrator import models as repository

    entry = repository.get(settings.model_repository, name)
    removed = list(entry.versions) if number is None else [entry.version(number)]
    _refuse_served(settings, entry, removed)
    _refuse_graph(settings, entry, removed)
    what = f"{name} ({', '.join(f'version {version.number}' for version in removed)})"
    if not yes:
        _ask(what)
    paths = repository.remove(settings.model_repository, entry, number)
    for version in removed:
        paths += _remove_graph(settings, version)
    if as_json:
        print_json({
            "name": name, "versions": [str(version.number) for version in removed], "paths": [str(p) for p in paths],
        })  # fmt: skip
    else:
        click.echo(f"removed {what}")


def _refuse_graph(settings: Settings, entry: Entry, removed: list[Version]) -> None:
    from orchestrator import models as repository

    numbers = {version.number for version in removed}
    for front in repository.in_front_of(settings.model_repository, entry.name, numbers):
        message = f"{entry.name} is the graph of {front.name} version {front.number}"
        raise CommandError(message, f"`truthgpt models remove {front.name}` removes both")


def _remove_graph(settings: Settings, version: Version) -> list[Path]:
    """Remove what was the graph of a version that is gone, unless another version has it, too."""
    from orchestrator import models as repository

    try:
        found = repository.engine_of(settings.model_repository, version)
    except repository.ModelsError:  # there is nothing to remove
        found = None
    if found is None or repository.in_front_of(settings.model_repository, found[0].name, [found[1].number]):
        return []
    return repository.remove(settings.model_repository, found[0], found[1].number)


def _ask(what: str) -> None:
    """Let a person agree. Raises CommandError when they do not, or when there is nobody to ask."""
    try:
        agreed = click.confirm(f"Remove {what} for good?", err=True)
    except click.Abort as error:
        if isinstance(error.__context__, KeyboardInterrupt):
            raise
        raise CommandError("nobody is there to agree", "give --yes to remove without being asked") from error
    if not agreed:
        raise CommandError("nothing was removed", "answer y, or give --yes")


def _refuse_served(settings: Settings, entry: Entry, removed: list[Version]) -> None:
    from orchestrator.cli import stack
    from orchestrator.local import modelset
    from orchestrator.ops import serving

    found = stack.running(settings)
    versions = {version.number for version in removed}
    served = _served(settings)
    in_use = any((entry.name, str(number)) in served for number in versions)
    # What is to be served counts even while it does not answer, and so does another home's.
    wanted = modelset.read(settings.home).get(entry.name) if found is not None else None
    newest = entry.newest.number in versions
    if in_use or wanted in versions or (newest and wanted is None and found is not None and found.model == entry.name):
        raise CommandError(
            f"{entry.name} is served by the running stack",
            f"unload it first with `truthgpt models unload {entry.name}`, or stop the stack with `truthgpt down`",
        )
    pid = serving.server_of(settings.model_repository, entry.name)
    if newest and pid is not None and wanted is None:
        raise CommandError(f"{entry.name} is served by a Triton server (process {pid})", "stop that stack first")


def _served(settings: Settings) -> dict[tuple[str, str], str]:
    """State of each (model, version) that is in the running stack; nothing when none runs or it does not answer."""
    from orchestrator.cli import stack
    from orchestrator.ops import serving

    states = serving.of_home(settings)
    for row in stack.report(settings)["models"]:
        states[(str(row.get("name")), str(row.get("version")))] = str(row["state"])
    return states


def _target(version: Version) -> str | None:
    """What runs it: onnx or tensorrt; of a manifest from before there was a choice, onnx."""
    return None if version.manifest is None else version.fact("target") or "onnx"


def _state(version: Version, served: dict[tuple[str, str], str]) -> str:
    state = served.get((version.name, str(version.number)))
    return state or ("NOT_LOADED" if version.manifest is not None else "INVALID")
