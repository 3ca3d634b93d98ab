"""Engines that take turns on a workload, round after round, and the result of it."""

from __future__ import annotations

import asyncio
import signal
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import uvloop
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks import figures
from benchmarks.contenders import Contender, Failed
from benchmarks.figures import Case, Samples
from benchmarks.workloads import Conversation, Turn, Workload

console = Console(stderr=True)
WARM_NEW = 8
MEMORY_MIB = 256  # of each thread: more than any cache


@dataclass(frozen=True)
class Source:
    """Where contenders come from: `start(workload)` is a context in which they run, and raises Failed."""

    name: str
    start: Callable[[Workload], AbstractAsyncContextManager[Sequence[Contender]]]


@dataclass
class Plan:
    """What is run. `clients` and `rates`, if any, are in the place of the workloads' own."""

    workloads: Sequence[Workload]
    rounds: int
    clients: Sequence[int] = ()
    rates: Sequence[float] = ()
    seed: str = field(default_factory=lambda: str(time.time_ns()))

    def loads(self, workload: Workload) -> Sequence[float]:
        if workload.open_loop:
            return self.rates or workload.loads
        return [float(count) for count in self.clients] or workload.loads


@dataclass
class Outcome:
    """What was measured: `settings` by engine and precision, `agreement` with the reference's tokens, in answers."""

    samples: Samples = field(default_factory=Samples)
    settings: dict[str, Any] = field(default_factory=dict)
    agreement: dict[str, tuple[int, int]] = field(default_factory=dict)
    bandwidth_gb_s: list[float] = field(default_factory=list)


def run(plan: Plan, sources: Sequence[Source]) -> Outcome:
    """`hold` in a loop of its own. SIGTERM ends what was started, as Ctrl-C does, and then this process."""

    async def until_told() -> Outcome:
        task = asyncio.current_task()
        assert task is not None
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
        return await hold(plan, sources)

    try:
        return uvloop.run(until_told())
    except asyncio.CancelledError:
        raise SystemExit(128 + signal.SIGTERM) from None


async def hold(plan: Plan, sources: Sequence[Source]) -> Outcome:
    """Every workload with the engines of all sources. What fails is told, left out and in the result."""
    outcome = Outcome()
    for workload in plan.workloads:
        async with AsyncExitStack() as running:
            contenders: list[Contender] = []
            for source in sources:
                with console.status(f"{workload.name}: starting {source.name}"):
                    try:
                        contenders += await running.enter_async_context(source.start(workload))
                    except Failed as error:
                        _tell(outcome, Case(workload.name, source.name, "", 0), error)
            for one in contenders:
                outcome.settings.setdefault(f"{one.engine} {one.precision}", {})[workload.name] = one.about()
            await _take_turns(plan, workload, contenders, outcome)
    return outcome


async def _take_turns(plan: Plan, workload: Workload, contenders: list[Contender], outcome: Outcome) -> None:
    contenders = [one for one in contenders if workload.together or not one.together]
    loads, rounds = plan.loads(workload), min(plan.rounds, workload.rounds)
    out: set[int] = set()
    for number, contender in enumerate(contenders):
        with console.status(f"{workload.name}: warming up {contender.engine} {contender.precision}"):
            try:
                await contender.run(_json(warm_up(workload, int(max(loads)), f"{plan.seed} warm")))
            except Failed as error:
                out.add(number)
                _tell(outcome, Case(workload.name, contender.engine, contender.precision, 0), error)
    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"), TimeElapsedColumn(),
        console=console,
    )  # fmt: skip
    with bar:
        task = bar.add_task(workload.name, total=rounds * len(loads) * (len(contenders) - len(out)))
        for round_number in range(rounds):
            outcome.bandwidth_gb_s.append(read_bandwidth())
            for load in loads:
                seed = f"{plan.seed} {round_number} {load:g}"
                # The gateway stands in front of a server that is asked as well, and that knows what it has been asked.
                prompts = {False: _json(workload.make(load, seed)), True: _json(workload.make(load, f"{seed} gateway"))}
                answers: dict[int, list[dict[str, Any]]] = {}
                order = range(len(contenders))
                for number in order if round_number % 2 == 0 else reversed(order):
                    if number in out:
                        continue
                    contender = contenders[number]
                    asked = prompts[contender.engine == figures.GATEWAY]
                    case = Case(workload.name, contender.engine, contender.precision, load)
                    where = f"{workload.name} {load:g}, round {round_number + 1}/{rounds}"
                    bar.update(task, description=f"{where}: {case.engine} {case.precision}")
                    if not console.is_terminal:
                        console.print(f"{where}: {case.engine} {case.precision}", highlight=False)
                    try:
                        answers[number] = await contender.run(asked)
                        outcome.samples.add(
                            case, round_number, figures.of_run(checked(asked, answers[number]), workload.open_loop)
                        )
                    except Failed as error:
                        out.add(number)
                        _tell(outcome, case, error)
                    bar.advance(task)
                if workload.name == "W":
                    _compare(contenders, answers, outcome)


def checked(asked: list[dict[str, Any]], answers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The answers, if each turn has one of exactly as many tokens as were asked for. Raises Failed."""
    wanted = {(c, t): turn["new"] for c, one in enumerate(asked) for t, turn in enumerate(one["turns"])}
    given = {(answer["conversation"], answer["turn"]): len(answer["ids"]) for answer in answers}
    if wanted != given or len(answers) != len(wanted):
        raise Failed(f"{len(answers)} answers of {sorted(set(given.values()))} tokens, {len(wanted)} were asked for")
    return answers


def warm_up(workload: Workload, clients: int, seed: str) -> list[Conversation]:
    """Short answers to so many prompts of the workload: allocations, page faults, kernels made at first use."""
    made = workload.make(clients, seed)[: max(1, clients)]
    return [Conversation(0.0, (Turn(one.turns[0].tokens, WARM_NEW),)) for one in made]


def _compare(contenders: list[Contender], answers: dict[int, list[dict[str, Any]]], outcome: Outcome) -> None:
    reference = next((answers[n] for n in answers if contenders[n].engine == figures.REFERENCE), None)
    if reference is None:
        return
    for number, given in answers.items():
        contender = contenders[number]
        if contender.engine not in (figures.REFERENCE, figures.GATEWAY) and figures.width(contender.precision) == 32:
            same, count = figures.agreement(given, reference)
            name = f"{contender.engine} {contender.precision}"
            before = outcome.agreement.get(name, (0, 0))
            outcome.agreement[name] = (before[0] + same, before[1] + count)


def _json(conversations: list[Conversation]) -> list[dict[str, Any]]:
    return [one.to_json() for one in conversations]


def _tell(outcome: Outcome, case: Case, error: Failed) -> None:
    outcome.samples.failed[case] = str(error)[:2000]
    console.print(f"{case.workload}: left out: {error}", style="red", markup=False)


def read_bandwidth(threads: int = 2) -> float:
    """10^9 bytes a second that so many threads read from memory together, the best of three passes.

    Each sums the products of its own array with itself, which is as fast as anything that touches every byte.
    """
    arrays = [np.ones(MEMORY_MIB * 2**18, np.float32) for _ in range(threads)]
    best = 0.0
    for _ in range(3):
        readers = [threading.Thread(target=np.dot, args=(array, array)) for array in arrays]
        began = time.perf_counter()
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join()
        best = max(best, sum(array.nbytes for array in arrays) / (time.perf_counter() - began) / 1e9)
    return best
