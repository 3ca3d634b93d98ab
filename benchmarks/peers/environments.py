"""The engines that ours is compared with: an environment of their own each, pinned, and what each is told."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

from benchmarks.contenders import Worker, WorkerSpec, worker
from benchmarks.contest import Source
from benchmarks.workloads import Workload

HERE = Path(__file__).parent
FOLDER = HERE.parent / ".peers"
THREADS, SLOTS = 2, 16
CACHE_GB = 2  # of OpenVINO's pipeline: as much as it asks for in any workload
SHORT = 256  # positions up to which llama.cpp's flash attention is the faster one
CONVERSIONS = 3  # kept: the oldest of other checkpoints are removed


@dataclass(frozen=True)
class Peer:
    """One engine. `settings`: the name of each of its precisions and what its worker is told for it."""

    name: str
    module: str
    settings: Mapping[str, Mapping[str, Any]]
    together: bool = False
    build: Mapping[str, str] = field(default_factory=dict)  # the environment of pip
    without: Sequence[str] = ()  # packages that are taken out again

    @property
    def folder(self) -> Path:
        return FOLDER / self.name

    @property
    def python(self) -> Path:
        return self.folder / "venv" / "bin" / "python"

    @property
    def requirements(self) -> Path:
        return HERE / f"requirements-{self.name}.txt"

    @property
    def _wanted(self) -> str:
        return hashlib.sha256(self.requirements.read_bytes() + repr(sorted(self.build.items())).encode()).hexdigest()

    @property
    def ready(self) -> bool:
        stamp = self.folder / "installed"
        return self.python.exists() and stamp.is_file() and stamp.read_text() == self._wanted

    def install(self) -> None:
        """Build what is missing or of other versions; what a broken-off attempt left is used. Raises ClickException."""
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "installed").unlink(missing_ok=True)
        log = self.folder / "install.log"
        if not self.python.exists():
            self._run(log, sys.executable, "-m", "venv", str(self.folder / "venv"))
        pip = [str(self.python), "-m", "pip", "--disable-pip-version-check"]
        self._run(log, *pip, "install", "-r", str(self.requirements))
        if self.without:
            self._run(log, *pip, "uninstall", "-y", *self.without)
        (self.folder / "installed").write_text(self._wanted)

    def _run(self, log: Path, *argv: str) -> None:
        with log.open("ab") as output:
            done = subprocess.run(argv, stdout=output, stderr=output, env={**os.environ, **self.build})
        if done.returncode != 0:
            words = log.read_text(errors="replace")[-2000:]
            raise click.ClickException(f"{self.name}: {' '.join(argv[1:5])} failed; {log} has all of it:\n{words}")

    def sources(self, checkpoint: Path, converted: Path, logs: Path) -> list[Source]:
        return [self._source(precision, checkpoint, converted, logs) for precision in self.settings]

    def _source(self, precision: str, checkpoint: Path, converted: Path, logs: Path) -> Source:
        @asynccontextmanager
        async def start(workload: Workload) -> AsyncIterator[list[Worker]]:
            if self.together and not workload.together:
                yield []
                return
            setting = {
                "checkpoint": str(checkpoint), "converted": str(converted), "threads": THREADS, "slots": SLOTS,
                "max_len": workload.max_len, "cache_gb": CACHE_GB, "prefix_cache": workload.prefix,
                "flash": workload.max_len <= SHORT, **self.settings[precision],
            }  # fmt: skip
            spec = WorkerSpec(self.name, precision, self.python, self.module, setting, together=self.together)
            async with worker(spec, logs) as made:
                yield [made]

        return Source(f"{self.name} {precision}", start)


def has(flag: str) -> bool:
    """Whether the processor has an instruction set."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return flag in next((line.split() for line in lines if line.startswith("flags")), [])


def _openvino() -> Peer:
    settings = {"f32": {"weights": "fp32", "inference": "f32"}, "int8+f32": {"weights": "int8", "inference": "f32"}}
    if has("avx512_bf16") or has("amx_bf16"):
        settings |= {
            "bf16": {"weights": "fp32", "inference": "bf16"},
            "int8+bf16": {"weights": "int8", "inference": "bf16"},
        }
    return Peer("openvino", "openvino_worker", settings, without=("torchvision",))


def _llamacpp() -> Peer:
    # Its AMX path for 8-bit weights ends the process with a segmentation fault at 16 rows (0.3.36): left out there.
    settings = {
        weights: {"weights": weights, "extra_buffers": not (weights == "q8_0" and has("amx_int8"))}
        for weights in ("f32", "bf16", "q8_0")
    }
    return Peer("llamacpp", "llamacpp_worker", settings, build={"CMAKE_ARGS": "-DGGML_NATIVE=ON -DMTMD_BUILD=OFF"})


def _ctranslate2() -> Peer:
    settings = {weights: {"weights": weights} for weights in ("float32", "int8")}
    return Peer("ctranslate2", "ctranslate2_worker", settings, together=True)


PEERS = {peer.name: peer for peer in (_openvino(), _llamacpp(), _ctranslate2())}


def conversions(checkpoint: Path) -> Path:
    """The folder of a checkpoint's conversions, which are kept for other runs."""
    weights = hashlib.sha256((checkpoint / "model.safetensors").read_bytes()).hexdigest()[:16]
    folder = FOLDER / "converted" / weights
    folder.mkdir(parents=True, exist_ok=True)
    folder.touch()
    others = sorted(folder.parent.iterdir(), key=lambda path: path.stat().st_mtime)
    for old in others[:-CONVERSIONS]:
        shutil.rmtree(old)
    return folder
