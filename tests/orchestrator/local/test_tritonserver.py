import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from orchestrator.local import preflight, tritonserver
from orchestrator.local.tritonserver import STUB, ServerMissing
from orchestrator.settings import Settings
from tests.e2e.stack import free_ports


@pytest.fixture
def prefix(tmp_path: Path):
    """A home's shared memory prefix; what a failing test leaves is removed."""
    yield tritonserver.shm_prefix(tmp_path)
    for region in tritonserver.SHM.glob(f"{tritonserver.shm_prefix(tmp_path)}*"):
        region.unlink()


def test_a_sweep_removes_what_no_stub_uses_and_spares_what_one_does(tmp_path: Path, prefix: str):
    """Only regions of this home that no live stub works on go; with kill the stub goes first."""
    used, orphan, foreign = (
        tritonserver.SHM / name for name in (f"{prefix}used", f"{prefix}orphan", "truthgpt_other_x")
    )
    for region in (used, orphan, foreign):
        region.write_bytes(b"x")
    (tmp_path / STUB).symlink_to("/bin/sleep")
    # A stand-in for the stub: a process whose arguments are those that the real one gets.
    script = "import sys, time; print('up', flush=True); time.sleep(60)"
    stub = subprocess.Popen(
        [str(tmp_path / STUB), "-c", script, used.name], executable=sys.executable, stdout=subprocess.PIPE
    )
    try:
        assert stub.stdout is not None and stub.stdout.readline() == b"up\n"
        assert tritonserver.sweep(prefix, kill=False) == [orphan.name]
        assert used.exists() and foreign.exists() and stub.poll() is None
        assert tritonserver.sweep(prefix, kill=True) == [used.name]
        assert stub.wait(5) == -9 and foreign.exists()
    finally:
        stub.kill()
        stub.wait()
        stub.stdout.close()
        foreign.unlink()


@pytest.mark.parametrize("kill", [False, True])
def test_a_sweep_survives_stubs_that_end_meanwhile(monkeypatch: pytest.MonkeyPatch, prefix: str, kill: bool):
    """A stub that was there when the sweep began and is gone when it is killed or asked is no fault."""
    gone = subprocess.Popen([sys.executable, "-c", ""])
    process = psutil.Process(gone.pid)
    gone.wait()
    monkeypatch.setattr(tritonserver, "orphans", lambda _: [process])
    region = tritonserver.SHM / f"{prefix}left"
    region.write_bytes(b"x")
    assert tritonserver.sweep(prefix, kill=kill) == [region.name]


def test_everything_listens_on_loopback_and_models_are_named(tmp_path: Path):
    """The command line opens no port to the network and loads exactly the models asked for."""
    settings = Settings.load({"home": tmp_path, "model_repository": tmp_path}, {})
    argv = tritonserver.command(tritonserver.find(), settings, ["a", "b"])
    for kind in ("http", "grpc", "metrics"):
        assert f"--{kind}-address=127.0.0.1" in argv
    assert [a for a in argv if a.startswith("--load-model")] == ["--load-model=a", "--load-model=b"]
    assert "--model-control-mode=explicit" in argv


def test_a_further_server_has_ports_memory_and_backends_of_its_own(tmp_path: Path):
    """So that nothing that is done to one of them disturbs another one."""
    settings = Settings.load({"home": tmp_path, "model_repository": tmp_path}, {})
    first, second = (tritonserver.command(tritonserver.find(), settings, [], number) for number in (1, 2))
    own = [argument for argument in second if argument not in first]
    prefix = tritonserver.shm_prefix(tmp_path, 2)
    assert own == [
        f"--backend-directory={tmp_path / 'triton' / 'backends-2'}", "--http-port=8100", "--grpc-port=8101",
        "--metrics-port=8102", f"--backend-config=python,shm-region-prefix-name={prefix}",
    ]  # fmt: skip
    assert (tmp_path / "triton" / "backends").is_dir() and (tmp_path / "triton" / "backends-2").is_dir()


def test_a_sweep_of_one_server_spares_the_others(tmp_path: Path, prefix: str):
    """Its prefix is the beginning of no other server's, of the eleventh neither; the home's prefix is that of all."""
    regions = {number: f"{tritonserver.shm_prefix(tmp_path, number)}x" for number in (1, 2, 11, 12)}
    for region in regions.values():
        (tritonserver.SHM / region).write_bytes(b"x")
    assert tritonserver.sweep(tritonserver.shm_prefix(tmp_path, 1), kill=True) == [regions.pop(1)]
    assert sorted(tritonserver.sweep(prefix, kill=True)) == sorted(regions.values())


def test_the_servers_environment_has_none_of_our_settings(monkeypatch: pytest.MonkeyPatch):
    """What may hold a secret is not handed to a child that needs none."""
    monkeypatch.setenv("TRUTHGPT_REDIS_URL", "redis://:secret@host")
    assert "secret" not in str(tritonserver.environment(tritonserver.find()))


def test_libraries_that_the_user_names_are_found_behind_the_servers_own(monkeypatch: pytest.MonkeyPatch):
    """CUDA and TensorRT may lie anywhere; the wheel's own come first, and no empty entry means the current folder."""
    installation = tritonserver.find()
    own = installation.library_path()
    monkeypatch.setenv("LD_LIBRARY_PATH", "/opt/tensorrt/lib")
    assert tritonserver.environment(installation)["LD_LIBRARY_PATH"] == f"{own}:/opt/tensorrt/lib"
    monkeypatch.delenv("LD_LIBRARY_PATH")
    assert tritonserver.environment(installation)["LD_LIBRARY_PATH"] == own



def test_preparing_twice_gives_the_same_folder(tmp_path: Path):
    """The backend directory is made anew from the installation, old files included."""
    installation = tritonserver.find()
    folder = tritonserver.prepare_backends(installation, tmp_path)
    (folder / "inflight" / "stale.py").write_text("")
    assert tritonserver.prepare_backends(installation, tmp_path) == folder
    assert sorted(p.name for p in folder.iterdir()) == ["encoder", "inflight", "python"]
    assert (folder / "python" / STUB).exists() and (folder / "inflight" / "model.py").exists()
    assert not (folder / "inflight" / "stale.py").exists()


def test_a_child_that_is_not_yet_a_stub_is_no_server(prefix: str):
    """Between a server's fork and its exec there are two processes with its arguments; only the older is the server."""
    script = "import os, time; child = os.fork(); os.write(1, b'up\\n'); time.sleep(60)"
    option = f"--backend-config=python,shm-region-prefix-name={prefix}"
    server = subprocess.Popen([sys.executable, "-c", script, option], stdout=subprocess.PIPE)
    assert server.stdout
    with server, server.stdout as out:
        children = []
        try:
            assert (out.readline(), out.readline()) == (b"up\n", b"up\n")
            children = psutil.Process(server.pid).children()
            assert [child.cmdline()[-1] for child in children] == [option]
            assert [found.pid for found in tritonserver.servers(prefix)] == [server.pid]
        finally:
            for process in [*children, server]:
                process.kill()


@pytest.mark.parametrize(
    ("machine", "libc", "words"),
    [("aarch64", ("glibc", "2.36"), "x86-64"), ("x86_64", ("glibc", "2.31"), "2.35"), ("x86_64", ("", ""), "glibc")],
)
def test_a_machine_that_cannot_run_triton_gets_one_clear_sentence(monkeypatch, machine, libc, words):
    """Another processor, an old glibc or another C library are named, with a hint."""
    monkeypatch.setattr("platform.machine", lambda: machine)
    monkeypatch.setattr("platform.libc_ver", lambda: libc)
    with pytest.raises(ServerMissing, match=words) as caught:
        tritonserver.find()
    assert caught.value.hint


def test_a_taken_port_is_refused_with_its_setting(tmp_path: Path):
    """The error names the port, the hint the variable that changes it."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        settings = Settings.load({"triton_grpc_port": taken.getsockname()[1]}, {})
        for name in ("http_port", "grpc_port", "ops_port", "triton_http_port", "triton_metrics_port"):
            object.__setattr__(settings, name, 0)  # any free port: only the taken one is under test
        with pytest.raises(preflight.StartError, match=str(taken.getsockname()[1])) as caught:
            preflight.check_ports(settings)
    assert "TRUTHGPT_TRITON_GRPC_PORT" in caught.value.hint


def test_a_taken_port_of_a_further_server_is_refused_with_its_name(tmp_path: Path):
    """The error names the server, the hint the setting and what is added to it."""
    http, grpc, metrics, *gateway = free_ports(6, servers=2)
    ports = {"triton_http_port": http, "triton_grpc_port": grpc, "triton_metrics_port": metrics}
    ports |= dict(zip(("http_port", "grpc_port", "ops_port"), gateway, strict=True))
    with socket.create_server(("127.0.0.1", grpc + tritonserver.PORT_STEP)):
        settings = Settings.load({**ports, "tritons": 2}, {})
        with pytest.raises(preflight.StartError, match=rf"port {grpc + 100} .* for triton-2: ") as caught:
            preflight.check_ports(settings)
    assert "TRUTHGPT_TRITON_GRPC_PORT, to which 100 is added" in caught.value.hint
