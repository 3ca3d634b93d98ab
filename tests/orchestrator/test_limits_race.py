"""Four processes race on one Redis: together they are held to the limits. Run as a program, this is one of them."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from bisect import bisect_left
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import redis

from orchestrator.domain import Limits
from orchestrator.limits import PEEK, SETTLE, Verdict, reserve_args, settle_args, verdict

from ..redis import RealRedis

PROCESSES = 4
LIMIT = 50
SPEED = 100  # of the scaled clock: a minute's window is 0.6 s
SCALED_S = 2.0
FIXED = Limits(per_minute=LIMIT, per_hour=10 * LIMIT, tokens_per_minute=3 * LIMIT)
ROLLING = Limits(per_minute=LIMIT, tokens_per_minute=30 * LIMIT)
LEASED = Limits(per_minute=LIMIT, concurrency=1)


class Racer:
    def __init__(self, path: str) -> None:
        self.client = redis.Redis(unix_socket_path=path)
        self.client.script_load(PEEK.text), self.client.script_load(SETTLE.text)

    def reserve(self, name: str, limits: Limits, lease: str, tokens: int = 3, now_ms: int = -1) -> Verdict:
        packed = reserve_args(limits, tokens=tokens, lease=lease, enforce=True, now_ms=now_ms)
        return verdict(self.client.evalsha(PEEK.sha, 2, name, f"n:{name}", packed), limits)

    def fixed(self) -> int:
        """How many of 100 requests are accepted, as fast as they go, on Redis's clock."""
        return sum(self.reserve("fixed", FIXED, str(number)).accepted for number in range(100))

    def rolling(self, began_s: float) -> list[list[int]]:
        """Time and tokens of what is accepted in some windows of the scaled clock; some give tokens back."""
        accepted = []
        number = 0
        while (passed_s := time.time() - began_s) < SCALED_S:
            number += 1
            tokens = 1 + number % 97
            said = self.reserve("rolling", ROLLING, "", tokens, 1_700_000_000_000 + int(passed_s * 1000 * SPEED))
            if said.accepted:
                used = tokens // 2 if number % 3 == 0 else tokens
                self.client.evalsha(SETTLE.sha, 2, "rolling", "n:rolling", *settle_args(said, used, ""))
                accepted.append([said.reservation.time_ms, used])
            time.sleep(0.0005)
        return accepted


@contextmanager
def racers(path: Path, count: int, what: str) -> Iterator[list[subprocess.Popen[str]]]:
    """Processes that are connected and start together when all of them are; they are ended with the block."""
    argv = [sys.executable, "-m", __name__, str(path), what]
    running = [
        subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2])
        for _ in range(count)
    ]
    try:
        for process in running:
            assert process.stdout is not None and process.stdout.readline() == "ready\n"
        now = f"{time.time()}\n"
        for process in running:
            assert process.stdin is not None
            process.stdin.write(now)
            process.stdin.flush()
        yield running
    finally:
        for process in running:
            process.kill()
            process.communicate()


def answer(process: subprocess.Popen[str]) -> dict[str, Any]:
    assert process.stdout is not None
    return dict(json.loads(process.stdout.readline()))


def test_four_processes(server: RealRedis) -> None:
    """Racing processes get exactly the limit within a minute, and never more in any rolling window of several."""
    with racers(server.path, PROCESSES, "race") as running:
        answers = [answer(process) for process in running]
    assert sum(found["fixed"] for found in answers) == LIMIT
    accepted = sorted((at, used) for found in answers for at, used in found["rolling"])
    times = [at for at, _ in accepted]
    assert len({at // 61_000 for at in times}) >= 3
    for index, at in enumerate(times):
        window = accepted[bisect_left(times, at - 60_000) : index + 1]
        assert len(window) <= LIMIT
        assert sum(used for _, used in window) <= 30 * LIMIT
    # and not by refusing what it need not: as much as fits is accepted
    assert len(accepted) >= 2 * LIMIT * 0.6


def test_a_holder_dies(server: RealRedis) -> None:
    """The lease of a killed process blocks no longer than it lasts, and what that process had counted stays counted."""
    with racers(server.path, 1, "hold") as (holder,):
        assert answer(holder) == {"held": 1}
        holder.kill()
        holder.wait()
        now_ms = int(time.time() * 1000)
        here = Racer(str(server.path))
        refused = here.reserve("hold", LEASED, "b", now_ms=now_ms)
        assert refused.refused is not None and refused.refused.name == "concurrency"
        freed = here.reserve("hold", LEASED, "b", now_ms=now_ms + 30_001)
        assert freed.accepted and [window.used for window in freed.windows] == [2, 1]


if __name__ == "__main__":
    racer = Racer(sys.argv[1])
    print("ready", flush=True)
    began = float(sys.stdin.readline())
    if sys.argv[2] == "hold":
        print(json.dumps({"held": racer.reserve("hold", LEASED, "a").accepted + 0}), flush=True)
        time.sleep(60)
    print(json.dumps({"rolling": racer.rolling(began), "fixed": racer.fixed()}), flush=True)
