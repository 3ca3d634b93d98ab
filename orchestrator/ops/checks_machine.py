"""Checks of the machine: what no running stack is needed for."""

from __future__ import annotations

import os
import platform
import shutil
import socket
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import psutil

from orchestrator.local import places, tritonserver
from orchestrator.ops.finding import Deployment, Finding

PYTHONS = ((3, 11), (3, 12))
GATEWAY_PACKAGES = ("uvicorn", "redis", "aiohttp")
SERVE_PACKAGES = ("nvidia-pytriton", "numpy", "onnxruntime", "tokenizers", "jinja2", *GATEWAY_PACKAGES)
_SERVE = "pip install 'truthgpt[serve]'"
_MIB = 1 << 20


def check_platform(deployment: Deployment) -> Finding:
    """The system that Triton's binaries were built for."""
    libc, version = platform.libc_ver()
    fault = platform_fault(sys.platform, platform.machine(), sys.version_info[:2], libc, version)
    fault = None if deployment.elsewhere else fault
    detail = f"Python {platform.python_version()}, {platform.machine()} {platform.system()}, {libc} {version}".rstrip()
    if fault is None:
        return Finding("platform", True, detail)
    return Finding("platform", False, f"{detail}: {fault[0]}", fault[1])


def platform_fault(
    system: str, machine: str, python: Sequence[int], libc: str, libc_version: str
) -> tuple[str, str] | None:
    """What is wrong with a system and what to do, or None."""
    where = "use an x86-64 machine with Debian 12 or newer, or Ubuntu 24.04 or newer"
    if not system.startswith("linux") or machine != "x86_64":
        return "Triton runs here on x86-64 Linux only", where
    numbers = tuple(int(part) for part in libc_version.split(".")[:2] if part.isdigit())
    if libc != "glibc" or numbers < tritonserver.MIN_GLIBC:
        return "Triton needs glibc 2.35 or newer", where
    if tuple(python) not in PYTHONS:
        return "Python 3.11 or 3.12 is needed", "make install PYTHON=python3.12"
    return None


def check_packages(deployment: Deployment) -> Finding:
    """The serving packages, and numpy below 2: Triton's Python backend breaks text tensors with numpy 2."""
    needed = GATEWAY_PACKAGES if deployment.elsewhere else SERVE_PACKAGES
    found = {name: deployment.version(name) for name in needed}
    missing = [name for name, version in found.items() if version is None]
    if missing:
        return Finding("packages", False, f"not installed: {', '.join(missing)}", _SERVE)
    if deployment.elsewhere:
        return Finding("packages", True, ", ".join(f"{name} {version}" for name, version in found.items()))
    numpy = found["numpy"] or ""
    if int(numpy.split(".")[0]) >= 2:
        return Finding("packages", False, f"numpy {numpy} breaks text tensors in Triton", "pip install 'numpy<2'")
    return Finding("packages", True, f"numpy {numpy}, onnxruntime {found['onnxruntime']}")


def check_server(deployment: Deployment) -> Finding:
    """tritonserver, its stub, and every shared library that they load."""
    if deployment.elsewhere:
        return Finding("server", True, f"not needed: Triton is at {deployment.elsewhere}")
    try:
        installation = tritonserver.find()
        missing = installation.missing_libraries()
    except tritonserver.ServerMissing as error:
        return Finding("server", False, str(error), error.hint)
    except OSError as error:
        return Finding("server", False, f"ldd cannot be run: {error.strerror}", "install the system's libc-bin package")
    if missing:
        hint = f"{_SERVE} again; if they stay missing, install the system packages that hold them"
        return Finding("server", False, f"shared libraries are missing: {', '.join(missing)}", hint)
    return Finding("server", True, f"{installation.binary}")


def check_shared_memory(deployment: Deployment) -> Finding:
    """Shared memory carries every tensor between Triton and the backend."""
    if deployment.elsewhere:
        return Finding("shared_memory", True, "not needed: Triton runs elsewhere")
    try:
        free = shutil.disk_usage(tritonserver.SHM).free
    except OSError as error:
        return Finding("shared_memory", False, f"{tritonserver.SHM}: {error.strerror}", "mount a tmpfs there")
    need = deployment.limits.shared_memory_bytes
    detail = f"{free // _MIB} MiB free in {tritonserver.SHM}"
    if free < need:
        hint = f"free some or enlarge it: mount -o remount,size=1g {tritonserver.SHM}; in a container: --shm-size=1g"
        return Finding("shared_memory", False, f"{detail}, at least {need // _MIB} MiB are needed", hint)
    return Finding("shared_memory", True, detail)


def check_disk(deployment: Deployment) -> Finding:
    """Room for logs, Redis' file and the next export."""
    settings, need = deployment.settings, deployment.limits.disk_bytes
    told = []
    for name, path in (("home", settings.home), ("model_repository", settings.model_repository)):
        free = shutil.disk_usage(nearest(path)).free
        if free < need:
            detail = f"{free // _MIB} MiB free for {name} {path}, at least {need // _MIB} MiB are needed"
            return Finding("disk", False, detail, f"free some, or move it with TRUTHGPT_{name.upper()}")
        told.append(f"{free // _MIB} MiB free for {name}")
    return Finding("disk", True, ", ".join(told))


def check_home(deployment: Deployment) -> Finding:
    home = deployment.settings.home
    fault = unwritable(home)
    if fault:
        return Finding("home", False, f"{home}: {fault}", "make it a folder that you may write, or set TRUTHGPT_HOME")
    return Finding("home", True, str(home.absolute()))


def check_repository(deployment: Deployment) -> Finding:
    repository = deployment.settings.model_repository
    if deployment.elsewhere and not repository.exists():
        return Finding("repository", True, "not needed: Triton runs elsewhere")
    fault = unwritable(repository)
    if fault:
        hint = "make it a folder that you may write, or set TRUTHGPT_MODEL_REPOSITORY"
        return Finding("repository", False, f"{repository}: {fault}", hint)
    return Finding("repository", True, str(repository.absolute()))


def nearest(path: Path) -> Path:
    """The path, or the closest parent that exists."""
    return next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())


def unwritable(path: Path) -> str:
    """Why files cannot be made in a folder (that may still have to be made itself); empty when they can."""
    folder = nearest(path)
    if not folder.is_dir():
        return f"{folder} is in the way: it is not a folder"
    if not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
        return f"{folder} cannot be written"
    try:
        with tempfile.TemporaryFile(dir=folder):  # a read-only file system shows only here
            return ""
    except OSError as error:
        return f"{folder} cannot be written: {error.strerror}"


def check_ports(deployment: Deployment) -> Finding:
    """The ports that the stack listens on are free, or its own."""
    taken, wanted, owners = [], list(places.ports(deployment.settings)), _owners()
    for port in wanted:
        if _is_free(port.host, port.number) or _is_ours(deployment, owners.get(port.number)):
            continue
        taken.append((port.setting, f"port {port.number} is used by {_name(owners.get(port.number))}"))
    if taken:
        variables = " or ".join(dict.fromkeys(f"TRUTHGPT_{name.upper()}" for name, _ in taken))
        hint = f"stop what uses it, or choose another with {variables}"
        return Finding("ports", False, "; ".join(what for _, what in taken), hint)
    numbers = ", ".join(str(port.number) for port in wanted)
    return Finding("ports", True, f"{numbers} {'serve the running stack' if deployment.stack else 'are free'}")


def _is_free(host: str, port: int) -> bool:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
        return True


def _owners() -> dict[int, int | None]:
    """Listening TCP port -> process, None for one that this user may not see."""
    try:
        connections = psutil.net_connections(kind="tcp")
    except psutil.AccessDenied:
        return {}
    return {row.laddr.port: row.pid for row in connections if row.laddr and row.status == psutil.CONN_LISTEN}


def _is_ours(deployment: Deployment, owner: int | None) -> bool:
    stack = deployment.stack
    if stack is None or owner is None:
        return False
    ours = {stack.pid, *stack.processes.values()}
    try:  # the gateway's port is its workers'
        return owner in ours or any(parent.pid in ours for parent in psutil.Process(owner).parents())
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return False


def _name(pid: int | None) -> str:
    try:
        return f"{psutil.Process(pid).name()} (process {pid})" if pid is not None else "another program"
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return f"process {pid}"
