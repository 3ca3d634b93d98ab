"""`truthgpt tune`: find the batching settings of a model by measuring, and put them in place."""

from __future__ import annotations

import asyncio
import difflib
import math
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from orchestrator.cli import tuneshow
from orchestrator.cli.base import Command, audited, json_option, print_json, settings_options
from orchestrator.cli.keyflags import asks, confirmed
from orchestrator.cli.progress import Progress
from orchestrator.settings import Settings

if TYPE_CHECKING:
    from orchestrator.ops.tune.applying import Change
    from orchestrator.ops.tune.session import Task
    from orchestrator.ops.tune.tuning import Plan, Result



class _Number(click.FloatRange):
    """In the range, in which click takes what is not a number to be."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        found = float(super().convert(value, param, ctx))
        return self.fail(f"{value!r} is not a number.", param, ctx) if math.isnan(found) else found


TERMINATED = 143
_FILE = click.Path(path_type=Path, dir_okay=False)
_COUNT = click.IntRange(1, 100_000)

_EPILOG = """\b
Examples:
  truthgpt tune demo --dry-run
  truthgpt tune chat --bound ttft:0.5,itl:0.05 --concurrency 16 --prompt-tokens 512 --minutes 20
  truthgpt tune embedder --concurrency 32 --yes --html frontier.html
  truthgpt tune demo --history
  truthgpt tune demo --undo
"""


@click.command("tune", cls=Command, epilog=_EPILOG, short_help="Find the batching settings of a model by measuring.")
@click.argument("model")
@click.option("--version", "number", type=click.IntRange(min=1), metavar="N",
              help="A version.  [default: the served one, else the newest]")  # fmt: skip
@click.option("--bound", metavar="BOUNDS", help="What the 99th percentiles may be, in seconds, such as "
              "ttft:0.5,itl:0.05,latency:5.  [default: 1.1 times what they are now]")  # fmt: skip
@click.option("--concurrency", type=click.IntRange(1, 1024), default=8, show_default=True, help="Clients at a time.")
@click.option("--prompt-tokens", type=_COUNT, metavar="N", help="Of each prompt.  [default: 128, or what fits]")
@click.option("--output-tokens", type=_COUNT, metavar="N", help="Of each answer.  [default: 64, or what fits]")
@click.option("--trials", type=click.IntRange(1, 1000), default=24, show_default=True, help="Candidates to try.")
@click.option("--trial-s", type=_Number(0.1, 3600), default=8.0, show_default=True,
              help="Seconds of load on each.")  # fmt: skip
@click.option("--minutes", type=_Number(0.1, 10_080), default=10.0, show_default=True,
              help="Begin nothing after that, about.")  # fmt: skip
@click.option("--rounds", type=click.IntRange(1, 50), default=5, show_default=True,
              help="How often the best are measured again, in turns with what is set.")  # fmt: skip
@click.option("--margin", type=_Number(0, 1000), default=5.0, show_default=True,
              help="Per cent by which a winner has to be better.")  # fmt: skip
@click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True, help="Of the search.")
@click.option("--dry-run", is_flag=True, help="Measure, show what would be changed, and change nothing.")
@click.option("--yes", "-y", is_flag=True, help="Do not ask.  [default: ask where standard input is a terminal]")
@click.option("--undo", is_flag=True, help="Put back what config.pbtxt was before the last tuning.")
@click.option("--force", is_flag=True, help="With --undo: also if config.pbtxt was changed since.")
@click.option("--history", is_flag=True, help="Show what was measured before, by mean throughput.")
@click.option("--plot", type=_FILE, metavar="FILE", help="Draw the frontier as .png or .svg.")
@click.option("--html", type=_FILE, metavar="FILE", help="Write plot and table as a page.")
@json_option
@settings_options("model_repository", "home", "start_timeout_s")
def tune(
    settings: Settings, model: str, number: int | None, bound: str | None, concurrency: int,
    prompt_tokens: int | None, output_tokens: int | None, trials: int, trial_s: float, minutes: float, rounds: int,
    margin: float, seed: int, dry_run: bool, yes: bool, undo: bool, force: bool, history: bool, plot: Path | None,
    html: Path | None, as_json: bool,
) -> None:  # fmt: skip
    """Find the settings with which MODEL answers most under a bound on its latency, and put them in place.

    Candidates are measured on a server of their own, never on the one that serves: whatever happens meanwhile, what is
    served stays as it is. What is set now is measured first, and again in turns with the best; it is replaced only by
    what is better by the margin. Then config.pbtxt is rewritten and a running stack takes it up without a failed
    request; `--undo` puts the former one back. No stack has to run. docs/tuning.md explains what is tuned.
    """
    if sum((undo, history, dry_run)) > 1 or (force and not undo):
        raise click.UsageError("--undo, --history and --dry-run exclude each other, and --force goes with --undo")
    if undo:
        return _undo(settings, model, force, yes, as_json)
    import optuna as optuna  # told at once where it is missing, as matplotlib below

    if history:
        return _history(settings, model, as_json)
    from orchestrator.ops.tune import applying, scratch, session
    from orchestrator.ops.tune.figures import Bounds
    from orchestrator.ops.tune.tuning import Plan

    if plot is not None or html is not None:
        import matplotlib as matplotlib

        from orchestrator.ops.tune import picture

        picture.check(plot, html)
    bounds = None if bound is None else Bounds.parse(bound)
    with applying.held(settings.home):
        _recover(settings)
        scratch.clear_abandoned(settings.home)
        chosen = session.task(settings, model, number, concurrency, prompt_tokens, output_tokens)
        if not dry_run:
            applying.require_writable(chosen.entry.config_path)
        plan = Plan(chosen.workload, bounds, trials, minutes * 60, trial_s, rounds, margin / 100, seed)
        result = _measure(settings, chosen, plan)
        if plot is not None:
            picture.draw(plot, model, result)
        if html is not None:
            picture.page(html, model, *tuneshow.frontier(result), result)
        change = session.change_of(chosen, result)
        if not as_json:
            _show(result, change)
        elif asks(yes) and change is not None and not dry_run:
            click.echo(_diff(change), err=True, nl=False)
        reloaded = None
        if change is not None and not dry_run:
            confirmed(yes, f"Put this into {change.path}?")
            reloaded = _apply(settings, change, f"{model}: {_told(result)}")
    if as_json:
        done = {"model": model, "version": str(chosen.version.number), "applied": reloaded is not None,
                "reloaded": bool(reloaded), "diff": None if change is None else _diff(change)}  # fmt: skip
        print_json({**done, **result.to_json()})
    elif reloaded is not None:
        click.echo(f"{change.path if change else ''} is written; {_taken_up(reloaded)}")
        click.echo(f"`truthgpt tune {model} --undo` puts the former one back", err=True)


def _measure(settings: Settings, chosen: Task, plan: Plan) -> Result:
    from orchestrator.ops.tune import session

    async def main() -> Result:
        own = asyncio.current_task()
        if own is not None:  # the server is ended in order, as after Ctrl-C
            asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, own.cancel)
        return await session.run(settings, chosen, plan, display.measured, display.say)

    with tuneshow.Display() as display:
        try:
            return asyncio.run(main())
        except asyncio.CancelledError:
            click.echo("error: terminated", err=True)
            raise click.exceptions.Exit(TERMINATED) from None


def _show(result: Result, change: Change | None) -> None:
    tuneshow.show_frontier(result)
    if change is None:
        least = f"{100 * result.plan.margin:g} %"
        click.echo(f"nothing is better than what is set by {least}: config.pbtxt stays as it is")
    else:
        click.echo(_told(result))
        click.echo(_diff(change), nl=False)


def _told(result: Result) -> str:
    if result.winner is None:
        return ""
    changed = [
        f"{knob.name} {knob.current} -> {result.winner.point[knob.name]}"
        for knob in result.knobs if result.winner.point[knob.name] != knob.current
    ]  # fmt: skip
    return f"{', '.join(changed)}: {result.winner.ratio:.2f} times the throughput (median of {result.rounds} rounds)"


def _diff(change: Change) -> str:
    lines = difflib.unified_diff(
        change.before.splitlines(), change.after.splitlines(), str(change.path), str(change.path), n=1, lineterm=""
    )
    return "".join(f"{line}\n" for line in lines)


def _apply(settings: Settings, change: Change, detail: str) -> bool:
    """Whether a running stack has taken it up."""
    from orchestrator.ops.tune import applying

    with Progress() as progress:
        reloaded = applying.apply(settings, change, progress.step)
    audited(settings, "tune", detail=detail)
    return reloaded


def _taken_up(reloaded: bool) -> str:
    return "the running stack serves it" if reloaded else "it is taken up when the model is loaded next"


def _recover(settings: Settings) -> None:
    from orchestrator.ops.tune import applying

    with Progress() as progress:
        told = applying.recover_held(settings, progress.step)
    if told is not None:
        click.echo(told, err=True)


def _undo(settings: Settings, model: str, force: bool, yes: bool, as_json: bool) -> None:
    from orchestrator import models
    from orchestrator.ops.tune import applying

    with applying.held(settings.home):
        _recover(settings)
        entry = models.get(settings.model_repository, model)
        change = applying.undoing_of(settings, model, entry.config_path, force)
        if not as_json or asks(yes):
            click.echo(_diff(change), err=as_json, nl=False)
        confirmed(yes, f"Put this back into {change.path}?")
        reloaded = _apply(settings, change, f"{model}: undone")
    if as_json:
        print_json({"model": model, "undone": True, "reloaded": reloaded, "diff": _diff(change)})
    else:
        click.echo(f"{change.path} is as it was before; {_taken_up(reloaded)}")


def _history(settings: Settings, model: str, as_json: bool) -> None:
    from orchestrator.ops.tune.history import histories

    found: list[dict[str, Any]] = [tuneshow.known(*one) for one in histories(settings.home, model)]
    if as_json:
        return print_json(found)
    if not found:
        click.echo(f"nothing was measured of {model} from {settings.home}", err=True)
    for document in found:
        tuneshow.show_known(document)
