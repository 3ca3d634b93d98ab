"""Settings of every test."""

import os
import signal

import pytest
from hypothesis import settings

settings.register_profile("truthgpt", deadline=None)  # a deadline of 200 ms finds busy machines, not slow code
settings.load_profile("truthgpt")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # what a script has started with `&`, and the programs under test
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_xdist_auto_num_workers() -> int:
    """One more than there are cores, as many tests wait more than they work, and not more than four."""
    return min(4, len(os.sched_getaffinity(0)) + 1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Those that start servers begin first, so that nobody waits for a long file at the end."""
    items.sort(key=lambda item: "e2e" not in item.path.parts)
