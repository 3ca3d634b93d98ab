"""Before a stack starts: its ports are free, and what a killed supervisor left behind is gone."""

from __future__ import annotations

import socket
from pathlib import Path

import psutil

from orchestrator.local import state, tritonserver
from orchestrator.local.process import kill_group
from orchestrator.settings import Settings


class StartError(Exception):
    """The stack could not start; `hint` says what to do."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


def check_ports(settings: Settings) -> None:
    """Refuse to start where another program listens. Raises StartError naming the port and its setting."""
    loopback = ("triton_http_port", "triton_grpc_port", "triton_metrics_port")
    for name, host in (("http_port", settings.host), *((name, "127.0.0.1") for name in loopback)):
        port = getattr(settings, name)
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
            except OSError as error:
                raise StartError(
                    f"port {port} on {host} cannot be used: {error.strerror}",
                    f"stop what uses it, or choose another with TRUTHGPT_{name.upper()}",
                ) from error


def clear_leftovers(home: Path) -> None:
    """End what a killed supervisor of this home left behind. For the holder of its lock only."""
    old = state.read(home)
    if old is not None:
        for pid in old.processes.values():
            end_leftover(pid, home)
        state.clear(home)
    tritonserver.sweep(tritonserver.shm_prefix(home), kill=True)


def end_leftover(pid: int, home: Path) -> None:
    """Kill a recorded process group if it is still one that this home's supervisor started."""
    try:
        process = psutil.Process(pid)
        about_home = str(home) in " ".join(process.cmdline()) or process.environ().get("TRUTHGPT_HOME") == str(home)
    except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
        return
    if about_home:  # a pid may have been taken by another program since
        kill_group(pid)
