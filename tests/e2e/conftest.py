import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from orchestrator.local import tritonserver
from tests.counting import write_entry

from .addsub import write_addsub
from .stack import Stack, wait_until


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The test that takes a minute whatever the machine begins first, so that nobody waits for it at the end."""
    items.sort(key=lambda item: item.name != "test_a_minute_of_everything_leaves_nothing_behind")


@pytest.fixture(scope="session", autouse=True)
def server_installed() -> None:
    """End-to-end tests need the real server; a machine that cannot run it says so once."""
    try:
        tritonserver.find()
    except tritonserver.ServerMissing as error:
        pytest.skip(str(error))


@contextmanager
def running(**parameters: object) -> Iterator[Stack]:
    """A stack with the counting model, and a second model's entry that is not loaded."""
    folder = Path(tempfile.mkdtemp(prefix="truthgpt-e2e-"))
    write_entry(folder / "repository", slots=4, max_len=2000, **parameters)
    write_addsub(folder / "repository")
    started = Stack(folder / "home", folder / "repository")
    try:
        started.start()
        yield started
    finally:
        started.stop()
        assert started.leftovers() == []
        shutil.rmtree(folder)


@pytest.fixture(scope="session")
def stack() -> Iterator[Stack]:
    """A running stack with the counting model, for all who need no other: 4 slots, 20 ms a step, a queue of 80."""
    with running(step_delay_ms=20, max_queue=80, prefill_chunk=8) as started:
        yield started


@pytest.fixture(scope="session")
def two_models() -> Iterator[Stack]:
    """One with a second model, `addsub`, which does not generate and was loaded through the admin edge; 5 ms a step."""
    with running(step_delay_ms=5) as started:
        key = json.loads(started.cli("keys", "create", "--tenant", "ops", "--scope", "admin", "--json").stdout)["key"]
        headers = {"authorization": f"Bearer {key}"}
        load = "/v2/repository/models/addsub/load"  # 503 while a busy machine keeps Redis from answering
        wait_until(lambda: started.request("POST", load, {}, "OPS", headers=headers)[0] == 200, 10, "addsub is loaded")
        wait_until(lambda: started.request("GET", "/v2/models/addsub/ready")[0] == 200, 10, "the gateway sees addsub")
        yield started
