"""What is checked by `models verify`, and before a version is loaded: every file against its manifest, and more.

A check is a function from an entry and one of its versions to sentences about what is wrong. `CHECKS` has them all: a
target that needs one of its own, such as an engine that runs on one kind of GPU only, adds it there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from orchestrator import engines
from orchestrator.models import Entry, ModelsError, Version, engine_of
from orchestrator.ops import entrycheck

Advance = Callable[[int], object]  # is told how many more bytes have been read
Check = Callable[[Entry, Version, Advance], list[str]]


@dataclass(frozen=True)
class Verdict:
    """What was found out about one version. `bytes` and `files` are those that its manifest lists."""

    name: str
    version: int
    files: int
    bytes: int
    problems: tuple[tuple[str, str], ...]  # (check, sentence)

    @property
    def ok(self) -> bool:
        return not self.problems


def check_manifest(entry: Entry, version: Version, advance: Advance) -> list[str]:
    """manifest.json can be read, has a known format and is about this version."""
    if version.manifest is None:
        return [f"{version.folder / 'manifest.json'} cannot be read: {version.fault}"]
    return entrycheck.of_manifest(entry, version, version.manifest)


def check_files(entry: Entry, version: Version, advance: Advance) -> list[str]:
    """Every listed file is there with its SHA-256, and no other one."""
    return [] if version.manifest is None else entrycheck.of_files(version.folder, version.manifest, advance)


def check_config(entry: Entry, version: Version, advance: Advance) -> list[str]:
    """config.pbtxt can be read and agrees with the manifest."""
    return [] if version.manifest is None else entrycheck.of_config(entry, version.manifest)


def check_engine(entry: Entry, version: Version, advance: Advance) -> list[str]:
    """A TensorRT engine, where there is one, was built for what this machine has."""
    try:
        engines.require(version)
    except engines.ForeignEngine as error:
        return [f"{error}; {error.hint}"]
    return []


def check_graph(entry: Entry, version: Version, advance: Advance) -> list[str]:
    """The entry that has its graph, where that is another one, is the one that it was exported with."""
    try:
        found = engine_of(entry.folder.parent, version)
        if found is None or version.engine is None or version.engine.sha256.startswith(found[1].digest):
            return []
    except ModelsError as error:
        return [str(error)]
    path = found[1].folder / "manifest.json"
    return [f"{path} is not the one that {version.name} version {version.number} was exported with"]


CHECKS: dict[str, Check] = {
    "manifest": check_manifest,
    "files": check_files,
    "config": check_config,
    "engine": check_engine,
    "graph": check_graph,
}


def verify(
    entry: Entry, version: Version, advance: Advance = lambda count: None, checks: Mapping[str, Check] = CHECKS
) -> Verdict:
    """Run every check. Reads each file once, a piece at a time, however large it is."""
    problems = [(name, text) for name, check in checks.items() for text in check(entry, version, advance)]
    files = _files(version)
    return Verdict(version.name, version.number, len(files), size(version), tuple(problems))


def refusal(
    entry: Entry, version: Version, advance: Advance = lambda count: None, checks: Mapping[str, Check] = CHECKS
) -> tuple[str, str] | None:
    """Why a version is not loaded, and what to do about it; None when nothing is wrong."""
    verdict = verify(entry, version, advance, checks)
    if verdict.ok:
        return None
    return (
        f"{entry.name} version {version.number} is not loaded: " + "; ".join(text for _, text in verdict.problems),
        f"export {entry.name} again, or choose an intact version: `truthgpt models verify {entry.name} --all`",
    )


def graph_refusal(entry: Entry, version: Version) -> tuple[str, str] | None:
    """As `refusal`, of what no backend of ours checks when it is loaded: a graph, and that it is its model's."""
    return refusal(entry, version, checks=CHECKS if version.graph_only else {"graph": check_graph})


def size(version: Version) -> int:
    """Bytes that will be read."""
    return sum(int(row["bytes"]) for row in _files(version).values() if _has_size(row))


def _files(version: Version) -> dict[str, Any]:
    files = (version.manifest or {}).get("files")
    return files if isinstance(files, dict) else {}


def _has_size(row: object) -> bool:
    return isinstance(row, dict) and isinstance(row.get("bytes"), int)
