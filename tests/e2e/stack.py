"""A whole running stack for the end-to-end tests: `truthgpt up` on free ports, and eyes on what it does."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from orchestrator.local import state, tritonserver
from orchestrator.local.tritonserver import PORT_STEP
from tests.clock import awake

COMMAND = [sys.executable, "-m", "orchestrator.cli"]


def free_ports(count: int, servers: int = 1) -> list[int]:
    """Ports that nobody listens on, and below those that the system gives to outgoing connections meanwhile. So are
    those that further Triton servers have above each one, and all of them are different.
    """
    found: list[int] = []
    taken: set[int] = set()
    for port in random.SystemRandom().sample(range(10_000, 30_000), 1000):  # each test process draws others
        wanted = {port + PORT_STEP * number for number in range(servers)}
        if not wanted & taken and all(map(_is_free, wanted)):
            found.append(port)
            taken |= wanted
        if len(found) == count:
            return found
    raise AssertionError("no free ports")


def _is_free(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
        return True
    return False


@dataclass
class Stack:
    """One home with its own ports. `start` is `truthgpt up --detach`, `stop` is `truthgpt down`."""

    home: Path
    repository: Path
    model: str = "counting"
    extra: dict[str, str] = field(default_factory=dict)
    environ: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        names = ("HTTP", "GRPC", "OPS", "TRITON_HTTP", "TRITON_GRPC", "TRITON_METRICS")
        servers = int(self.extra.get("TRUTHGPT_TRITONS", "1"))
        self.ports = dict(zip(names, free_ports(len(names), servers), strict=True))
        kept = {k: v for k, v in os.environ.items() if not k.startswith("TRUTHGPT_") and k != "ENVIRONMENT"}
        self.environ = {
            **kept,
            **{f"TRUTHGPT_{name}_PORT": str(port) for name, port in self.ports.items()},
            "TRUTHGPT_HOME": str(self.home),
            "TRUTHGPT_MODEL_REPOSITORY": str(self.repository),
            "TRUTHGPT_MODEL": self.model,
            "TRUTHGPT_DRAIN_S": "5",
            # on a busy machine Redis takes longer than the default of 20 ms now and then, which costs a cached answer
            "TRUTHGPT_REDIS_TIMEOUT_S": "0.5",
            **self.extra,
        }
        for number in range(2, servers + 1):
            self.ports[f"TRITON_HTTP_{number}"] = self.ports["TRITON_HTTP"] + PORT_STEP * (number - 1)

    def cli(self, *arguments: str, timeout: float = 90, **options: Any) -> subprocess.CompletedProcess[str]:
        """Run one `truthgpt` command against this stack."""
        return subprocess.run(
            [*COMMAND, *arguments], env=self.environ, capture_output=True, text=True, timeout=timeout, **options
        )

    def start(self) -> dict[str, Any]:
        done = self.cli("up", "--detach", "--json")
        assert done.returncode == 0, done.stderr + self.logs()
        return dict(json.loads(done.stdout))

    def stop(self) -> None:
        done = self.cli("down")
        assert done.returncode == 0, done.stderr

    @property
    def state(self) -> state.State:
        now = state.read(self.home)
        assert now is not None
        return now

    def pid(self, name: str) -> int:
        """The pid of triton, triton-2, redis or gateway, or of the model's stub."""
        if name == "supervisor":
            return self.state.pid
        if name != "stub":
            return self.state.processes[name]
        # the state is written a moment after a server that was started again is ready
        wait_until(lambda: tritonserver.stubs(self.state.processes["triton"], self.model), 5, "the model has a stub")
        return tritonserver.stubs(self.state.processes["triton"], self.model)[0].pid

    def logs(self) -> str:
        """The end of every log, for a failing test's message."""
        texts = [f"--- {p.name}\n{p.read_text(errors='replace')[-3000:]}" for p in (self.home / "logs").glob("*.log")]
        return "\n".join(texts)

    def request(
        self, method: str, path: str, body: object = None, port: str = "HTTP", timeout: float = 10,
        headers: dict[str, str] | None = None,
    ) -> Any:  # fmt: skip
        """One HTTP exchange: (status, headers, body bytes)."""
        connection = http.client.HTTPConnection("127.0.0.1", self.ports[port], timeout=timeout)
        try:
            data = None if body is None else json.dumps(body)
            connection.request(method, path, data, {"Content-Type": "application/json", **(headers or {})})
            answer = connection.getresponse()
            return answer.status, dict(answer.getheaders()), answer.read()
        finally:
            connection.close()

    def ready(self) -> bool:
        try:
            return bool(self.request("GET", "/health/ready", timeout=2)[0] == 200)
        except OSError:
            return False

    def knows(self, key: str) -> bool:
        """Whether a key that was just made is taken, by as many connections as most likely reach every worker."""
        headers = {"Authorization": f"Bearer {key}"}
        return all(self.request("GET", "/v1/models", headers=headers)[0] == 200 for _ in range(20))

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.ports['HTTP']}"

    def load(self, port: str = "TRITON_HTTP") -> dict[str, Any]:
        """The heartbeat of the model, straight from a Triton."""
        body = {"text_input": "", "parameters": {"heartbeat": True}}
        _, _, answer = self.request("POST", f"/v2/models/{self.model}/generate", body, port)
        return dict(json.loads(json.loads(answer)["text_output"]))

    def stream(self, prompt: str = "one", port: str = "HTTP", **body: object) -> Stream:
        """Begin a streaming completion through the gateway."""
        return Stream(self.ports[port], {"model": self.model, "prompt": prompt, "stream": True, **body})

    def leftovers(self) -> list[str]:
        """Processes and shared memory regions that belong to this home."""
        prefix = tritonserver.shm_prefix(self.home)
        regions = [region.name for region in tritonserver.SHM.glob(f"{prefix}*")]
        needles = (str(self.home), prefix)
        found = []
        for process in psutil.process_iter():
            try:
                line = " ".join(process.cmdline())
                if process.pid != os.getpid() and any(n in line for n in needles) and process.status() != "zombie":
                    found.append(line)
            except psutil.Error:
                continue
        return regions + found


class Stream:
    """A streaming completion, read event by event on a real socket."""

    def __init__(self, port: int, body: dict[str, Any]) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=15)
        self._connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        self.answer = self._connection.getresponse()
        self.status = self.answer.status

    def events(self) -> Iterator[Any]:
        """Each event's data: a dict, or the string "[DONE]"."""
        if self.status != 200:
            yield json.loads(self.answer.read())
            return
        while line := self.answer.readline():
            if line.startswith(b"data: "):
                data = line[6:].strip().decode()
                yield data if data == "[DONE]" else json.loads(data)

    def close(self) -> None:
        """Hang up at once."""
        self.answer.close()
        self._connection.close()


def wait_until(check: Callable[[], object], timeout_s: float, what: str) -> float:
    """Poll until a check holds and return how long that took; fails after `timeout_s`."""
    began = awake()
    while not check():
        assert awake() - began < timeout_s, f"not within {timeout_s} s: {what}"
        time.sleep(0.02)
    return awake() - began


def kill(pid: int, sig: signal.Signals) -> None:
    os.kill(pid, sig)
