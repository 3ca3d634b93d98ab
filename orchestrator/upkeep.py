"""What keeps a deployment well, assembled: figures, readings of the machine, history, alerts and the jobs' loop.

It runs in the gateway's first process. Nothing in it may hold that process up or end it: what may take long is in
threads and in processes of its own, and a part that fails is told of and begun again.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from orchestrator.jobs.keeper import END_S as KEEPER_END_S
from orchestrator.jobs.keeper import Keeper
from orchestrator.metrics import Labels, Metrics, Reading
from orchestrator.monitor.history import History
from orchestrator.monitor.machine import Machine
from orchestrator.monitor.notifier import Notifier
from orchestrator.monitor.shared import Shared
from orchestrator.monitor.summary import Summary
from orchestrator.monitor.watcher import Watcher
from orchestrator.scrape import Scrape
from orchestrator.settings import Settings
from orchestrator.store import Store

log = logging.getLogger(__name__)

AGAIN_S = 5.0
END_S = KEEPER_END_S + 2.0  # for all parts to end once they are cancelled; what has not by then is left behind
HISTORY_S = 60.0  # a line of the history is of its minute


class Upkeep:
    """`metrics` get the series of all parts. `run` runs them until cancelled.

    Raises ScheduleError where the settings' schedules are wrong.
    """

    def __init__(self, settings: Settings, scrape: Scrape, metrics: Metrics) -> None:
        self._store = Store(settings.redis_url, settings.redis_timeout_s) if settings.redis_url else None
        self._parts: dict[str, Callable[[], Awaitable[None]]] = {}
        self._machine = Machine(settings)
        metrics.readings |= self._machine.readings()
        summary = self._summary = Summary(scrape.totals)
        summary.add(self._machine.figures)
        self._parts["summary"] = summary.run
        if settings.monitoring:
            history = History(settings.home)
            self._parts["history"] = lambda: history.run(lambda: summary.figures(HISTORY_S))
            watcher = Watcher(settings, summary.figures, Notifier(settings), self._store)
            summary.add(lambda: {"alerts": watcher.figures()})
            metrics.readings |= watcher.readings()
            self._parts["alerts"] = watcher.run
        if self._store:
            self._with_redis(settings, self._store, metrics)

    def _with_redis(self, settings: Settings, store: Store, metrics: Metrics) -> None:
        shared = Shared(store)
        self._summary.add(shared.figures)
        metrics.readings |= shared.readings()
        self._parts |= {"store": store.run, "shared": shared.run}
        keeper = Keeper(settings, store)  # without maintenance it only tells what is served here
        self._parts["jobs"] = keeper.run
        if settings.maintenance:
            # what was known before Redis went is old news: unknown. The series stay, so that Prometheus's alert does
            self._summary.add(lambda: {"jobs": keeper.rows if store.up else None})
            metrics.readings |= job_readings(lambda: keeper.rows)

    def figures(self) -> Mapping[str, Any]:
        """The summary of now, and under `minute` the rates of the last minute alone."""
        return self._summary.figures() | {"minute": self._summary.minute()}

    async def run(self) -> None:
        """Until cancelled; then it ends in END_S at most. A second cancellation leaves behind what has not ended."""
        self._machine.start()
        tasks = [asyncio.create_task(_kept(name, part), name=name) for name, part in self._parts.items()]
        try:
            await asyncio.wait(tasks)  # cancelled, it cancels none of them: each is cancelled once, below
        finally:
            self._machine.stop()
            for task in tasks:
                task.cancel()
            _, late = await asyncio.wait(tasks, timeout=END_S)
            for task in late:
                log.error("%s does not end and is left behind", task.get_name())


async def _kept(name: str, part: Callable[[], Awaitable[None]]) -> None:
    """Run a part for ever, whatever becomes of it."""
    while True:
        try:
            return await part()
        except Exception:
            log.exception("%s failed and begins again", name)
        await asyncio.sleep(AGAIN_S)


def job_readings(rows: Callable[[], Sequence[Mapping[str, Any]]]) -> dict[str, Reading]:
    """The series of the jobs; one that never ran has only that it does not fail."""

    def of(value: Callable[[Mapping[str, Any]], float | None]) -> Reading:
        def read() -> Mapping[Labels, float]:
            values = {(str(row["name"]),): value(row) for row in rows()}
            return {labels: found for labels, found in values.items() if found is not None}

        return read

    return {
        "truthgpt_job_last_run_timestamp_seconds": of(lambda row: row["last_run"]),
        "truthgpt_job_last_success_timestamp_seconds": of(lambda row: row["last_success"]),
        "truthgpt_job_failing": of(lambda row: float(row["failing"])),
    }
