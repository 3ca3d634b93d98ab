"""Before a stack starts: its ports are free, its model can run here, and what a killed supervisor left is gone."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from orchestrator import engines, models
from orchestrator.local import state, tritonserver
from orchestrator.local.places import Port, ports
from orchestrator.local.process import kill_group
from orchestrator.local.tritonserver import PORT_STEP, numbered
from orchestrator.models import Entry, Version
from orchestrator.settings import Settings

Refusal = Callable[[Entry, Version], tuple[str, str] | None]  # why a version is not loaded, and what to do about it
FIRST = numbered("triton", 1)
HIGHEST_PORT = 65_535
GONE_S = 5.0  # a killed process, or one whose supervisor was, takes a moment to let go of its ports


class StartError(Exception):
    """The stack could not start; `hint` says what to do."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


def check_servers(settings: Settings) -> None:
    """Refuse several Triton servers that cannot all be there. Raises StartError naming the settings.

    What the gateway and the first server need is checked with the settings already.
    """
    if settings.triton_urls and settings.tritons > 1:
        message = f"triton_urls names the servers to use, and tritons asks for {settings.tritons} to be started"
        raise StartError(message, "give one of the two")
    taken: dict[int, Port] = {}
    for port in ports(settings):
        if port.server not in ("", FIRST):
            hint = f"choose another {port.setting}, to which {PORT_STEP} is added for each server, or fewer tritons"
            if port.number > HIGHEST_PORT:
                raise StartError(f"{port} would be {port.number}, and ports end at {HIGHEST_PORT}", hint)
            if port.number in taken:
                raise StartError(f"{port} and {taken[port.number]} are both {port.number}", hint)
        taken[port.number] = port


def check_ports(settings: Settings, patience_s: float = 0.0) -> None:
    """Refuse to start where another program still listens after `patience_s` seconds.

    Raises StartError naming the port, its setting and the server.
    """
    deadline = time.monotonic() + patience_s
    for port in ports(settings):
        while (error := _bind(port.host, port.number)) is not None:
            if time.monotonic() >= deadline:
                further = port.server not in ("", FIRST)
                whose = f" for {port.server}" if further else ""
                step = f", to which {PORT_STEP} is added for each further server" if further else ""
                raise StartError(
                    f"port {port.number} on {port.host} cannot be used{whose}: {error.strerror}",
                    f"stop what uses it, or choose another with TRUTHGPT_{port.setting.upper()}{step}",
                ) from error
            time.sleep(0.02)


def check_engine(settings: Settings, model: str, number: int) -> None:
    """Refuse a TensorRT engine of another machine before Triton reads it. Raises StartError saying how to rebuild it.

    A version that is not in the repository is Triton's to report.
    """
    for _, version in _find(settings, model, number):
        try:
            engines.require(version)
        except engines.ForeignEngine as error:
            raise StartError(str(error), error.hint) from error


def check_graph(settings: Settings, model: str, number: int, refusal: Refusal) -> None:
    """Refuse a graph that is damaged or another model's before Triton runs it, whose own backends check nothing.

    Raises StartError. A version that is not in the repository is Triton's to report.
    """
    for entry, version in _find(settings, model, number):
        refused = refusal(entry, version)
        if refused is not None:
            raise StartError(*refused)


def _find(settings: Settings, model: str, number: int) -> list[tuple[Entry, Version]]:
    """The entry and its version, if it is there."""
    with contextlib.suppress(models.ModelsError):
        entry = models.get(settings.model_repository, model)
        return [(entry, entry.version(number))]
    return []


def _bind(host: str, port: int) -> OSError | None:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            return error
    return None


def clear_leftovers(home: Path) -> bool:
    """End what a killed supervisor of this home left behind; whether there was something.

    For the holder of the home's lock only.
    """
    old, prefix = state.read(home), tritonserver.shm_prefix(home)
    # A supervisor that was killed while it started has written no state: its server is known by its arguments.
    pids = {*(old.processes.values() if old is not None else ()), *(p.pid for p in tritonserver.servers(prefix))}
    for pid in pids:
        end_leftover(pid, home)
    state.clear(home)
    return bool(tritonserver.sweep(prefix, kill=True)) or bool(pids)


def end_leftover(pid: int, home: Path) -> None:
    """Kill a recorded process group if it is still one that this home's supervisor started."""
    if belongs(pid, home):  # a pid may have been taken by another program since
        kill_group(pid)


def belongs(pid: int, home: Path) -> bool:
    """Whether a process has a home's folder or shared memory prefix in its arguments, or the folder as its setting."""
    try:
        process = psutil.Process(pid)
        line = " ".join(process.cmdline())
        names = (str(home), tritonserver.shm_prefix(home))
        return any(name in line for name in names) or process.environ().get("TRUTHGPT_HOME") == str(home)
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return False
