"""Our engine through Triton beside OpenVINO GenAI, llama.cpp and CTranslate2, each at its best, in one run.

    python -m benchmarks.peers --install              # once: some 3 GB under benchmarks/.peers, llama.cpp is compiled
    python -m benchmarks.peers [--workload W,chat,long,mixed] [--rounds 5] [--only openvino,llamacpp]

Every engine has the same random GPT-2-small, converted for it. They take turns within a round, each in a process of its
own that is stopped while it is not its turn; figures are medians over rounds. An engine that is not installed or fails
is left out, and the result says so. Writes benchmarks/results/peers.json, .md and .png; the last line printed is JSON.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import click
from rich.console import Console

from benchmarks import checkpoint, contest, engine_report
from benchmarks.contest import Plan, console
from benchmarks.engine import RESULTS, Ours, options, transformers
from benchmarks.peers.environments import FOLDER, PEERS, conversions
from benchmarks.workloads import WORKLOADS, Workload


def names(_: click.Context, __: click.Parameter, value: str) -> list[str]:
    """A list of peers."""
    found = [name for name in value.split(",") if name]
    if unknown := [name for name in found if name not in PEERS]:
        raise click.BadParameter(f"{unknown[0]!r} is none of {', '.join(PEERS)}")
    return found


@click.command(help=__doc__)
@options(",".join(WORKLOADS))
@click.option("--install", is_flag=True, help="Build the environments that are missing, and end.")
@click.option("--only", default=",".join(PEERS), show_default=True, callback=names, help="Peers, a list.")
@click.option("--rates", default="", help="Of mixed: requests a second, a list.  [default: 2,4,6]")
@click.option("--output", default=RESULTS / "peers.json", type=click.Path(path_type=Path), show_default=False)
def main(
    workloads: list[Workload], clients: list[int], rounds: int, precisions: str, slots: int, parameters: dict[str, str],
    install: bool, only: list[str], rates: str, output: Path,
) -> None:  # fmt: skip
    if install:
        for name in only:
            _install(name)
        return
    ready = _ready(only)
    plan = Plan(workloads, rounds, clients, [float(rate) for rate in rates.split(",") if rate])
    with tempfile.TemporaryDirectory(prefix="truthgpt-bench-") as name:
        folder = Path(name)
        source = folder / "checkpoint"
        with console.status("a random GPT-2"):
            checkpoint.write(source)
            converted = conversions(source)
        ours = Ours(folder, source, precisions.split(","), max([slots, *clients]), parameters)
        ours.export(workloads)
        logs = folder / "logs"
        sources = [*ours.sources(gateway=False, loops=())]
        sources += [found for name in ready for found in PEERS[name].sources(source, converted, logs)]
        sources.append(transformers(source, logs))
        outcome = contest.run(plan, sources)
        missing = [name for name in only if name not in ready]
        found = engine_report.result(outcome, plan, ours.weights, not_installed=missing)
    engine_report.show(found, Console())
    engine_report.save(found, engine_report.markdown(found, "Our engine beside others"), engine_report.plot, output)
    print(engine_report.line(found))


def _install(name: str) -> None:
    peer = PEERS[name]
    if peer.ready:
        console.print(f"{name} is installed")
        return
    with console.status(f"installing {name} into {peer.folder} (what pip says: {peer.folder / 'install.log'})"):
        peer.install()
    console.print(f"{name} is installed in {peer.folder}")


def _ready(wanted: Sequence[str]) -> list[str]:
    """Those that are installed; says which are not."""
    ready = [name for name in wanted if PEERS[name].ready]
    for name in wanted:
        if name not in ready:
            console.print(
                f"{name} is not installed in {FOLDER} and left out: python -m benchmarks.peers --install",
                style="yellow",
            )
    return ready


if __name__ == "__main__":
    main()
