"""What an encoder's repository entry says about itself, checked before use."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ..inflight.entry import EntryError, check_files, integer, read_manifest

TASKS = ("embeddings", "sentiment_analysis")
PROBLEMS = ("single_label", "multi_label", "regression")
DEVICES = ("auto", "cpu", "cuda")


@dataclass(frozen=True)
class Entry:
    """One version folder and how to run it.

    The graph takes ``inputs`` int64 [rows, seq], padded with ``pad``, and answers ``output`` float32 [rows, width].
    Where it ``skips_padding``, its products compute live tokens only.
    ``engine`` names the model that runs it, at ``engine_version``, where it is not this process. ``digest`` is the
    first 32 hex digits of the SHA-256 of its manifest, which names every other file's.
    """

    folder: Path
    digest: str
    task: str
    inputs: tuple[str, ...]
    output: str
    width: int
    skips_padding: bool
    max_len: int
    pad: int
    prompt: str
    problem: str
    labels: tuple[str, ...]
    device: str
    threads: int
    max_tokens_per_batch: int
    engine: str | None
    engine_version: int


def load(folder: Path, parameters: Mapping[str, str], instances: int = 1) -> Entry:
    """Read one version folder. `parameters` are config.pbtxt's. Raises EntryError; every file's SHA-256 is checked.

    `threads` 0 means the share of the cores of one of `instances`.
    """
    manifest = read_manifest(folder)
    check_files(folder, manifest)
    task = _one_of(parameters, "task", TASKS, "")
    try:
        graph, engine = manifest["graph"], manifest.get("served_by") or {}
        if manifest["task"] != task:
            raise EntryError(f"config.pbtxt says task {task}, {folder / 'manifest.json'} says {manifest['task']}")
        labels = tuple(str(label) for label in json.loads(parameters.get("labels") or "[]"))
        width = int(graph["width"])
        if task == "sentiment_analysis" and len(labels) != width:
            raise EntryError(f"config.pbtxt: parameter labels names {len(labels)} labels, the graph has {width}")
        if (parameters.get("engine") or None) != engine.get("name"):
            raise EntryError(
                f"config.pbtxt's parameter engine is {parameters.get('engine')!r}, version {folder.name} was exported "
                f"for {engine.get('name')!r}: export the model again"
            )
        return Entry(
            folder=folder,
            digest=hashlib.sha256((folder / "manifest.json").read_bytes()).hexdigest()[:32],
            task=task,
            inputs=tuple(str(name) for name in graph["inputs"]),
            output=str(graph["output"]),
            width=width,
            skips_padding=bool(graph.get("skips_padding")),
            max_len=int(graph["max_len"]),
            pad=int(manifest["tokens"]["pad"]),
            prompt=str((manifest.get("text") or {}).get("prompt") or ""),
            problem=_one_of(parameters, "problem", PROBLEMS, "single_label"),
            labels=labels,
            device=_one_of(parameters, "device", DEVICES, "auto"),
            threads=integer(parameters, "threads", 0, 1024, 0) or max(1, len(os.sched_getaffinity(0)) // instances),
            max_tokens_per_batch=integer(parameters, "max_tokens_per_batch", 1, 10_000_000, 16_384),
            engine=engine.get("name"),
            engine_version=int(engine.get("version", 0)),
        )
    except (KeyError, TypeError, ValueError, OSError) as error:
        raise EntryError(
            f"{folder / 'manifest.json'} is not an encoder's manifest that this backend can read: {error!r}; "
            "export the model again"
        ) from error


def _one_of(parameters: Mapping[str, str], name: str, allowed: tuple[str, ...], default: str) -> str:
    value = parameters.get(name) or default
    if value not in allowed:
        raise EntryError(f"config.pbtxt: parameter {name} must be one of {', '.join(allowed)}, not {value!r}")
    return value
