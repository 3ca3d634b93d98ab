"""The engines that take turns: a worker process each, or Triton and the gateway as `truthgpt up` starts them."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import redis

from benchmarks import checkpoint, streaming
from benchmarks.gateway_systems import POLICIES
from orchestrator.ops.keyring import Keyring
from tests.e2e.stack import Stack, wait_until

ROOT = Path(__file__).parent.parent
LOAD_S, RUN_S = 600.0, 600.0
LINE_BYTES = 1 << 28


class Failed(Exception):
    """An engine that did not start, or a run that is no result; the message says what was said."""


class Contender(Protocol):
    """`engine` and `precision` name its rows. `together`: it takes whole batches of equal lengths only."""

    engine: str
    precision: str
    together: bool

    async def run(self, conversations: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Hold these conversations; see peers/serving.py. Raises Failed."""
        ...

    def about(self) -> dict[str, Any]:
        """Versions and settings."""
        ...


@dataclass(frozen=True)
class WorkerSpec:
    """How a worker is started: its interpreter, its module in benchmarks.peers, and what `load` is told."""

    engine: str
    precision: str
    python: Path
    module: str
    setting: Mapping[str, Any]
    together: bool = False
    environ: Mapping[str, str] = field(default_factory=dict)


class Worker:
    """A worker process. While it is not its turn it is stopped (SIGSTOP): no thread of its spins beside the others."""

    def __init__(self, spec: WorkerSpec, process: asyncio.subprocess.Process, log: Path) -> None:
        self.engine, self.precision, self.together = spec.engine, spec.precision, spec.together
        self._process, self._log, self._about = process, log, dict[str, Any]()

    async def run(self, conversations: list[dict[str, Any]]) -> list[dict[str, Any]]:
        self._tell(signal.SIGCONT)
        try:
            return list((await self._ask({"op": "run", "conversations": conversations}, RUN_S))["answers"])
        finally:
            self._tell(signal.SIGSTOP)

    def about(self) -> dict[str, Any]:
        return self._about

    async def load(self, setting: Mapping[str, Any]) -> None:
        self._about = (await self._ask({"op": "load", **setting}, LOAD_S))["about"]
        self._tell(signal.SIGSTOP)

    async def stop(self) -> None:
        self._tell(signal.SIGKILL)
        await self._process.wait()

    def _tell(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    async def _ask(self, what: Mapping[str, Any], patience_s: float) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(what).encode() + b"\n")
            async with asyncio.timeout(patience_s):
                await self._process.stdin.drain()
                line = await self._process.stdout.readline()
        except (TimeoutError, ConnectionError) as error:
            raise Failed(
                f"{self._name}: {error or 'no answer'} after up to {patience_s:g} s\n{self._words()}"
            ) from error
        if not line:
            raise Failed(f"{self._name} has ended\n{self._words()}")
        reply = json.loads(line)
        if not reply["ok"]:
            raise Failed(f"{self._name}: {reply['error']}")
        return dict(reply)

    @property
    def _name(self) -> str:
        return f"{self.engine} {self.precision}"

    def _words(self) -> str:
        return self._log.read_text(errors="replace")[-1500:]


@asynccontextmanager
async def worker(spec: WorkerSpec, logs: Path) -> AsyncIterator[Worker]:
    """A worker that has loaded its model. Raises Failed."""
    log = logs / f"{spec.engine}-{spec.precision}.log".replace(" ", "-")
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    with log.open("wb") as errors:
        process = await asyncio.create_subprocess_exec(
            str(spec.python), "-m", f"benchmarks.peers.{spec.module}", stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=errors, cwd=ROOT, env={**kept, **spec.environ, "PYTHONPATH": str(ROOT)}, limit=LINE_BYTES,
            start_new_session=True, preexec_fn=_die_with_parent,
        )  # fmt: skip
    made = Worker(spec, process, log)
    try:
        await made.load(spec.setting)
        yield made
    finally:
        await made.stop()


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


@dataclass
class Clients:
    """Streaming clients of an endpoint of ours."""

    engine: str
    precision: str
    endpoint: streaming.Endpoint
    together: bool = False
    settings: dict[str, Any] = field(default_factory=dict)

    async def run(self, conversations: list[dict[str, Any]]) -> list[dict[str, Any]]:
        try:
            return await streaming.converse(self.endpoint, conversations)
        except (streaming.Failed, OSError, TimeoutError, ValueError, LookupError) as error:
            raise Failed(f"{self.engine} {self.precision}: {type(error).__name__}: {error}") from error

    def about(self) -> dict[str, Any]:
        return self.settings


@asynccontextmanager
async def stack(repository: Path, home: Path, models: list[str]) -> AsyncIterator[tuple[int, int, str]]:
    """`truthgpt up` in production's profile with every policy on; Triton's port, the gateway's and an API key.

    Raises Failed.
    """
    extra = {**POLICIES, "TRUTHGPT_AUTH": "keys", "TRUTHGPT_MODELS": ",".join(models[1:])}
    running = Stack(home, repository, model=models[0], extra=extra)
    try:
        await asyncio.to_thread(running.start)
        with redis.Redis.from_url(running.state.redis) as client:
            key = Keyring(client).create("bench", note="benchmark")[1]
        await asyncio.to_thread(wait_until, lambda: running.knows(key), 10, "the gateway knows the key")
    except AssertionError as error:
        await asyncio.to_thread(running.cli, "down")
        raise Failed(f"the stack does not start: {error}") from error
    try:
        yield running.ports["TRITON_HTTP"], running.ports["HTTP"], key
    finally:
        await asyncio.to_thread(running.cli, "down")


def export(
    source: Path, repository: Path, precision: str, slots: int, max_len: int, parameters: Mapping[str, str]
) -> str:
    """Export the checkpoint and set `parameters` of its config.pbtxt; the entry's name. Raises Failed.

    `precision` +kv8: with int8 slots.
    """
    weights, _, slots_of = precision.partition("+")
    name = f"bench-{precision.replace('+', '-')}-{max_len}"
    options: list[str] = []
    if weights == "int4":
        options += ["--allow-drift", "1"]  # random weights have no structure to keep
    if slots_of == "kv8":
        options += ["--kv-cache-dtype", "int8"]
    elif slots_of:
        raise Failed(f"{precision}: behind + stands kv8 or nothing")
    try:
        checkpoint.export(source, repository, name, weights, slots, max_len, *options)
    except RuntimeError as error:
        shutil.rmtree(repository / name, ignore_errors=True)
        raise Failed(str(error)) from error
    config = repository / name / "config.pbtxt"
    config.write_text(with_parameters(config.read_text(), parameters))
    return name


def with_parameters(config: str, parameters: Mapping[str, str]) -> str:
    """A config.pbtxt with these parameters, in the place of those that it has of the same names."""
    for name, value in parameters.items():
        row = f'parameters {{ key: "{name}" value {{ string_value: "{value}" }} }}'
        pattern = rf'parameters\s*:?\s*\{{\s*key:\s*"{re.escape(name)}"\s*value\s*:?\s*\{{[^}}]*\}}\s*\}}'
        config, count = re.subn(pattern, lambda _, row=row: row, config)
        config += "" if count else f"{'' if config.endswith(chr(10)) else chr(10)}{row}\n"
    return config


def own_python() -> Path:
    return Path(sys.executable)
