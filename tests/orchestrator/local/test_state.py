import dataclasses
import json
import os
from pathlib import Path

import psutil
import pytest

from orchestrator.local import state
from orchestrator.local.places import Place


@pytest.fixture
def mine() -> state.State:
    """A state as this very process would write it."""
    created = psutil.Process().create_time()
    return state.State(os.getpid(), created, created, "h", "g", "o", "th", "tg", "r", "m", "p", {"triton": 1})


def test_a_state_is_read_as_it_was_written_and_only_by_its_owner(tmp_path: Path, mine: state.State):
    """Nothing is lost on the way through the file, and its mode is 0600."""
    state.write(tmp_path, mine)
    assert state.read(tmp_path) == mine and mine.running
    assert state.path(tmp_path).stat().st_mode & 0o777 == 0o600
    assert [p.name for p in tmp_path.iterdir()] == ["state.json"]
    state.clear(tmp_path)
    state.clear(tmp_path)
    assert state.read(tmp_path) is None


def test_its_servers_are_read_as_they_were_written(tmp_path: Path, mine: state.State):
    """Each with its own process; a stack that uses servers of others has none."""
    servers = [Place(name, f"{name} http", "g", "m", f"{name}_") for name in ("triton", "triton-2")]
    several = dataclasses.replace(mine, servers=servers, processes={"redis": 1, "triton": 2, "triton-2": 3})
    state.write(tmp_path, several)
    found = state.read(tmp_path)
    assert found == several and found.tritons == servers and found.triton_pids == [2, 3]
    state.write(tmp_path, dataclasses.replace(mine, servers=[]))
    found = state.read(tmp_path)
    assert found is not None and found.tritons == [] and found.triton_pids == []


def test_a_state_of_a_version_that_knew_one_server_is_read(tmp_path: Path, mine: state.State):
    """Its one server is what the older fields say."""
    written = {name: value for name, value in dataclasses.asdict(mine).items() if name != "servers"}
    state.path(tmp_path).write_text(json.dumps(written))
    found = state.read(tmp_path)
    assert found is not None and found.tritons == [Place("triton", "th", "tg", "", "p")] and found.triton_pids == [1]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"pid": 1}', "null", '{"servers": [1]}', '{"servers": 1}'])
def test_a_file_that_is_not_a_state_counts_as_none(tmp_path: Path, text: str):
    """A damaged state file is no crash."""
    state.path(tmp_path).write_text(text)
    assert state.read(tmp_path) is None


def test_a_pid_that_another_program_has_taken_does_not_count(mine: state.State):
    """A process that started at another time is not the supervisor."""
    assert not dataclasses.replace(mine, created=mine.created - 100).running
    assert not dataclasses.replace(mine, pid=2**22 + 1).running


def test_a_home_has_one_holder(tmp_path: Path):
    """The second lock is refused until the first is let go."""
    with state.lock(tmp_path / "home"), pytest.raises(state.AlreadyRunning):
        state.lock(tmp_path / "home")
    state.lock(tmp_path / "home").close()
