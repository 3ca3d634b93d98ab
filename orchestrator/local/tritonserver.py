"""The tritonserver binary of the nvidia-pytriton wheel: found, given our backend, and told what to serve."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import psutil

from orchestrator.local import alias
from orchestrator.settings import Settings

STUB = "triton_python_backend_stub"
PORT_STEP = 100  # from each port of a server to that of the next one of the same stack
SHM = Path("/dev/shm")  # noqa: S108  (where the kernel keeps POSIX shared memory; not a temporary file of ours)
MIN_GLIBC = (2, 35)


class ServerMissing(Exception):
    """No usable tritonserver on this machine; `hint` says what to do."""

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.hint = hint


@dataclass(frozen=True)
class Installation:
    """Where the wheel's parts are."""

    root: Path
    libraries: Path
    site: Path

    @property
    def binary(self) -> Path:
        return self.root / "bin" / "tritonserver"

    @property
    def stub(self) -> Path:
        return self.root / "python_backend_stubs" / f"{sys.version_info.major}.{sys.version_info.minor}" / STUB

    def library_path(self) -> str:
        """LD_LIBRARY_PATH: the wheel's libraries, and this Python's own for the stub, which embeds it."""
        return os.pathsep.join([str(self.libraries), str(sysconfig.get_config_var("LIBDIR") or "")])

    def missing_libraries(self) -> list[str]:
        """Shared libraries that the server or its stub would not find."""
        env = {"LD_LIBRARY_PATH": self.library_path(), "PATH": "/usr/bin:/bin"}
        missing: list[str] = []
        for program in (self.binary, self.stub):
            done = subprocess.run(["ldd", str(program)], env=env, capture_output=True, text=True, timeout=20)  # noqa: S603, S607 (ldd from a fixed PATH)
            missing += [line.split()[0] for line in done.stdout.splitlines() if "not found" in line]
        return sorted(set(missing))


def find() -> Installation:
    """Locate the server without importing its package. Raises ServerMissing."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        raise ServerMissing(
            f"Triton runs here on x86-64 Linux only, this is {platform.machine()} {platform.system()}",
            "use an x86-64 machine with Debian 12 or newer, or Ubuntu 24.04 or newer",
        )
    name, version = platform.libc_ver()
    if name != "glibc" or tuple(int(part) for part in version.split(".")[:2]) < MIN_GLIBC:
        raise ServerMissing(
            f"Triton needs glibc 2.35 or newer, this system has {name or 'another C library'} {version}".rstrip(),
            "use Debian 12 or newer, or Ubuntu 24.04 or newer",
        )
    spec = importlib.util.find_spec("pytriton")
    if spec is None or not spec.submodule_search_locations:
        raise ServerMissing("tritonserver is not installed", "pip install 'truthgpt[serve]'")
    package = Path(spec.submodule_search_locations[0])
    found = Installation(package / "tritonserver", package.parent / "nvidia_pytriton.libs", package.parent)
    if not found.binary.exists():
        raise ServerMissing(
            f"{found.binary} is missing", "reinstall it: pip install --force-reinstall nvidia-pytriton==0.7.0"
        )
    if not found.stub.exists():
        raise ServerMissing(
            f"tritonserver has no stub for Python {platform.python_version()}", "use Python 3.11 or 3.12"
        )
    return found


def shm_prefix(home: Path, number: int | None = None) -> str:
    """Name prefix of the shared memory regions of a home's servers, or of its server of this number (from 1) alone, so
    that a sweep touches no other's.
    """
    one = "" if number is None else f"{number}_"
    return f"truthgpt_{hashlib.sha256(str(home.resolve()).encode()).hexdigest()[:12]}_{one}"


def numbered(text: str, number: int) -> str:
    """What belongs to a server, by its number: the first one's names are those of a stack that has no other."""
    return text if number == 1 else f"{text}-{number}"


def prepare_backends(installation: Installation, home: Path, number: int = 1) -> Path:
    """A backend directory with Triton's Python backend, this Python's stub, and ours. Copies: Triton refuses links
    that lead out of it. Each server has its own, because it is replaced while the others load models.
    """
    ours = sorted(path.parent for path in (Path(__file__).resolve().parents[2] / "backends").glob("*/model.py"))
    wheel = installation.root / "backends" / "python"
    folder = home / "triton" / numbered("backends", number)
    copies = {
        "python": [wheel / "libtriton_python.so", wheel / "triton_python_backend_utils.py", installation.stub],
        **{backend.name: sorted(backend.glob("*.py")) for backend in ours},
    }
    for name, sources in copies.items():
        fresh = folder / f".{name}-{os.getpid()}"
        fresh.mkdir(parents=True, exist_ok=True)
        for source in sources:
            shutil.copy2(source, fresh)
        shutil.rmtree(folder / name, ignore_errors=True)
        fresh.rename(folder / name)
    return folder


def command(installation: Installation, settings: Settings, models: Iterable[str], number: int = 1) -> list[str]:
    """A server's command line: everything on loopback, models loaded by name only. Raises alias.AliasError."""
    home, backends = settings.home.resolve(), numbered("backends", number)
    step = PORT_STEP * (number - 1)
    return [
        str(installation.binary),
        f"--model-repository={alias.plain(home, 'models', settings.model_repository.resolve())}",
        f"--backend-directory={alias.plain(home, backends, prepare_backends(installation, home, number))}",
        "--model-control-mode=explicit",
        *(f"--load-model={model}" for model in models),
        "--exit-on-error=false",  # a model that does not load leaves a server that can say so
        "--disable-auto-complete-config",
        "--http-address=127.0.0.1",
        f"--http-port={settings.triton_http_port + step}",
        "--grpc-address=127.0.0.1",
        f"--grpc-port={settings.triton_grpc_port + step}",
        "--metrics-address=127.0.0.1",
        f"--metrics-port={settings.triton_metrics_port + step}",
        _shm_option(shm_prefix(settings.home, number)),
        "--exit-timeout-secs=5",
    ]


def environment(installation: Installation) -> dict[str, str]:
    """The server's environment: ours without our settings (a child that needs no secret gets none).

    Libraries that the user names (CUDA, TensorRT) are found behind the server's own.
    """
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("TRUTHGPT_")}
    libraries = [installation.library_path(), inherited.get("LD_LIBRARY_PATH", "")]
    return {
        **inherited,
        "LD_LIBRARY_PATH": os.pathsep.join(path for path in libraries if path),
        "PYTHONPATH": str(installation.site),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), inherited.get("PATH", "")]),
        "PYTHONDONTWRITEBYTECODE": "1",
    }


def stubs(server_pid: int | None, model: str | None = None, version: int | None = None) -> list[psutil.Process]:
    """The backend processes of a server (of one of its models, or of one version of it, if named)."""
    try:
        children = psutil.Process(server_pid).children(recursive=True) if server_pid is not None else []
    except psutil.NoSuchProcess:
        return []
    return [child for child in children if _is_stub(child, model, version)]


def _is_stub(process: psutil.Process, model: str | None, version: int | None = None) -> bool:
    arguments = _arguments(process)
    if len(arguments) < 3 or Path(arguments[0]).name != STUB:
        return False
    # its second argument is REPOSITORY/MODEL/VERSION/model.py
    *_, its_model, its_version, _ = ("", "", *Path(arguments[1]).parts)
    return model in (None, its_model) and (version is None or str(version) == its_version)


def _arguments(process: psutil.Process) -> list[str]:
    """Its command line, empty when it has just ended or is somebody else's."""
    try:
        return process.cmdline()
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return []


def _parent(process: psutil.Process) -> int:
    """The number of its parent, 0 when it has just ended."""
    try:
        return process.ppid()
    except psutil.NoSuchProcess:
        return 0


def orphans(prefix: str) -> list[psutil.Process]:
    """Stubs, of any parent, that work on regions with this prefix: what a killed server left behind."""
    return [p for p in psutil.process_iter() if _is_stub(p, None) and any(a.startswith(prefix) for a in _arguments(p))]


def servers(prefix: str) -> list[psutil.Process]:
    """Servers, of any parent, that were told to use this prefix, or one that begins so.

    A server's child that has not yet become a stub still has its arguments, and is none.
    """
    wanted = _shm_option(prefix)
    found = {p.pid: p for p in psutil.process_iter() if any(a.startswith(wanted) for a in _arguments(p))}
    return [process for process in found.values() if _parent(process) not in found]


def _shm_option(prefix: str) -> str:
    return f"--backend-config=python,shm-region-prefix-name={prefix}"


def sweep(prefix: str, kill: bool) -> list[str]:
    """Remove the shared memory regions with this prefix that no live stub works on; with `kill`, end those stubs first.

    Returns the names removed.
    """
    if kill:
        for stub in orphans(prefix):
            with contextlib.suppress(psutil.NoSuchProcess):
                stub.kill()
    removed = []
    for region in SHM.glob(f"{prefix}*") if kill else unused(prefix):
        region.unlink(missing_ok=True)
        removed.append(region.name)
    return removed


def unused(prefix: str) -> list[Path]:
    """The shared memory regions with this prefix that no live stub works on."""
    used = {argument for stub in orphans(prefix) for argument in _arguments(stub)}
    return [region for region in SHM.glob(f"{prefix}*") if region.name not in used]
