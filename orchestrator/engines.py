"""TensorRT engines in a model repository, and whether this machine can run them. Looks at files only.

An engine belongs to the GPU, the TensorRT and the ONNX Runtime that built it; another one's is refused here, before
Triton reads it. Where it comes from stands in the manifest's `engine` block (a `model.plan` built at export) or in
`engine/engine.json` beside the engines that the backend built when it loaded the entry first. docs/tensorrt.md
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from orchestrator.models import Version

TARGET = "tensorrt"
FOLDER, RECORD = "engine", "engine.json"
SMI = ("nvidia-smi", "--query-gpu=name,compute_cap,driver_version", "--format=csv,noheader")
SMI_S = 5.0


@dataclass(frozen=True)
class Gpu:
    """One GPU as nvidia-smi names it, such as `NVIDIA A100-SXM4-40GB`, `8.0`, `580.95.05`."""

    name: str
    compute_capability: str
    driver: str

    def __str__(self) -> str:
        return f"{self.name} (compute capability {self.compute_capability})"


@dataclass(frozen=True)
class Machine:
    """What an engine depends on. A version that is None cannot be found out here and is not compared."""

    gpus: tuple[Gpu, ...]
    tensorrt: str | None = None
    onnxruntime: str | None = None

    def __str__(self) -> str:
        return ", ".join(str(gpu) for gpu in self.gpus) or "no NVIDIA GPU"


class ForeignEngine(Exception):
    """An entry's engine cannot run here; `hint` says how to get one that can."""

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.hint = hint


def this_machine(query: Sequence[str] = SMI, deadline_s: float = SMI_S) -> Machine:
    """What is here. An nvidia-smi that is missing, fails or does not answer in time means that there is no GPU."""
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=deadline_s, check=True)  # noqa: S603 (no shell)
    except (OSError, subprocess.SubprocessError):
        rows = []
    else:
        rows = [[part.strip() for part in line.rsplit(",", 2)] for line in done.stdout.splitlines()]
    gpus = tuple(Gpu(*row) for row in rows if len(row) == 3)
    return Machine(gpus, _tensorrt() if gpus else None, _installed("onnxruntime-gpu"))


def engine_of(version: Version) -> tuple[Mapping[str, Any], Path] | None:
    """What is recorded of a version's engine, and the file that says so; None when it has no engine.

    Raises ForeignEngine when the record cannot be read.
    """
    record = version.folder / FOLDER / RECORD
    if record.exists():
        try:
            engine = json.loads(record.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ForeignEngine(f"{record} cannot be read: {error}", _rebuild(version, record)) from error
        return engine if isinstance(engine, dict) else {}, record
    block = (version.manifest or {}).get("engine")
    return (block, version.folder / "manifest.json") if isinstance(block, dict) else None


def require(version: Version, machine: Machine | None = None) -> None:
    """Raise ForeignEngine when a version has an engine that this machine cannot run, or a damaged one."""
    found = engine_of(version)
    if found is None:
        return
    engine, record = found
    machine = machine or this_machine()
    what, hint = f"{version.name} version {version.number}", _rebuild(version, record)
    built = Gpu(*(str(engine.get(key, "unknown")) for key in ("gpu", "compute_capability", "driver")))
    if not any((gpu.name, gpu.compute_capability) == (built.name, built.compute_capability) for gpu in machine.gpus):
        raise ForeignEngine(f"{what} has a TensorRT engine for {built}; this machine has {machine}", hint)
    for name, here in (("tensorrt", machine.tensorrt), ("onnxruntime", machine.onnxruntime)):
        there = engine.get(name)  # an engine built by TensorRT alone knows no ONNX Runtime
        if here is not None and there is not None and _release(str(there)) != _release(here):
            raise ForeignEngine(f"{what} has a TensorRT engine made by {name} {there}; here is {name} {here}", hint)
    files = engine.get("files")
    for name, digest in (files if isinstance(files, dict) else {}).items():
        if _sha256(record.parent / Path(name).name) != digest:
            raise ForeignEngine(f"{record.parent / name} is missing or damaged: its SHA-256 is not the record's", hint)


def _rebuild(version: Version, record: Path) -> str:
    if record.name == RECORD:
        return f"remove {record.parent}, and the next load builds engines for this machine: rm -r '{record.parent}'"
    return f"export it again on this machine: truthgpt export MODEL --name {version.name} --target {TARGET}"


def _release(version: str) -> str:
    """`10.13.3` of `10.13.3.9`: the library tells three numbers, its Python package four."""
    return ".".join(version.split(".")[:3])


def _tensorrt() -> str | None:
    for library in ("libnvinfer.so.10", "libnvinfer.so.11"):
        try:
            number = int(ctypes.CDLL(library).getInferLibVersion())
        except (OSError, AttributeError):
            continue
        return f"{number // 10_000}.{number // 100 % 100}.{number % 100}"
    return _installed("tensorrt")


def _installed(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _sha256(path: Path) -> str | None:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return None
