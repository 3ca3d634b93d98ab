"""What the containers of docker-compose.yml run, run without them: the proxy's file, the scripts around Triton."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import psutil
import pytest
import tritonclient.grpc

from orchestrator.local import tritonserver
from orchestrator.settings import Settings
from tests.counting import write_entry

from .stack import COMMAND, Stack, free_ports, wait_until

ROOT = Path(__file__).resolve().parents[2]
HAPROXY = ROOT / "deploy" / "compose" / "haproxy.cfg"
DOCKER = ROOT / "deploy" / "docker"


@contextmanager
def proxied(http_port: int, grpc_port: int) -> Iterator[dict[str, int]]:
    """A real haproxy with the file of its container in front of a gateway on these ports."""
    if shutil.which("haproxy") is None:
        pytest.skip("haproxy is not installed (Debian's package haproxy has it)")
    names = ("HTTP_PORT", "GRPC_PORT", "ALIVE_PORT", "METRICS_PORT")
    ports = dict(zip(names, free_ports(len(names)), strict=True))
    environ = {
        "PATH": os.environ["PATH"], "BIND_ADDRESS": "127.0.0.1", "METRICS_ADDRESS": "127.0.0.1",
        "GATEWAY_NAME": "127.0.0.1", "GATEWAY_HTTP_PORT": str(http_port), "GATEWAY_GRPC_PORT": str(grpc_port),
        **{name: str(port) for name, port in ports.items()},
    }  # fmt: skip
    process = subprocess.Popen(["haproxy", "-db", "-f", str(HAPROXY)], env=environ, stdout=subprocess.DEVNULL)
    try:
        yield ports
    finally:
        process.kill()
        process.wait()


def get(port: int, path: str) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body; status 0 where nobody listens."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()
    except OSError:
        return 0, {}, b""
    finally:
        connection.close()


def test_the_proxy_passes_streams_and_grpc_on(stack: Stack) -> None:
    """Through haproxy a stream's tokens come one by one as they are made, a gRPC client works, and it has metrics."""
    with proxied(stack.ports["HTTP"], stack.ports["GRPC"]) as ports:
        wait_until(lambda: get(ports["ALIVE_PORT"], "/alive")[0] == 200, 20, "haproxy sees the gateway")
        connection = http.client.HTTPConnection("127.0.0.1", ports["HTTP_PORT"], timeout=15)
        body = {"model": stack.model, "prompt": "proxied", "stream": True, "max_tokens": 40, "seed": 7001}
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        assert answer.status == 200
        moments = []
        while line := answer.readline():
            if line.startswith(b"data: "):
                moments.append(time.monotonic())
        connection.close()
        # 40 steps of 20 ms: what is kept back until the end comes within a moment
        assert moments[-1] - moments[0] > 0.3
        client = tritonclient.grpc.InferenceServerClient(f"127.0.0.1:{ports['GRPC_PORT']}")
        wait_until(lambda: _live(client), 20, "gRPC passes")
        assert client.is_model_ready(stack.model)
        client.close()
        status, _, metrics = get(ports["METRICS_PORT"], "/metrics")
        assert status == 200 and b"haproxy_backend_active_servers" in metrics


def _live(client: tritonclient.grpc.InferenceServerClient) -> bool:
    try:
        return bool(client.is_server_live())
    except (grpc.RpcError, tritonclient.utils.InferenceServerException):
        return False


def test_the_proxy_says_what_a_gateway_would_when_there_is_none() -> None:
    """Without a gateway that is ready a client gets 503 in the API's own form, and when to try again."""
    with proxied(*free_ports(2)) as ports:
        wait_until(lambda: get(ports["ALIVE_PORT"], "/alive")[0] == 503, 20, "haproxy sees that nobody is there")
        status, headers, body = get(ports["HTTP_PORT"], "/v1/models")
        assert (status, headers["retry-after"], headers["content-type"]) == (503, "1", "application/json")
        assert set(json.loads(body)["error"]) == {"message", "type", "param", "code"}


@contextmanager
def container(folder: Path) -> Iterator[tuple[subprocess.Popen[bytes], dict[str, str]]]:
    """Triton's container without a container: its command with the server of the wheel in place of the image's."""
    write_entry(folder / "repository", slots=4)
    home = folder / "home"
    settings = Settings.load({"home": home}, environ={})
    installation = tritonserver.find()
    http_port, grpc_port, metrics_port = free_ports(3)
    prefix = tritonserver.shm_prefix(home)
    commands = folder / "bin"
    commands.mkdir()
    for name in ("serve-models", "model-alive"):
        shutil.copy(DOCKER / name, commands)
    backends = tritonserver.prepare_backends(installation, settings.home)
    server = commands / "tritonserver"
    flags = (
        f"--backend-directory={backends} --http-address=127.0.0.1 --http-port={http_port} --grpc-address=127.0.0.1 "
        f"--grpc-port={grpc_port} --metrics-address=127.0.0.1 --metrics-port={metrics_port} "
        f"--backend-config=python,shm-region-prefix-name={prefix}"
    )
    server.write_text(f'#!/bin/sh\nexec {installation.binary} "$@" {flags}\n')
    server.chmod(0o755)
    environ = tritonserver.environment(installation)
    environ["PATH"] = f"{commands}:{environ['PATH']}"
    environ |= {"TRUTHGPT_MODEL_REPOSITORY": str(folder / "repository"), "TRUTHGPT_MODEL": "counting"}
    environ |= {"TRITON_HTTP_PORT": str(http_port), "WATCH_S": "0.3", "WATCH_FAILURES": "3", "EXIT_TIMEOUT_S": "3"}
    log = (folder / "log").open("wb")
    process = subprocess.Popen(["serve-models"], executable=str(commands / "serve-models"), env=environ, stderr=log)
    try:
        yield process, environ
    finally:
        process.kill()
        process.wait()
        log.close()
        for left in tritonserver.servers(prefix):
            left.kill()
        tritonserver.sweep(prefix, kill=True)


def alive(environ: dict[str, str]) -> bool:
    return subprocess.run(["model-alive"], env=environ, capture_output=True, executable=_find(environ)).returncode == 0


def _find(environ: dict[str, str]) -> str:
    return str(shutil.which("model-alive", path=environ["PATH"]))


def stub_of(folder: Path) -> psutil.Process:
    (server,) = tritonserver.servers(tritonserver.shm_prefix(folder / "home"))
    return tritonserver.stubs(server.pid, "counting")[0]


def test_tritons_container_serves_and_ends(tmp_path: Path) -> None:
    """The container's command loads the models that are named, its health check holds, and SIGTERM ends it cleanly."""
    with container(tmp_path) as (process, environ):
        wait_until(lambda: alive(environ), 60, "the model answers")
        process.terminate()
        wait_until(lambda: process.poll() is not None, 30, "it has ended")
        assert process.returncode == 0, (tmp_path / "log").read_text()[-2000:]


@pytest.mark.parametrize("fault", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
@pytest.mark.slow
def test_tritons_container_ends_when_its_model_is_dead(tmp_path: Path, fault: signal.Signals) -> None:
    """A backend process that was killed or hangs, of which Triton says nothing, ends the container."""
    with container(tmp_path) as (process, environ):
        wait_until(lambda: alive(environ), 60, "the model answers")
        time.sleep(1)  # a look or two by the script itself
        stub_of(tmp_path).send_signal(fault)
        wait_until(lambda: process.poll() is not None, 60, "it has ended")
        assert process.returncode == 1
        assert "stopped answering" in (tmp_path / "log").read_text()


def test_a_model_that_is_missing_is_told_at_once(tmp_path: Path) -> None:
    """The container of a model that nobody has exported ends with what to do."""
    environ = {"PATH": os.environ["PATH"], "TRUTHGPT_MODEL_REPOSITORY": str(tmp_path), "TRUTHGPT_MODEL": "mine"}
    done = subprocess.run([str(DOCKER / "serve-models")], env=environ, capture_output=True, text=True)
    assert done.returncode == 1 and "export it first" in done.stderr


def test_a_gateway_by_itself_is_found_by_the_commands(stack: Stack, tmp_path: Path) -> None:
    """In a gateway's container, without a supervisor, status and generate find it, before a Triton elsewhere."""
    names = ("HTTP", "GRPC", "OPS")
    ports = {f"TRUTHGPT_{name}_PORT": str(port) for name, port in zip(names, free_ports(3), strict=True)}
    environ = {name: value for name, value in stack.environ.items() if not name.startswith("TRUTHGPT_TRITON")}
    environ |= ports | {"TRUTHGPT_TRITON_URLS": f"http://localhost:{stack.ports['TRITON_HTTP']}"}
    environ |= {"TRUTHGPT_HOME": str(tmp_path), "TRUTHGPT_REDIS_URL": stack.state.redis}

    def told(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*COMMAND, *words], env=environ, capture_output=True, text=True, timeout=60)

    assert json.loads(told("status", "--json").stdout)["running"] is False
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen([sys.executable, "-m", "orchestrator.app"], env=environ, stderr=log)
        try:
            wait_until(lambda: told("status", "--json").returncode == 0, 40, "it is ready")
            found = json.loads(told("status", "--json").stdout)
            assert found["pid"] == process.pid
            assert [model["name"] for model in found["models"]] == [stack.model]
            assert told("generate", "found by itself", "--max-tokens", "3").returncode == 0
            assert "is already running" in told("up").stderr
            refused = told("models", "reload", stack.model)
            assert refused.returncode == 1 and "no Triton of its own" in refused.stderr
        finally:
            process.terminate()
            assert process.wait(30) == 0
