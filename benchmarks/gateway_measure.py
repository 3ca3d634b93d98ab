"""One system's turn in a round: which requests it is asked, and what is kept of each run."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import click

from benchmarks import gateway_load
from benchmarks.gateway_load import Ask, Result
from benchmarks.gateway_machine import cores, cpu_s, memory_mb, pinned
from benchmarks.gateway_systems import System, get

CHUNKS = 16
STRAYS = 0.005  # of a cache's answers may not come from it: a look-up that takes longer than its deadline is given up
_SUM = re.compile(r'^truthgpt_stage_seconds_(sum|count)\{stage="([^"]+)"\} (\S+)$', re.MULTILINE)


@dataclass(frozen=True)
class Pace:
    """How long runs take. `at_least` requests are waited for in each, but no longer than `at_most_s`."""

    seconds: float = 2.0
    warm_s: float = 0.6
    at_least: int = 200
    at_most_s: float = 8.0

    @property
    def options(self) -> dict[str, float]:
        return {"warm_s": self.warm_s, "at_least": self.at_least, "at_most_s": self.at_most_s}


QUICK = Pace(seconds=0.7, warm_s=0.3, at_least=30, at_most_s=3.0)


@dataclass(frozen=True)
class Run:
    """One workload: a request of `tokens` tokens at `clients` connections."""

    clients: int
    stream: bool = False
    same: bool = False

    @property
    def name(self) -> str:
        what = "hit" if self.same else f"stream of {CHUNKS}" if self.stream else "request"
        return f"{what}, C={self.clients}"

    @property
    def tokens(self) -> int:
        return CHUNKS if self.stream else 1


REQUEST_1, REQUEST_32, STREAM_1, STREAM_32 = Run(1), Run(32), Run(1, stream=True), Run(32, stream=True)
HIT_1, HIT_32 = Run(1, same=True), Run(32, same=True)
PLAIN = (REQUEST_1, REQUEST_32, STREAM_1, STREAM_32)
HITS = (HIT_1, HIT_32)


def ask_of(system: System, run: Run) -> Ask:
    """The request of this workload as this system takes it; one that caches has to say what its cache did."""
    ask = system.ask or gateway_load.chat
    return ask(
        system.port, run.stream, run.tokens, system.model, system.key, token=system.token,
        same=gateway_load.new_number() if run.same else 0, needs=system.hit if run.same else system.miss,
    )  # fmt: skip


async def primed(system: System, run: Run) -> Ask:
    """The same; what shall come from the cache was asked for once."""
    ask = ask_of(system, run)
    if run.same:
        result = await gateway_load.http(replace(ask, needs=b""), 1, 0.0, warm_s=0.01, at_most_s=5.0)
        if result.errors:
            raise click.ClickException(f"{system.name}: {run.name}: {result.errors}")
        await asyncio.sleep(0.3)  # some store an answer after they have given it
    return ask


def kept(result: Result) -> dict[str, Any]:
    """What is written down of a run: milliseconds, requests a second, CPU microseconds a request."""
    row: dict[str, Any] = {"requests": result.requests, "per_s": round(result.rate, 1), "errors": result.errors}
    row["strays"] = result.strays
    row |= {f"{name}_ms": round(value, 4) for name, value in result.whole.items()}
    row |= {f"first_{name}_ms": round(value, 4) for name, value in result.first.items()}
    if result.before is not None and result.requests:
        row["cpu_us"] = round((result.after - result.before) / result.requests * 1e6, 1)
    if result.events:
        row["events"] = round(result.events, 1)
    row["generator_us"] = round(result.generator_us, 1)
    return row


async def turn(system: System, runs: tuple[Run, ...], pace: Pace) -> dict[str, dict[str, Any]]:
    """Every workload of one system, once. A run with errors is no result: it has nothing but them."""
    await system.turn()
    pids = system.process.pids if system.process is not None else []
    if system.process is not None and pinned(system.process.popen.pid) != {cores()[0]}:
        raise click.ClickException(f"{system.name} has left its core")
    rows: dict[str, dict[str, Any]] = {}
    for run in runs:
        rows[run.name] = await once_more(partial(_asked, system, run, pace, pids))
    system.extra["mb"] = memory_mb(pids) if pids else None
    system.rest()
    return rows


async def once_more(measure: Callable[[], Awaitable[dict[str, Any]]]) -> dict[str, Any]:
    """A run's row. One with errors is measured once more, and what was wrong with it is kept as `discarded`: Triton
    itself stands still for seconds now and then.
    """
    row = await measure()
    if row["errors"]:
        row = {**await measure(), "discarded": row["errors"]}
    return row


async def _asked(system: System, run: Run, pace: Pace, pids: list[int]) -> dict[str, Any]:
    sample = (lambda: cpu_s(pids)) if pids else (lambda: None)
    ask = await primed(system, run)
    result = await gateway_load.http(ask, run.clients, pace.seconds, sample=sample, **pace.options)
    system.answered += result.requests
    errors = dict(result.errors) if result.requests else {**result.errors, "nothing was answered": 1}
    if result.strays > STRAYS * result.requests:
        errors[f"answers without {ask.needs.decode()!r}"] = result.strays
    return {"errors": errors} if errors else kept(result)


async def stages(system: System, pace: Pace) -> dict[str, dict[str, float]]:
    """Mean microseconds in each stage of the gateway's path with one client, from its own metrics."""
    await system.turn()
    found: dict[str, dict[str, float]] = {}
    for run in (REQUEST_1, STREAM_1, HIT_1):
        ask = await primed(system, run)
        before = await _stage_sums(system)
        result = await gateway_load.http(ask, 1, pace.seconds, warm_s=0.0)
        after = await _stage_sums(system)
        row = {}
        for stage, (total, count) in after.items():
            since, already = before.get(stage, (0.0, 0.0))
            if count - already > result.requests / 2:  # what others did meanwhile, such as the check before, is no mean
                row[stage] = round((total - since) / (count - already) * 1e6, 1)
        found[run.name] = {**row, "client sees": round(result.whole["mean"] * 1000, 1)}
    system.rest()
    return found


async def _stage_sums(system: System) -> Mapping[str, tuple[float, float]]:
    await asyncio.sleep(2.2)  # workers tell the process that is scraped once a second
    sums: dict[str, dict[str, float]] = {}
    for kind, stage, value in _SUM.findall(await get(system.extra["ops"], "/metrics")):
        sums.setdefault(stage, {})[kind] = float(value)
    return {stage: (both["sum"], both["count"]) for stage, both in sums.items()}


async def growth(system: System, upto: int, mark: int, step: int) -> dict[str, Any]:
    """Memory every `step` requests, all of them misses, until `upto`: the points, and their slope from `mark` on.

    By least squares, in 10^6 bytes for 10,000 requests. The result's `mark` is the index of that point.
    """
    await system.turn()
    assert system.process is not None
    points: list[tuple[int, dict[str, float]]] = []
    ask, done = ask_of(system, REQUEST_32), 0
    while done < upto:
        result = await gateway_load.http(ask, 32, 0.0, warm_s=0.0, at_least=min(step, upto - done), at_most_s=120.0)
        if result.errors or not result.requests:
            raise click.ClickException(f"{system.name}: memory: {result.errors or 'nothing was answered'}")
        done += result.requests
        points.append((done, memory_mb(system.process.pids)))
    system.answered += done
    system.rest()
    at = next(index for index, (count, _) in enumerate(points) if count >= mark)
    return {
        "points": [{"requests": count, **mb} for count, mb in points],
        "mark": at,
        "slope_mb_per_10000": round(_slope([(count / 10_000, mb["pss"]) for count, mb in points[at:]]), 3),
    }


def _slope(points: list[tuple[float, float]]) -> float:
    mean_x = sum(x for x, _ in points) / len(points)
    mean_y = sum(y for _, y in points) / len(points)
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    return sum((x - mean_x) * (y - mean_y) for x, y in points) / spread if spread else 0.0
