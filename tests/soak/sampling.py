"""What the processes of a running stack hold at one moment, and what they have left on disk and in shared memory."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import psutil
import redis

from orchestrator.local import tritonserver
from tests.e2e.stack import Stack

Figure = tuple[str, str]  # of whom, and what
Sample = Mapping[Figure, float]


class Gone(Exception):
    """A process has ended that should have run through."""


class Sampler:
    """The processes are those that run now: one that is started anew later is a failure, and not a series of its own.

    Memory is anonymous memory in bytes. Descriptors are files (whatever is no socket), of
    which a process has always the same, and sockets, which come and go with clients. Redis' keys are those without an
    expiry, which only commands make, and those that expire.
    """

    def __init__(self, stack: Stack) -> None:
        self._stack = stack
        self._prefix = tritonserver.shm_prefix(stack.home)
        parent = psutil.Process(stack.pid("gateway"))
        self._processes = {
            "supervisor": psutil.Process(stack.pid("supervisor")),
            "parent": parent,
            **{f"worker {n}": child for n, child in enumerate(sorted(parent.children(), key=lambda p: p.pid), 1)},
            **{name: psutil.Process(stack.pid(name)) for name in ("triton", "stub", "redis")},
        }
        self._redis = redis.Redis.from_url(stack.state.redis)

    @property
    def workers(self) -> int:
        return sum(name.startswith("worker") for name in self._processes)

    def take(self) -> Sample:
        """One sample; takes some 20 ms. Raises Gone."""
        found: dict[Figure, float] = {}
        for who, process in self._processes.items():
            try:
                memory, (files, sockets) = anonymous(process.pid), _descriptors(process.pid)
                found |= {
                    (who, "memory"): memory,
                    (who, "files"): files,
                    (who, "sockets"): sockets,
                    (who, "threads"): process.num_threads(),
                }
            except (psutil.Error, OSError) as error:
                raise Gone(f"{who} is gone: {error}") from error
        regions = [path.stat().st_size for path in _files(tritonserver.SHM, f"{self._prefix}*")]
        found |= {("shm", "regions"): len(regions), ("shm", "bytes"): sum(regions)}
        space = self._redis.info("keyspace").get("db0", {"keys": 0, "expires": 0})
        found |= {
            ("redis", "used"): self._redis.info("memory")["used_memory"],
            ("redis", "keys"): space["keys"] - space["expires"],
            ("redis", "expiring"): space["expires"],
        }
        return found

    def disk(self) -> dict[str, int]:
        """Bytes of each folder of the home that is written to while requests are served."""
        sizes: dict[str, int] = {}
        for path in _files(self._stack.home, "**/*"):
            folder = path.relative_to(self._stack.home).parts[0]
            if path.is_file() and folder not in ("triton", "run"):
                sizes[folder] = sizes.get(folder, 0) + path.stat().st_size
        return sizes

    def close(self) -> None:
        self._redis.close()


def anonymous(pid: int) -> int:
    """Bytes of memory that is no file's: heaps, stacks, written pages of libraries.

    Not the unique or proportional set size: these grow by the pages of a library when another process that mapped it
    too ends, by 20 MiB in a stub whose neighbour was a stub.
    """
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Anonymous:"):
            return int(line.split()[1]) * 1024
    raise Gone(f"process {pid} has no memory any more")


def _descriptors(pid: int) -> tuple[int, int]:
    """How many files and how many sockets a process has open."""
    sockets = total = 0
    for path in Path(f"/proc/{pid}/fd").iterdir():
        try:
            sockets += os.readlink(path).startswith("socket:")
            total += 1
        except FileNotFoundError:
            continue  # it was closed just now
    return total - sockets, sockets


def _files(folder: Path, pattern: str) -> list[Path]:
    return [path for path in folder.glob(pattern) if path.exists()]
