import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.local import tritonserver
from tests.counting import write_entry

from .stack import Stack


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


@pytest.fixture(scope="session")
def stack() -> Iterator[Stack]:
    """A running stack with the counting model, for all who need no other: 4 slots, 20 ms a step, a queue of 80."""
    folder = Path(tempfile.mkdtemp(prefix="truthgpt-e2e-"))
    write_entry(folder / "repository", slots=4, step_delay_ms=20, max_queue=80, max_len=2000, prefill_chunk=8)
    running = Stack(folder / "home", folder / "repository")
    try:
        running.start()
        yield running
    finally:
        running.stop()
        assert running.leftovers() == []
        shutil.rmtree(folder)
