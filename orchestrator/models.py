"""A model repository as it lies on disk: entries, versions, manifests, and which model to serve.

    <repository>/<name>/config.pbtxt
    <repository>/<name>/<version>/{manifest.json, model.onnx, tokenizer.json, …}

Files are the only thing that the exporter, the backend and this package share; nothing here needs a running server.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from orchestrator import pbtxt
from orchestrator.settings import MODEL_NAME, Settings

STAGING = ".staging"
REMOVED = ".removed-"  # begins the name of what is being removed where there was no space for staging
DEMO = "demo"


class ModelsError(Exception):
    """The repository does not have or allow what was asked; `hint` says what to do."""

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.hint = hint


@dataclass(frozen=True)
class Engine:
    """What a natively served encoder's manifest says of the entry that has its graph, which is loaded before it."""

    name: str
    number: int
    sha256: str  # of that version's manifest.json


@dataclass(frozen=True)
class Version:
    """One version folder. `manifest` is None when manifest.json cannot be read; `fault` then says why."""

    name: str
    number: int
    folder: Path
    manifest: dict[str, Any] | None
    fault: str = ""

    def fact(self, key: str) -> str | None:
        """A text of the manifest, such as its task or precision; None when it is not there."""
        value = (self.manifest or {}).get(key)
        return value if isinstance(value, str) else None

    @property
    def graph_only(self) -> bool:
        """Whether this is the graph of another entry, which Triton runs for it: nobody asks it by itself."""
        return bool((self.manifest or {}).get("graph_only"))

    @property
    def engine(self) -> Engine | None:
        """The entry that has its graph; None when it has its own. Raises ModelsError when what is said is no name."""
        said = (self.manifest or {}).get("served_by")
        if not said:
            return None
        try:
            return Engine(str(said["name"]), int(said["version"]), str(said["manifest_sha256"]))
        except (KeyError, TypeError, ValueError) as error:
            message = f"{self.folder / 'manifest.json'} does not say which entry has its graph"
            raise ModelsError(message, f"export {self.name} again") from error

    @property
    def digest(self) -> str:
        """What a backend that has loaded this version says in its heartbeat. Raises ModelsError."""
        path = self.folder / "manifest.json"
        try:
            return hashlib.sha256(path.read_bytes()).hexdigest()[:32]
        except OSError as error:
            raise ModelsError(f"{path} cannot be read: {error.strerror}", "export the model again") from error


@dataclass(frozen=True)
class Entry:
    """One model folder with its versions, newest first."""

    name: str
    folder: Path
    versions: tuple[Version, ...]

    @property
    def newest(self) -> Version:
        return self.versions[0]

    @property
    def config_path(self) -> Path:
        return self.folder / "config.pbtxt"

    def config(self) -> pbtxt.Message:
        """config.pbtxt, parsed. Raises ModelsError."""
        try:
            return pbtxt.parse(self.config_path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ModelsError(f"{self.config_path} cannot be read: {error}", "export the model again") from error

    def pinned(self, *numbers: int) -> dict[str, Any]:
        """config.pbtxt as Triton's `load` takes it, by which these versions are served and no other.

        Raises ModelsError.

        What was checked is what is loaded, although an export may publish a newer version meanwhile.
        """
        return pin(self.config(), *numbers)

    def version(self, number: int) -> Version:
        """One version. Raises ModelsError."""
        for version in self.versions:
            if version.number == number:
                return version
        have = ", ".join(str(version.number) for version in self.versions)
        raise ModelsError(f"{self.name} has no version {number}", f"it has {have}")


def pin(config: pbtxt.Message, *numbers: int) -> dict[str, Any]:
    """A parsed config.pbtxt as Triton's `load` takes it, with these versions."""
    return pbtxt.model_config(config) | {"version_policy": {"specific": {"versions": [*numbers]}}}


def parameters(config: pbtxt.Message) -> dict[str, str]:
    """The `parameters` of a parsed config.pbtxt as text."""
    found = {}
    for row in config.get("parameters", []):
        for key, value in zip(row.get("key", []), row.get("value", []), strict=False):
            text = value.get("string_value", [""])[-1] if isinstance(value, dict) else ""
            found[str(key)] = str(text)
    return found


def read(repository: Path) -> list[Entry]:
    """Every model of a repository by name; a folder without a numbered version is none. Raises ModelsError."""
    try:
        folders = sorted(path for path in repository.iterdir() if re.fullmatch(MODEL_NAME, path.name))
        found = [_entry(path) for path in folders if path.is_dir()]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise ModelsError(
            f"the model repository {repository} cannot be read: {error.strerror}",
            "check its owner and permissions, or choose another with TRUTHGPT_MODEL_REPOSITORY",
        ) from error
    return [entry for entry in found if entry.versions]


def get(repository: Path, name: str) -> Entry:
    """One model. Raises ModelsError when it is not there."""
    entries = read(repository)
    for entry in entries:
        if entry.name == name:
            return entry
    have = ", ".join(entry.name for entry in entries)
    hint = f"it has {have}" if entries else "it is empty; export a model with `truthgpt export`"
    raise ModelsError(f"there is no model {name} in {repository}", hint)


def engine_of(repository: Path, version: Version) -> tuple[Entry, Version] | None:
    """The entry and version that has the graph of a version; None when it has its own. Raises ModelsError."""
    said = version.engine
    if said is None:
        return None
    try:
        entry = get(repository, said.name)
        return entry, entry.version(said.number)
    except ModelsError as error:
        what = f"{version.name} version {version.number} needs {said.name} version {said.number}"
        hint = f"copy it there, too, or export {version.name} again with --serve-with native"
        raise ModelsError(f"{what}: {error}", hint) from error


def with_engines(repository: Path, wanted: Mapping[str, int]) -> dict[str, int]:
    """Model -> version of what has to be loaded so that these are served, in that order. Raises ModelsError."""
    found: dict[str, int] = {}
    for name, number in wanted.items():
        engine = engine_of(repository, get(repository, name).version(number))
        if engine is not None:
            found[engine[0].name] = engine[1].number
        found[name] = number
    return found


def in_front_of(repository: Path, name: str, numbers: Collection[int]) -> list[Version]:
    """The versions that need one of these versions of a graph. Raises ModelsError."""
    found = []
    for entry in read(repository):
        for version in entry.versions:
            with contextlib.suppress(ModelsError):  # one that does not say what it needs is served by nobody
                if version.engine is not None and version.engine.name == name and version.engine.number in numbers:
                    found.append(version)
    return found


def _entry(folder: Path) -> Entry:
    # A number as Triton takes it: no sign, no leading zero, at least 1.
    numbers = sorted((int(p.name) for p in folder.iterdir() if re.fullmatch(r"[1-9][0-9]{0,17}", p.name)), reverse=True)
    return Entry(folder.name, folder, tuple(_version(folder, number) for number in numbers))


def _version(model: Path, number: int) -> Version:
    folder = model / str(number)
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        if isinstance(manifest, dict):
            return Version(model.name, number, folder, manifest)
        fault = "it is not a JSON object"
    except (OSError, ValueError, RecursionError) as error:
        fault = error.strerror or str(error) if isinstance(error, OSError) else str(error)
    return Version(model.name, number, folder, None, fault)


@dataclass(frozen=True)
class Choice:
    """The model to serve. `export_demo`: it has to be exported first. `note`: why it is not the one in the settings.

    `further` are served beside it.
    """

    model: str
    export_demo: bool = False
    note: str = ""
    further: tuple[str, ...] = ()


def choose(settings: Settings, names: Sequence[str]) -> Choice:
    """Which of the exported models to serve. Nothing is downloaded unasked. Raises ModelsError.

    What a person chose is served or refused. What the profile names is served if it has been exported; else the demo
    model, which is exported first into an empty repository; else the only model there is.
    """
    further = dict.fromkeys(settings.models.split(",") if settings.models else ())
    for name in further:
        if name not in names and name != settings.model:
            message = f"the model {name} ({settings.sources()['models']}) is not in {settings.model_repository}"
            raise ModelsError(message, f"export it first: {_how_to(name)}")
    choice = _default(settings, names)
    return replace(choice, further=tuple(name for name in further if name != choice.model))


def choice(settings: Settings) -> Choice:
    """What `truthgpt up` serves of the repository of the settings. Raises ModelsError."""
    entries = read(settings.model_repository)
    graphs = {entry.name for entry in entries if entry.newest.graph_only}
    for name in (settings.model, *(settings.models or "").split(",")):
        if name in graphs:
            message = f"{name} is the graph of another model and is not served by itself"
            raise ModelsError(message, "name the model that it belongs to; its graph is loaded with it")
    return choose(settings, [entry.name for entry in entries if entry.name not in graphs])


def _default(settings: Settings, names: Sequence[str]) -> Choice:
    wanted, source = settings.model, settings.sources()["model"]
    if wanted in names:
        return Choice(wanted)
    if not source.startswith(("profile", "default")):
        if wanted == DEMO and not names:
            return Choice(DEMO, export_demo=True)
        message = f"the model {wanted} ({source}) is not in {settings.model_repository}"
        raise ModelsError(message, f"export it first: {_how_to(wanted)}")
    missing = f"{wanted} ({source}) is not exported"
    if not names:
        return Choice(DEMO, export_demo=True, note=f"{missing}: serving the demo model")
    if DEMO in names:
        return Choice(DEMO, note=f"{missing}: serving the demo model")
    if len(names) == 1:
        return Choice(names[0], note=f"{missing}: serving {names[0]}, the only model in {settings.model_repository}")
    raise ModelsError(
        f"{missing}, and {settings.model_repository} has several others: {', '.join(names)}",
        f"choose one with TRUTHGPT_MODEL, such as TRUTHGPT_MODEL={names[0]}",
    )


def _how_to(name: str) -> str:
    if name == DEMO:
        return "truthgpt export demo/model --name demo"
    if name.startswith("DialoGPT-"):
        return f"truthgpt export microsoft/{name}"
    return f"truthgpt export PATH_OR_HUB_ID --name {name}"


def remove(repository: Path, entry: Entry, version: int | None = None) -> list[Path]:
    """Remove a model, or one of its versions; nobody ever sees half of it. Returns the folders that went.

    Removing the only version removes the model. The folder is renamed into the repository's staging first, under a name
    that the next export clears away should this process die before it has; on a full disk, on which no folder can be
    made, to such a name in the repository itself. Raises ModelsError.
    """
    whole = version is None or [v.number for v in entry.versions] == [entry.version(version).number]
    target = entry.folder if whole or version is None else entry.version(version).folder
    staging, name = repository / STAGING, f"{entry.name}-{os.getpid()}-{secrets.token_hex(4)}"
    hidden = staging / name
    try:
        for attempt in range(3):
            try:
                staging.mkdir(exist_ok=True)
                target.rename(hidden)
                break
            except FileNotFoundError:  # an export that ended just now has taken .staging away
                if attempt == 2 or not target.exists():
                    raise
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
                hidden = repository / f"{REMOVED}{name}"
                target.rename(hidden)
                break
        if hidden.is_symlink():
            hidden.unlink()
        else:
            shutil.rmtree(hidden)
        _remove_if_empty(staging)
    except OSError as error:
        raise ModelsError(
            f"{target} could not be removed: {error.strerror}", "check the repository's owner and permissions"
        ) from error
    return [target]


def _remove_if_empty(folder: Path) -> None:
    try:
        folder.rmdir()
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT):  # exports at work there are fine
            raise
