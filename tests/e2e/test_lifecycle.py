"""`truthgpt up` and `down` when things are not as they should be."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from orchestrator.local import alias, state, tritonserver
from tests.clock import awake
from tests.counting import write_entry

from .stack import COMMAND, Stack, kill, wait_until


@pytest.fixture
def make_stack() -> Iterator[Callable[..., Stack]]:
    """Stacks that are not started yet, each with its own home, repository and ports."""
    folder = Path(tempfile.mkdtemp(prefix="truthgpt-e2e-"))
    made: list[Stack] = []

    def make(home: str = "home", repository: str = "repository", **parameters: object) -> Stack:
        base = folder / str(len(made))
        write_entry(base / repository, **{"step_delay_ms": 20, **parameters})
        made.append(Stack(base / home, base / repository))
        return made[-1]

    yield make
    for stack in made:
        stack.stop()
        assert stack.leftovers() == []
    shutil.rmtree(folder)


def refused(stack: Stack) -> str:
    """Start a stack that must not start; its error output."""
    done = stack.cli("up", "--detach", "--json")
    assert done.returncode != 0 and done.stdout == ""
    assert "error: " in done.stderr and "Traceback" not in done.stderr
    assert stack.leftovers() == []
    return done.stderr


def test_down_with_nothing_running_succeeds(make_stack):
    """`down` is safe to repeat: exit code 0 also when there is nothing to stop."""
    assert make_stack().cli("down").returncode == 0


@pytest.mark.parametrize("damage", ["corrupt", "missing"])
def test_a_damaged_weight_file_is_named_and_nothing_is_left_running(make_stack, damage):
    """A weight file that is not what the manifest says, or not there, stops `up` with a sentence that names it."""
    stack = make_stack()
    weights = stack.repository / "counting" / "1" / "model.onnx"
    if damage == "corrupt":
        data = bytearray(weights.read_bytes())
        data[len(data) // 2] ^= 1
        weights.write_bytes(data)
    else:
        weights.unlink()
    assert "model.onnx" in refused(stack)


def test_a_second_up_on_the_same_port_or_home_is_refused(make_stack):
    """The port and its setting are named; the running stack is not disturbed."""
    first, second = make_stack(), make_stack()
    first.start()
    second.environ["TRUTHGPT_HTTP_PORT"] = str(first.ports["HTTP"])
    output = refused(second)
    assert str(first.ports["HTTP"]) in output and "TRUTHGPT_HTTP_PORT" in output
    again = first.cli("up", "--detach")
    assert again.returncode != 0 and "already running" in again.stderr
    assert first.ready()


@pytest.mark.slow
def test_two_stacks_run_side_by_side(make_stack):
    """Different homes and ports: both answer, and stopping one leaves the other alone."""
    first, second = make_stack(), make_stack()
    addresses = first.start()
    second.start()
    assert set(addresses) == {"http", "grpc", "ops", "triton_http", "triton_grpc", "tritons", "redis", "pid"}
    assert first.ready() and second.ready()
    first.stop()
    assert first.leftovers() == []
    assert second.ready() and json.loads(second.cli("status", "--json").stdout)["ready"]


@pytest.mark.slow
def test_sigterm_drains(make_stack):
    """A running stream ends in full after SIGTERM, new requests get 503 with Retry-After, and nothing stays behind."""
    stack = make_stack()
    stack.start()
    stream = stack.stream(max_tokens=100)  # two seconds
    events, reader = [], None
    reader = threading.Thread(target=lambda: events.extend(stream.events()))
    reader.start()
    wait_until(lambda: stack.load()["running"] == 1, 5, "the stream runs")
    supervisor = psutil.Process(stack.pid("supervisor"))
    supervisor.terminate()
    wait_until(lambda: not stack.ready(), 2, "readiness is false while it drains")
    status, headers, _ = stack.request("POST", "/v1/completions", {"model": stack.model, "prompt": "one"})
    assert status == 503 and "retry-after" in headers
    reader.join(10)
    stream.close()
    assert events[-1] == "[DONE]" and events[-2]["choices"][0]["finish_reason"] == "length"
    wait_until(lambda: not supervisor.is_running() or supervisor.status() == "zombie", 15, "the stack has ended")
    assert stack.leftovers() == []


def test_a_killed_supervisor_leaves_nothing_that_the_next_up_does_not_clear(make_stack):
    """After kill -9 of the supervisor its children end, and the next `up` works at once."""
    stack = make_stack()
    stack.start()
    kill(stack.pid("stub"), signal.SIGSTOP)  # one that cannot end by itself
    kill(stack.pid("supervisor"), signal.SIGKILL)
    stack.start()
    assert stack.ready()


@pytest.mark.slow
def test_paths_may_have_spaces_signs_and_any_letters(make_stack):
    """A clone in "My Projects" starts as any other, and what is no model in its repository is no obstacle."""
    stack = make_stack(f"mis proyectos; $(x) #1?%41/{'ñ' * 40}/home", "the models' folder")
    (stack.repository / "README.md").write_text("about this folder")
    (stack.repository / ".staging" / "half-1-a" / "1").mkdir(parents=True)
    stack.start()
    assert stack.ready()
    stack.stop()
    assert not alias.folder(stack.home).rmdir()


@pytest.mark.slow
def test_a_stack_whose_redis_cannot_start_again_goes_on(make_stack):
    """A damaged file keeps Redis from coming back; requests are answered, and once it is mended Redis is back."""
    stack = make_stack()
    stack.start()
    before, data = stack.pid("redis"), stack.home / "redis" / "appendonly.aof"
    data.write_bytes(b"no such format\n")
    kill(before, signal.SIGKILL)
    log = stack.home / "logs" / "supervisor.log"
    wait_until(lambda: "Redis does not come back" in log.read_text(), 10, "the fault is reported")
    assert stack.ready()
    data.unlink()
    wait_until(lambda: stack.pid("redis") != before and stack.ready(), 10, "Redis is back")


@pytest.mark.slow
def test_what_a_killed_supervisor_left_is_known_behind_a_link_too(make_stack):
    """A home that is a link: children that could not end by themselves are ended by the next `up` all the same."""
    stack = make_stack()
    stack.home.with_name("real").mkdir()
    stack.home.symlink_to(stack.home.with_name("real"))
    stack.start()
    for name in ("gateway", "redis"):
        kill(stack.pid(name), signal.SIGSTOP)
    kill(stack.pid("supervisor"), signal.SIGKILL)
    stack.start()
    assert stack.ready()


def test_a_supervisor_killed_while_it_starts_is_no_obstacle_to_the_next(make_stack):
    """Before there is a state file the server is known by its arguments, and its ports are free again in time."""
    stack = make_stack()
    command = [*COMMAND, "up"]
    with subprocess.Popen(command, env=stack.environ, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        wait_until(lambda: tritonserver.servers(tritonserver.shm_prefix(stack.home)), 20, "the server is started")
        (server,) = tritonserver.servers(tritonserver.shm_prefix(stack.home))
        server.suspend()  # one that does not end by itself
        process.kill()
    assert state.read(stack.home) is None
    stack.start()
    assert stack.ready()


@pytest.mark.parametrize("crashes", [1, 2])
def test_a_server_that_crashes_while_it_starts_is_started_once_more(make_stack, crashes):
    """The first crash may be an accident, and nobody hears of it but the log; the second one is an error."""
    stack = make_stack()
    killed: set[int] = set()

    def crash() -> None:
        deadline = time.monotonic() + 20
        while len(killed) < crashes and time.monotonic() < deadline:
            for server in tritonserver.servers(tritonserver.shm_prefix(stack.home)):
                if server.pid not in killed:
                    server.kill()
                    killed.add(server.pid)
            time.sleep(0.01)

    crashing = threading.Thread(target=crash)
    crashing.start()
    done = stack.cli("up", "--detach", "--json")
    crashing.join()
    assert len(killed) == crashes
    assert "signal 9 while it loaded counting: starting it once more" in stack.logs()
    if crashes == 1:
        assert done.returncode == 0 and stack.ready(), done.stderr
    else:
        assert done.returncode != 0 and "the model counting did not load" in done.stderr
        assert stack.leftovers() == []


@pytest.mark.slow
def test_the_gateway_may_listen_on_ipv6(make_stack):
    """An address with colons is put into brackets in every URL."""
    stack = make_stack()
    stack.environ["TRUTHGPT_HOST"] = "::1"
    addresses = stack.start()
    assert addresses["http"] == f"http://[::1]:{stack.ports['HTTP']}"
    assert json.loads(stack.cli("status", "--json").stdout)["ready"] is True


def test_ctrl_c_in_the_foreground_stops_everything(make_stack):
    """`truthgpt up` in a terminal serves until Ctrl-C and exits with 0."""
    stack = make_stack()
    log = stack.home.parent / "out"
    with log.open("wb") as out:
        process = subprocess.Popen([*COMMAND, "up", "--hello"], env=stack.environ, stdout=out, stderr=out)
        try:
            wait_until(lambda: b"curl" in log.read_bytes(), 30, "it says what to try next")
            os.kill(process.pid, signal.SIGINT)
            assert process.wait(20) == 0, log.read_text()
        finally:
            process.kill()
            process.wait()
    assert "one two three" in log.read_text()
    assert stack.leftovers() == []


def test_a_model_that_produces_nan_ends_the_request_and_not_the_server(make_stack):
    """Non-finite logits are an in-band error after the text so far; the next request is answered."""
    stack = make_stack(nan_after="three")
    stack.start()
    stream = stack.stream("one", max_tokens=10)
    events = list(stream.events())
    stream.close()
    assert "error" in events[-1] and events[0]["choices"][0]["text"] == "two"
    status, _, body = stack.request("POST", "/v1/completions", {"model": stack.model, "prompt": "one", "max_tokens": 2})
    assert status == 200 and b"two three" in body


def test_status_tells_what_runs(make_stack):
    """`status --json` has the promised keys, stopped and running."""
    stack = make_stack()
    stopped = json.loads(stack.cli("status", "--json").stdout)
    assert stopped["ready"] is False
    stack.start()
    time.sleep(0.1)
    running = json.loads(stack.cli("status", "--json").stdout)
    assert {"ready", "models", "triton", "redis", "uptime_s"} <= set(running) and running["ready"] is True


def test_up_into_an_empty_repository_exports_the_demo_model_and_says_hello(make_stack):
    """A newcomer's first command: the demo model is exported, served and greeted; the second start is quick."""
    stack = make_stack()
    shutil.rmtree(stack.repository)
    del stack.environ["TRUTHGPT_MODEL"]
    first = stack.cli("up", "--detach", "--hello")
    assert first.returncode == 0, first.stderr
    assert "Hola, ¿cómo estás?" in first.stdout and "curl" in first.stdout and "demo" in first.stdout
    answer = json.loads(stack.cli("generate", "What is TruthGPT?", "--temperature", "0", "--json").stdout)
    assert answer["model"] == "demo" and "TruthGPT" in answer["text"] and answer["finish_reason"] == "stop"
    assert [m["name"] for m in json.loads(stack.cli("models", "list", "--json").stdout)] == ["demo"]
    stack.stop()
    began = awake()
    assert stack.cli("up", "--detach").returncode == 0 and awake() - began < 15


@pytest.mark.slow
def test_every_log_of_a_stack_is_rotated(make_stack):
    """Triton's log, which Triton does not rotate, the supervisor's and the gateway's move aside at their limit."""
    stack = make_stack()
    stack.environ |= {"TRUTHGPT_LOG_MAX_BYTES": "4096", "TRUTHGPT_LOG_FILES": "2"}
    stack.start()
    logs = stack.home / "logs"
    wait_until((logs / "triton.log.1").exists, 10, "Triton's log of its start is moved aside")
    assert (logs / "triton.log").stat().st_size <= 4096
    for _ in range(20):
        assert stack.request("POST", "/v1/completions", {"model": stack.model, "prompt": "one"})[0] == 200
    wait_until((logs / "gateway.log.1").exists, 5, "the gateway's log is moved aside by itself")

    def requests() -> int:
        lines = [line for name in ("gateway.log.1", "gateway.log") for line in (logs / name).read_text().splitlines()]
        return sum(json.loads(line)["message"] == "request" for line in lines)

    wait_until(lambda: requests() > 4, 5, "requests are in what is kept")  # a line is written a moment after its answer
