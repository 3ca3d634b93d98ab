"""A tuning of one model put together: its entry, the scratch server, the rig, the history."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from orchestrator import models
from orchestrator.models import Entry, Version
from orchestrator.ops import verification
from orchestrator.ops.tune import applying, editing, knobs, served, subject
from orchestrator.ops.tune.applying import Change
from orchestrator.ops.tune.errors import CandidateError, TuneError
from orchestrator.ops.tune.figures import Workload
from orchestrator.ops.tune.history import History
from orchestrator.ops.tune.knobs import Knob
from orchestrator.ops.tune.rig import Rig
from orchestrator.ops.tune.scratch import Scratch
from orchestrator.ops.tune.tuning import Plan, Result, Trial, Tuning
from orchestrator.settings import Settings

PROMPT_TOKENS, OUTPUT_TOKENS = 128, 64  # where nothing is said, or as many as fit


@dataclass(frozen=True)
class Task:
    """What is tuned: this version of an entry whose config.pbtxt is `source`."""

    entry: Entry
    version: Version
    source: str
    knobs: tuple[Knob, ...]
    workload: Workload


def task(
    settings: Settings, model: str, number: int | None, concurrency: int, prompt: int | None, output: int | None
) -> Task:
    """Choose the version (the served one unless it is named, else the newest) and the workload, and verify the files.

    Raises ModelsError and TuneError.
    """
    entry = models.get(settings.model_repository, model)
    if number is None:
        now = served.served(settings, model)
        number = now.version if now is not None else entry.newest.number
    version = entry.version(number)
    source = applying.read(entry.config_path)
    workload = _workload(version, knobs.encodes(entry), concurrency, prompt, output)
    given = knobs.knobs_of(entry, version, source, workload, subject.room())
    engine = models.engine_of(settings.model_repository, version)
    for one in [(entry, version), *([engine] if engine is not None else [])]:
        refused = verification.refusal(*one)
        if refused is not None:
            raise TuneError(*refused)
    return Task(entry, version, source, given, workload)


async def run(
    settings: Settings, chosen: Task, plan: Plan, measured: Callable[[Trial, int, int], None],
    say: Callable[[str], None],
) -> Result:  # fmt: skip
    """Search on a server of its own. Raises TuneError, ModelsError, and what its start raises."""
    about = subject.subject_of(chosen.entry, chosen.version, chosen.source, chosen.knobs, chosen.workload)
    history = History(settings.home, about, say)
    say("starting a server to measure on")
    async with Scratch(settings, settings.start_timeout_s) as scratch:
        rig = Rig(scratch, chosen.entry, chosen.version, chosen.source, chosen.knobs, chosen.workload)
        try:
            await rig.prepare()
        except CandidateError as error:
            raise TuneError(f"the graph of {chosen.entry.name} cannot be loaded: {error}", "see that it is whole: "
                            f"`truthgpt models verify {chosen.entry.name}`") from error  # fmt: skip
        say("measuring what is set now")
        return await Tuning(rig, chosen.knobs, plan, history, measured, lambda: served.in_flight(settings)).run()


def change_of(chosen: Task, result: Result) -> Change | None:
    """What is to be written; None where nothing is better than what is set."""
    if result.winner is None:
        return None
    text = editing.edited(chosen.source, knobs.changes(chosen.knobs, result.winner.point))
    return Change(chosen.entry.name, chosen.entry.config_path.resolve(), chosen.source, text)


def _workload(version: Version, encodes: bool, concurrency: int, prompt: int | None, output: int | None) -> Workload:
    length = knobs.max_len(version) or PROMPT_TOKENS + OUTPUT_TOKENS
    if encodes:
        return Workload(concurrency, prompt or min(PROMPT_TOKENS, length), output or 0)
    answer = output or min(OUTPUT_TOKENS, max(1, length // 3))
    return Workload(concurrency, prompt or max(1, min(PROMPT_TOKENS, length - answer)), answer)
