"""`truthgpt down`: real processes that are stopped, killed or already gone."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from orchestrator.local import state, tritonserver
from orchestrator.local.process import alive
from tests.orchestrator.gateway import eventually, write_state


@pytest.fixture
def supervisor(place: Any) -> Iterator[Callable[[str], tuple[subprocess.Popen[str], int]]]:
    """Starts a stand-in for a supervisor; gives its process and the pid of its child."""
    started: list[tuple[subprocess.Popen[str], int]] = []

    def start(kind: str) -> tuple[subprocess.Popen[str], int]:
        argv = [sys.executable, "-m", "tests.orchestrator.supervisor_stand_in", str(place.home), kind]
        process = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, start_new_session=True)
        assert process.stdout is not None
        started.append((process, int(process.stdout.readline())))
        return started[-1]

    yield start
    for process, child in started:
        process.kill()
        process.communicate()
        subprocess.run(["kill", "-9", str(child)], stderr=subprocess.DEVNULL)


@pytest.fixture
def region(place: Any) -> Iterator[Callable[[str], Path]]:
    """Makes a shared memory region with a prefix."""
    made: list[Path] = []

    def make(prefix: str) -> Path:
        made.append(tritonserver.SHM / f"{prefix}test")
        made[-1].write_bytes(b"x")
        return made[-1]

    yield make
    for path in made:
        path.unlink(missing_ok=True)


def test_nothing_running_is_a_success(place: Any) -> None:
    """`down` without a stack exits with 0, says so, and makes no folder."""
    result = place.run("down")
    assert result.exit_code == 0 and result.stdout == f"nothing is running from {place.home}\n"
    assert place.json("down")["stopped"] is False
    assert not place.home.exists()


def test_a_running_stack_is_stopped(place: Any, supervisor: Any) -> None:
    """The supervisor gets SIGTERM and the time to end by itself."""
    process, child = supervisor("stop")
    document = place.json("down")
    assert document == {
        "stopped": True, "pid": process.pid, "killed": False,
        "leftovers": {"processes": [], "shared_memory": [], "state_file": False},
    }  # fmt: skip
    assert process.wait(5) == 0 and not alive(child)


def test_a_stopped_supervisor_is_continued_to_end(place: Any, supervisor: Any) -> None:
    """A supervisor under SIGSTOP still ends by itself."""
    process, _ = supervisor("stop")
    process.send_signal(signal.SIGSTOP)
    assert place.json("down", "--timeout", "5")["killed"] is False
    assert process.wait(5) == 0


def test_a_stack_that_does_not_stop_is_killed_with_all_it_started(place: Any, supervisor: Any) -> None:
    """After the time-out the supervisor and its recorded processes are killed, and the state file goes."""
    process, child = supervisor("stubborn")
    document = place.json("down", "--timeout", "0.3")
    assert document["stopped"] and document["killed"]
    assert document["leftovers"]["processes"] == [child] and document["leftovers"]["state_file"]
    eventually(lambda: not alive(child))
    assert process.wait(5) == -signal.SIGKILL and not state.path(place.home).exists()


def test_a_stack_that_still_starts_is_found_by_its_lock(place: Any, supervisor: Any) -> None:
    """Before the state file is written `down` finds the supervisor all the same."""
    process, _ = supervisor("starting")
    assert place.json("down")["pid"] == process.pid
    assert process.wait(5) == 0


def test_what_a_killed_stack_left_is_cleared(place: Any, supervisor: Any, region: Any) -> None:
    """A stale state file, a recorded process and our shared memory go; another home's region stays."""
    process, child = supervisor("stop")
    process.kill()
    process.wait()
    ours = region(tritonserver.shm_prefix(place.home))
    foreign = region(tritonserver.shm_prefix(place.home / "other"))
    result = place.run("down")
    assert result.exit_code == 0 and "1 processes, 1 shared memory regions" in result.stdout
    assert not alive(child) and not ours.exists() and foreign.exists() and not state.path(place.home).exists()


def test_a_pid_that_another_program_has_taken_is_left_alone(place: Any) -> None:
    """A stale state file whose pids belong to others now costs them nothing."""
    with subprocess.Popen(["sleep", "60"]) as stranger:
        write_state(place.home, "http://127.0.0.1:1", stranger.pid, created=1.0, processes={"triton": stranger.pid})
        assert place.json("down")["stopped"] is False
        assert stranger.poll() is None
        stranger.kill()
    assert not state.path(place.home).exists()


@pytest.mark.parametrize("kill", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_real_stack_whose_folder_was_removed_is_still_found(place: Any, kill: bool) -> None:
    """With the home deleted below a running stack, or below what a killed one left, `down` ends every process of it."""
    place.export()
    pid = json.loads(place.process("up", "--detach", "--json").communicate(timeout=60)[0])["pid"]
    supervisor = psutil.Process(pid)
    processes = [supervisor, *supervisor.children(recursive=True)]
    shutil.rmtree(place.home)
    if kill:
        for child in supervisor.children():  # held, so that they cannot end with their supervisor
            child.suspend()
        supervisor.kill()
        eventually(lambda: not alive(pid))
    document = place.json("down")
    assert document["stopped"] is not kill
    for process in processes:
        if "tritonserver" in str(process) or not kill:
            eventually(lambda process=process: not alive(process.pid))  # type: ignore[misc]
        elif alive(process.pid):
            process.kill()
    assert list(tritonserver.SHM.glob(f"{tritonserver.shm_prefix(place.home)}*")) == []


@pytest.mark.parametrize("text", ["", "{", "[]", json.dumps({"pid": "x"}), json.dumps({"version": 9})])
def test_a_state_file_of_nobody_is_cleared(place: Any, text: str) -> None:
    """A state file that cannot be read counts as a leftover, not as an error."""
    place.home.mkdir()
    state.path(place.home).write_text(text)
    assert place.json("down")["leftovers"]["state_file"] is True
    assert place.json("down")["leftovers"]["state_file"] is False
