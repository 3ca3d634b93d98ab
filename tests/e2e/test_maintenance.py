"""Cleaning up beside a real stack: what is served stays, and what a killed stack has left goes."""

from __future__ import annotations

import json
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.local import tritonserver
from tests.counting import write_entry

from .stack import Stack, kill, wait_until


@pytest.fixture
def versions() -> Iterator[Stack]:
    """A stack that serves version 2 of a model that has five, and keeps two."""
    folder = Path(tempfile.mkdtemp(prefix="truthgpt-e2e-"))
    repository = folder / "repository"
    write_entry(repository, slots=4, number=2)
    started = Stack(folder / "home", repository, extra={"TRUTHGPT_KEEP_VERSIONS": "2"})
    try:
        started.start()
        for number in (1, 3, 4, 5):
            (repository / "counting" / "config.pbtxt").unlink()
            write_entry(repository, slots=4, number=number)
        yield started
    finally:
        started.stop()
        assert started.leftovers() == []
        shutil.rmtree(folder)


def numbers(stack: Stack) -> list[str]:
    return sorted(path.name for path in (stack.repository / "counting").iterdir() if path.is_dir())


def answers(stack: Stack) -> bool:
    body = {"model": "counting", "prompt": "one", "max_tokens": 3}
    return bool(stack.request("POST", "/v1/completions", body)[0] == 200)


@pytest.mark.slow
def test_a_version_that_is_served_stays(versions: Stack) -> None:
    """Version 2 is served and old: it stays, also while Triton is away, and goes once another one is served."""
    done = versions.cli("jobs", "run", "models", "--json")
    assert done.returncode == 0, done.stderr
    assert numbers(versions) == ["2", "4", "5"]
    assert json.loads(done.stdout)["did"].startswith("2 removed, ")
    assert answers(versions)
    (versions.home / "models.json").unlink()  # what Triton says is enough
    assert versions.cli("cleanup", "run", "models").returncode == 0
    assert numbers(versions) == ["2", "4", "5"]

    kill(versions.pid("triton"), signal.SIGSTOP)  # it does not say any more what it has
    try:
        done = versions.cli("cleanup", "run", "models")
        assert done.returncode == 1 and "does not say what it has loaded" in done.stderr
    finally:
        kill(versions.pid("triton"), signal.SIGCONT)
    assert numbers(versions) == ["2", "4", "5"]

    wait_until(versions.ready, 30, "the stack is ready again")
    # what a command that was killed while it removed a model on a full disk leaves is no model, for Triton neither
    shutil.copytree(versions.repository / "counting", versions.repository / ".removed-counting-77-0123abcd")
    done = versions.cli("models", "reload", "counting")
    assert done.returncode == 0, done.stderr
    assert {row["name"] for row in json.loads(versions.cli("models", "list", "--json").stdout)} == {"counting"}
    assert answers(versions)
    assert versions.cli("jobs", "run", "models").returncode == 0
    assert numbers(versions) == ["4", "5"]
    listed = {row["name"]: row for row in json.loads(versions.cli("jobs", "list", "--json").stdout)}
    assert listed["models"]["last_result"] == "ok"


def test_shared_memory_of_a_running_stack_stays(versions: Stack) -> None:
    """Cleaning up beside a stack that serves takes nothing from it, and takes what no process works on."""
    orphan = tritonserver.SHM / f"{tritonserver.shm_prefix(versions.home)}orphan"
    orphan.write_bytes(b"x")
    try:
        before = len(list(tritonserver.SHM.glob(f"{tritonserver.shm_prefix(versions.home)}*")))
        assert versions.cli("cleanup", "run").returncode == 0
        assert orphan.exists()  # it is not a minute old
        assert len(list(tritonserver.SHM.glob(f"{tritonserver.shm_prefix(versions.home)}*"))) == before
        assert answers(versions)
    finally:
        orphan.unlink()
