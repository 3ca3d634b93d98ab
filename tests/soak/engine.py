"""A real stack under mixed load for some time, what was seen of it, and the verdict."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import redis

from orchestrator.ops import cachetools
from orchestrator.ops.keyring import Keyring
from tests.counting import write_entry
from tests.e2e.stack import Stack, wait_until

from . import ending
from .load import Traffic
from .sampling import Figure, Gone, Sample, Sampler
from .verdict import Bound, Finding, judge

SAMPLE_S = 1.0
SAMPLES = 40  # at least: a short run is looked at more often
SETTLE_S = 3.0  # before the first sample: connections and pools
LIMITED = {"per_minute": 20, "tokens_per_minute": 100_000}
ANSWER_TTL_S = 5  # so short that as many answers expire as are stored
KIB, MIB = 1 << 10, 1 << 20
BOUNDS: dict[str, Bound] = {
    "memory": Bound(slope=512 * KIB, rise=1.5 * MIB),
    "files": Bound(slope=1, rise=1),
    "sockets": Bound(slope=1, rise=15),  # up to 40 clients at once come and go, more of them on a busy machine
    "threads": Bound(slope=1, rise=1),
    "regions": Bound(slope=1, rise=1),
    "bytes": Bound(slope=MIB, rise=MIB),
    "used": Bound(slope=512 * KIB, rise=512 * KIB),
    "keys": Bound(slope=1, rise=1),
    # Answers and locks that expire within seconds: some 300 at 100 requests a second. Their number follows the rate, so
    # it may rise by a third without a leak; one key in 1,000 requests that is kept shows in the long run.
    "expiring": Bound(slope=10, rise=100),
}
WORKERS = 2
FLOOR = 0.5  # of the rate that was asked for: what a run must reach to prove anything
WRITTEN_BYTES = 4096  # of logs, audit and Redis's file together, a request


@dataclass(frozen=True)
class Report:
    """`rate` is what should have been asked a second, `written` bytes on disk by folder; `wrong` are answers that
    should not have come, `faults` what else is wrong, the checks themselves included.
    """

    seconds: float
    rate: float
    requests: int
    outcomes: Mapping[tuple[str, str], int]
    wrong: tuple[str, ...]
    faults: tuple[str, ...]
    findings: Mapping[Figure, Finding]
    written: Mapping[str, int]

    @property
    def written_each(self) -> float:
        """Bytes on disk that a request costs."""
        return sum(self.written.values()) / max(1, self.requests)

    @property
    def problems(self) -> list[str]:
        """What is wrong, a line each; none when the soak was passed."""
        growing = [
            f"{who} {what} grows by {found.slope:,.0f} in 10,000 requests ({found.begin:,.0f} -> {found.end:,.0f})"
            for (who, what), found in self.findings.items()
            if not found.flat
        ]
        if self.written_each > WRITTEN_BYTES:
            growing.append(f"{self.written_each:,.0f} bytes are written to disk a request")
        if self.requests < FLOOR * self.rate * self.seconds:
            growing.append(f"{self.requests / self.seconds:.0f} requests a second, not {self.rate:g}, prove too little")
        return [*growing, *self.faults, *(f"wrong answer: {wrong}" for wrong in sorted(set(self.wrong))[:20])]


@dataclass(frozen=True)
class Progress:
    """How far a run is, for people."""

    elapsed_s: float
    requests: int
    wrong: int
    sample: Sample


@contextmanager
def running(environ: Mapping[str, str]) -> Iterator[Stack]:
    """A stack with two workers and everything switched on; gone afterwards, with nothing left of it."""
    folder = Path(tempfile.mkdtemp(prefix="truthgpt-soak-"))
    write_entry(folder / "repository", slots=8, step_delay_ms=3, max_queue=80, max_len=2000)
    extra = {
        "TRUTHGPT_WORKERS": str(WORKERS), "TRUTHGPT_AUTH": "keys", "TRUTHGPT_SANITIZE": "reject",
        "TRUTHGPT_DEBUG": "false", "TRUTHGPT_LOG_LEVEL": "info",
        # how soon a model counts as dead is no matter here, and a busy machine must not kill it
        "TRUTHGPT_HEARTBEAT_TIMEOUT_S": "10", "TRUTHGPT_STALL_S": "20", **environ,
    }  # fmt: skip
    stack = Stack(folder / "home", folder / "repository", extra=extra)
    try:
        stack.start()
        yield stack
    finally:
        stack.stop()
        left = stack.leftovers()
        shutil.rmtree(folder)
        assert left == []


def run(
    seconds: float, rate: float, environ: Mapping[str, str] | None = None,
    progress: Callable[[Progress], None] = lambda progress: None, requests: int | None = None,
) -> Report:  # fmt: skip
    """Start a stack, ask `rate` requests a second of it for `seconds`, or until `requests` were answered, and judge.

    `environ` is added to the stack's.
    """
    with running(environ or {}) as stack:
        with redis.Redis.from_url(stack.state.redis) as client:
            (_, limited), (_, key) = (Keyring(client).create("acme", limits=limits) for limits in (LIMITED, {}))
            cachetools.set_ttl(client, "text_generation", ANSWER_TTL_S)
        wait_until(lambda: stack.knows(key), 5, "both workers know the keys")
        ports = {name: f"127.0.0.1:{port}" for name, port in stack.ports.items()}
        traffic = Traffic(
            http=f"http://{ports['HTTP']}", grpc=ports["GRPC"], ops=f"http://{ports['OPS']}", model=stack.model,
            key=key, limited=limited, rate=rate,
        )  # fmt: skip
        sampler = Sampler(stack)
        try:
            report = asyncio.run(_soak(traffic, sampler, seconds, progress, requests))
            return replace(report, faults=(*report.faults, *ending.faults(stack)))
        finally:
            sampler.close()


async def _soak(
    traffic: Traffic, sampler: Sampler, seconds: float, progress: Callable[[Progress], None], requests: int | None
) -> Report:  # fmt: skip
    series: dict[Figure, list[tuple[float, float]]] = {}
    shortest_s = seconds if requests is None else requests / traffic.rate
    pause_s = min(SAMPLE_S, shortest_s / SAMPLES)
    gone: tuple[str, ...] = ()
    async with traffic:
        await asyncio.sleep(SETTLE_S)
        began, before, served = time.monotonic(), sampler.disk(), traffic.done
        while (elapsed := time.monotonic() - began) < seconds and not gone:
            if requests is not None and traffic.done - served >= requests:
                break
            try:
                sample = await asyncio.to_thread(sampler.take)
            except Gone as error:
                gone = (str(error),)
                break
            for figure, value in sample.items():
                series.setdefault(figure, []).append((traffic.done, value))
            progress(Progress(elapsed, traffic.done, len(traffic.wrong), sample))
            await asyncio.sleep(max(0.0, pause_s - (time.monotonic() - began - elapsed)))
    written = {name: size - before.get(name, 0) for name, size in sampler.disk().items()}
    findings = {
        figure: judge(points, BOUNDS[figure[1]])
        for figure, points in series.items()
        if figure[1] in BOUNDS and not gone
    }
    return Report(
        time.monotonic() - began, traffic.rate, traffic.done - served, traffic.outcomes, tuple(traffic.wrong),
        (*(gone or unseen(findings)), *traffic.lacking), findings, written,
    )  # fmt: skip


def unseen(findings: Mapping[Figure, Finding]) -> list[str]:
    """What should have been looked at and was not, a line each: nothing of it can have grown."""
    workers = [(f"worker {number}", "memory") for number in range(1, WORKERS + 1)]
    wanted = [*workers, ("shm", "regions"), ("shm", "bytes")]
    return [f"{who} {what} was not seen" for who, what in wanted if not getattr(findings.get((who, what)), "peak", 0)]
