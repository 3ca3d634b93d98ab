"""One candidate on the scratch server: served with its values, put under load, its figures."""

from __future__ import annotations

import asyncio

from orchestrator import models, pbtxt
from orchestrator.bench.plan import Load, Target
from orchestrator.bench.prompts import Sizing
from orchestrator.bench.running import BenchError, measure
from orchestrator.models import Entry, Version
from orchestrator.ops.tune import editing, knobs
from orchestrator.ops.tune.errors import CandidateError
from orchestrator.ops.tune.figures import Figures, Workload
from orchestrator.ops.tune.knobs import Knob, Point
from orchestrator.ops.tune.scratch import Scratch

REQUEST_S = 300.0  # what a single request may take


class Rig:
    """Measures points of some knobs of an entry whose config.pbtxt is `source`."""

    def __init__(
        self, scratch: Scratch, entry: Entry, version: Version, source: str, given: tuple[Knob, ...], workload: Workload
    ) -> None:
        self._scratch, self._entry, self._version, self._source = scratch, entry, version, source
        self._knobs, self._workload = given, workload
        self._sizing: Sizing | None = None

    async def prepare(self) -> None:
        """Load the graph that the model needs, where that is another entry's. Raises ModelsError, CandidateError."""
        engine = models.engine_of(self._entry.folder.parent, self._version)
        if engine is not None:
            await self._scratch.load_first(engine[0].name, engine[0].pinned(engine[1].number))

    async def figures(self, point: Point, requests: int, limit_s: float) -> Figures:
        """Of so many requests at one point, after as many as there are clients that are not counted.

        Raises CandidateError for a candidate that does not load, fails requests, or takes longer than `limit_s`, and
        TuneError when there is no server any more.
        """
        text = editing.edited(self._source, knobs.changes(self._knobs, point))
        await self._scratch.serve(self._entry.name, models.pin(pbtxt.parse(text), self._version.number))
        workload = self._workload
        encodes = not workload.output_tokens
        target = Target(
            self._scratch.url, "kserve-http", self._entry.name, task="encode" if encodes else "generate"
        )
        load = Load(
            concurrency=workload.concurrency, requests=requests, warmup=workload.concurrency,
            prompt_tokens=workload.prompt_tokens, output_tokens=workload.output_tokens or 1, ignore_eos=True,
            timeout_s=REQUEST_S,
        )  # fmt: skip
        try:
            async with asyncio.timeout(limit_s):
                run = await measure(target, load, sizing=self._sizing)
        except TimeoutError as error:
            raise CandidateError(f"it was not measured within {limit_s:.0f} s") from error
        except BenchError as error:
            raise CandidateError(str(error)) from error
        self._sizing = run.sizing
        return Figures.of(run.to_json(), encodes)
