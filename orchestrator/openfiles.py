"""How many clients a process can have: each connection is an open file."""

from __future__ import annotations

import resource

CONNECTIONS = 10_000


def connections() -> int:
    """At a time in one process, and of one protocol; what else has files keeps a fifth of those the system allows."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return min(CONNECTIONS, files * 8 // 10)
