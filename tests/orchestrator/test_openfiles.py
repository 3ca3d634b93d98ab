"""How many clients a process can have."""

from __future__ import annotations

import resource

from orchestrator.openfiles import connections
from orchestrator.server import configure
from orchestrator.settings import Settings


def test_open_files_bound_the_connections() -> None:
    """Where the system allows few open files a fifth of them is left for what else needs some."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1000, hard))
    try:
        assert connections() == 800
        assert configure(None, Settings()).bounds.connections == 800
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
