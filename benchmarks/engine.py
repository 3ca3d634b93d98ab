"""Our engine through the real Triton and through the gateway, beside its bare loops and transformers, in one run.

    python -m benchmarks.engine [--clients 1,8,16] [--rounds 3] [--precisions fp32,int8] [--workload W,chat,long,mixed]

The model is a random GPT-2-small (124M parameters, seed 0). Engines take turns within a round, so that a machine whose
speed drifts favours none; figures are medians over rounds. Writes benchmarks/results/engine.json, .md and .png; the
last line printed is JSON. benchmarks/README.md says what the workloads and figures are.
"""

from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from benchmarks import checkpoint, contenders, contest, engine_report, figures, streaming
from benchmarks.contenders import Clients, Contender, Failed, Worker, WorkerSpec
from benchmarks.contest import Plan, Source, console
from benchmarks.workloads import WORKLOADS, Workload

RESULTS = Path(__file__).parent / "results"
THREADS = 2
# Random weights say one token again and again, which drafts from the text before guess far too well.
PARAMETERS = {"speculation": "off"}
# Where prompts begin alike: the prefixes of sixteen conversations take 1.1 GB; OpenVINO's cache has as much room.
SHARED = {"prefix_cache_mb": "2048"}


class Ours:
    """Our entries of one checkpoint, in a folder, and what serves them."""

    def __init__(
        self, folder: Path, source: Path, precisions: Sequence[str], slots: int, parameters: dict[str, str]
    ) -> None:
        self._folder, self._source, self._slots, self._parameters = folder, source, slots, parameters
        self._precisions = [*precisions]
        self._repository, self._logs = folder / "repository", folder / "logs"
        self._entries: dict[tuple[str, int], str] = {}
        self._given: dict[int, dict[str, str]] = {}  # parameters of config.pbtxt, by max_len
        for made in (self._repository, self._logs):
            made.mkdir()

    @property
    def weights(self) -> dict[str, int]:
        """Bytes of weights that a token reads, by precision."""
        return {
            precision: checkpoint.weight_bytes(self._repository / name / "1" / "model.onnx")
            for (precision, _), name in self._entries.items()
        }

    def export(self, workloads: Sequence[Workload]) -> None:
        """What these workloads need. A precision that cannot be exported is told and left out."""
        for precision in [*self._precisions]:
            for max_len in sorted({workload.max_len for workload in workloads}):
                shared = any(workload.prefix for workload in workloads if workload.max_len == max_len)
                self._given[max_len] = (SHARED if shared else {}) | self._parameters
                try:
                    with console.status(f"export {precision} with {max_len} positions"):
                        name = contenders.export(
                            self._source, self._repository, precision, self._slots, max_len, self._given[max_len]
                        )
                except Failed as error:
                    console.print(f"{precision} is left out: {error}", style="red", markup=False)
                    self._precisions.remove(precision)
                    break
                self._entries[precision, max_len] = name

    def served(self, *, gateway: bool) -> Source:
        """Triton's streaming clients and, with `gateway`, those of the gateway in front of the same Triton."""

        @asynccontextmanager
        async def start(workload: Workload) -> AsyncIterator[list[Contender]]:
            names = {p: self._entries[p, workload.max_len] for p in self._precisions}
            home = self._folder / f"home-{workload.name}"
            about = {"slots": self._slots, "parameters": self._given[workload.max_len]}
            async with contenders.stack(self._repository, home, [*names.values()]) as (triton, http, key):
                found = [
                    Clients(figures.OURS, p, streaming.triton(triton, n), settings=about) for p, n in names.items()
                ]
                if gateway:
                    found += [
                        Clients(figures.GATEWAY, p, streaming.openai(http, n, key), settings=about)
                        for p, n in names.items()
                    ]
                yield [*found]

        return Source(figures.OURS, start)

    def bare(self, precision: str, loop: str) -> Source:
        """The engine's loop or the graph's in a process of its own."""
        name = figures.ENGINE if loop == "engine" else figures.RUNNER

        @asynccontextmanager
        async def start(workload: Workload) -> AsyncIterator[list[Worker]]:
            entry = self._repository / self._entries[precision, workload.max_len]
            setting = {"entry": str(entry), "threads": THREADS, "loop": loop}
            spec = WorkerSpec(
                name, precision, contenders.own_python(), "bare_worker", setting, together=loop == "runner"
            )
            async with contenders.worker(spec, self._logs) as worker:
                yield [worker]

        return Source(f"{name} {precision}", start)

    def sources(self, *, gateway: bool, loops: Sequence[str]) -> list[Source]:
        return [
            self.served(gateway=gateway), *(self.bare(p, loop) for loop in loops for p in self._precisions),
        ]  # fmt: skip


def transformers(source: Path, logs: Path) -> Source:
    """The reference, in fp32, in workloads that whole batches can run."""

    @asynccontextmanager
    async def start(workload: Workload) -> AsyncIterator[list[Worker]]:
        if not workload.together:
            yield []
            return
        setting = {"checkpoint": str(source), "threads": THREADS}
        spec = WorkerSpec(
            figures.REFERENCE, "fp32", contenders.own_python(), "transformers_worker", setting, together=True
        )
        async with contenders.worker(spec, logs) as worker:
            yield [worker]

    return Source(figures.REFERENCE, start)


def numbers(_: click.Context, __: click.Parameter, value: str) -> list[int]:
    """A list of numbers of clients."""
    try:
        found = [int(part) for part in value.split(",") if part]
    except ValueError:
        found = [0]
    if found and min(found) < 1:
        raise click.BadParameter(f"{value!r} is not a list of numbers from 1, such as 1,8,16")
    return found


def chosen(_: click.Context, __: click.Parameter, value: str) -> list[Workload]:
    """A list of workloads."""
    unknown = [name for name in value.split(",") if name not in WORKLOADS]
    if unknown:
        raise click.BadParameter(f"{unknown[0]!r} is none of {', '.join(WORKLOADS)}")
    return [WORKLOADS[name] for name in value.split(",")]


def pairs(_: click.Context, __: click.Parameter, values: Sequence[str]) -> dict[str, str]:
    """NAME=VALUE, several times, and what is not said otherwise."""
    if bad := [value for value in values if "=" not in value]:
        raise click.BadParameter(f"{bad[0]!r} is not NAME=VALUE")
    return PARAMETERS | dict(value.split("=", 1) for value in values)


def options(workloads: str) -> Callable[[Any], Any]:
    """What both contests are told; `workloads` are those of one by default."""

    def add(command: Any) -> Any:
        for option in _options(workloads):
            command = option(command)
        return command

    return add


def _options(workloads: str) -> tuple[Callable[[Any], Any], ...]:
    return (
        click.option("--workload", "workloads", default=workloads, show_default=True, callback=chosen,
                     help=f"A list of {', '.join(WORKLOADS)}."),
        click.option("--clients", default="", callback=numbers,
                     help="Requests at once, a list.  [default: each workload's own: W 1,8,16, chat 16, long 1,4]"),
        click.option("--rounds", default=5, show_default=True, type=click.IntRange(1, 100)),
        click.option("--precisions", default="fp32,int8,int8+kv8", show_default=True,
                     help="Of ours, as `export` has them; +kv8: with int8 slots."),
        click.option("--slots", default=16, show_default=True, type=click.IntRange(1, 1024), help="Of ours."),
        click.option("--parameter", "parameters", multiple=True, callback=pairs, metavar="NAME=VALUE",
                     help="Of our config.pbtxt; several times.  [default: speculation=off]"),
    )  # fmt: skip


@click.command(help=__doc__)
@options("W")
@click.option("--gateway/--no-gateway", default=True, help="Also through the gateway.")
@click.option("--shape", default="12,768,12", show_default=True, help="Layers, width, heads.")
@click.option("--output", default=RESULTS / "engine.json", type=click.Path(path_type=Path), show_default=False)
def main(
    workloads: list[Workload], clients: list[int], rounds: int, precisions: str, slots: int, parameters: dict[str, str],
    gateway: bool, shape: str, output: Path,
) -> None:  # fmt: skip
    layers, width, heads = (int(n) for n in shape.split(","))
    plan = Plan(workloads, rounds, clients)
    with tempfile.TemporaryDirectory(prefix="truthgpt-bench-") as name:
        folder = Path(name)
        with console.status("a random GPT-2"):
            checkpoint.write(folder / "checkpoint", layers, width, heads)
        ours = Ours(folder, folder / "checkpoint", precisions.split(","), max([slots, *clients]), parameters)
        ours.export(workloads)
        sources = ours.sources(gateway=gateway, loops=("engine", "runner"))
        sources.append(transformers(folder / "checkpoint", folder / "logs"))
        outcome = contest.run(plan, sources)
        found = engine_report.result(outcome, plan, ours.weights)
    engine_report.show(found, Console())
    engine_report.save(found, engine_report.markdown(found, "Our engine"), engine_report.plot, output)
    print(engine_report.line(found))


if __name__ == "__main__":
    main()
