"""Old versions of models, and when one may go: never one that anybody serves, or may serve.

The newest `keep_versions` of each model stay, and beside them every version that is loaded according to Triton, that a
home says is to be served, that another version needs for its graph, and the newest. Where a server that may have models
of this repository does not say which, or Redis does not say what other replicas serve, nothing goes. All are asked
again before each removal.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Sequence
from functools import partial

from orchestrator import models
from orchestrator.local import modelset
from orchestrator.models import Entry, ModelsError, Version
from orchestrator.ops import serving
from orchestrator.ops.cleanwork import Work
from orchestrator.ops.folders import opened, walked
from orchestrator.ops.serving import Elsewhere
from orchestrator.settings import Settings
from orchestrator.triton.repository import ENGINE

BUSY_S = 5.0  # that an operator who is loading a model is waited for

Named = tuple[str, int]


def old_versions(settings: Settings, work: Work) -> None:
    """Remove what may go. Raises ModelsError, and serving.CannotTell."""
    if not settings.keep_versions:
        return
    entries = _entries(settings)
    if not any(len(entry.versions) > settings.keep_versions for entry in entries):
        return
    numbers = {entry.name: len(entry.versions) for entry in entries}
    for version in old(entries, settings.keep_versions, _held(settings, work.elsewhere)):
        why = f"{version.name} has {numbers[version.name]} versions, {settings.keep_versions} are kept"
        deed = partial(_remove, settings, version.name, version.number, work.elsewhere)
        try:
            work.remove(str(version.folder), _size(settings, version), why, deed)
        except (ModelsError, modelset.Busy, serving.CannotTell) as error:
            work.failed(str(version.folder), error)


def old(entries: Sequence[Entry], keep: int, held: Collection[Named]) -> list[Version]:
    """The versions that may go, of each model the oldest first."""
    going = [
        version for entry in entries for version in reversed(entry.versions[keep:])
        if (entry.name, version.number) not in held
    ]  # fmt: skip
    gone = {(version.name, version.number) for version in going}
    needed, unknown = set[Named](), False
    for entry in entries:
        for version in entry.versions:
            if (entry.name, version.number) in gone:
                continue
            try:
                engine = version.engine
                unknown |= version.manifest is None
            except ModelsError:
                unknown = True
            else:
                needed |= {(engine.name, engine.number)} if engine is not None else set()
    # one that stays does not say which graph it needs: it may be any
    return [
        version for version in going
        if (version.name, version.number) not in needed
        and not (unknown and (version.graph_only or version.name.endswith(ENGINE)))
    ]  # fmt: skip


def _entries(settings: Settings) -> list[Entry]:
    return [entry for entry in models.read(settings.model_repository) if not entry.folder.is_symlink()]


def _held(settings: Settings, elsewhere: Elsewhere) -> set[Named]:
    """What is served, or is to be. Raises CannotTell."""
    return serving.of_repository(settings) | set(modelset.read(settings.home).items()) | set(elsewhere())


def _remove(settings: Settings, name: str, number: int, elsewhere: Elsewhere) -> None:
    """Remove one version, if it still may go while no operator loads that model.

    Raises ModelsError, modelset.Busy, CannotTell, and FileNotFoundError where it may not go any more.
    """
    there = settings.home.is_dir()  # else no stack is run from it
    with modelset.changing(settings.home, name, BUSY_S) if there else contextlib.nullcontext():
        entries = _entries(settings)
        needed = models.in_front_of(
            settings.model_repository, name, [number]
        )  # one that was to go before, and could not
        for version in old(entries, settings.keep_versions, _held(settings, elsewhere)) if not needed else ():
            if (version.name, version.number) == (name, number):
                entry = next(entry for entry in entries if entry.name == name)
                models.remove(settings.model_repository, entry, number)
                return
    raise FileNotFoundError(name)


def _size(settings: Settings, version: Version) -> int:
    """Bytes of its files."""
    path = str(version.folder)
    with opened(settings.model_repository, version.name, str(version.number)) as fd:
        inside = walked(fd, path, lambda path, error: None) if fd is not None else ()
        return sum(found.facts.st_size for found in inside if found.is_file)
