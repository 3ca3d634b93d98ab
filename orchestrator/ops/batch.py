"""Running a batch: workers take the input's lines, ask them and journal what came, until all are done or it is stopped.

Every line of the input becomes exactly one line of the output, in the input's order:
    {"id", "custom_id", "response": {"status_code", "request_id", "body"}, "error": null}      any HTTP answer
    {"id", "custom_id", "response": null, "error": {"code", "message", "line"}}                no answer, or no request
as OpenAI's batch API writes them. `line` counts from 1; `custom_id` is null where the line has none, or has one that
an earlier line has already. Error codes: invalid_json, invalid_line, line_too_long, duplicate_custom_id,
stream_unsupported, connection_failed, timeout, invalid_answer.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from orchestrator.ops.batchfile import BadLine, Line, Source, failed
from orchestrator.ops.batchjournal import Journal

SYNC_S = 1.0
MAX_REASONS = 5

Row = dict[str, Any]


class Asks(Protocol):
    """What a batch needs of a client; batchclient.Asker is the real one."""

    concurrency: int

    async def ask(self, line: Line, id: str) -> Row: ...


@dataclass
class Tally:
    """Counts of output lines, those of earlier runs included: `skipped` of them were done before this run."""

    total: int
    succeeded: int = 0
    failed: int = 0
    skipped: int = 0
    output_tokens: int = 0
    reasons: dict[str, int] = field(default_factory=dict)  # the first few, with how often each came
    clock: Callable[[], float] = time.monotonic

    def __post_init__(self) -> None:
        self._began = self.clock()

    @property
    def done(self) -> int:
        return self.succeeded + self.failed

    @property
    def duration_s(self) -> float:
        return self.clock() - self._began

    @property
    def rate(self) -> float:
        """Lines a second in this run."""
        return (self.done - self.skipped) / max(self.duration_s, 1e-9)

    @property
    def left_s(self) -> float | None:
        """Seconds until the end at this rate, None while that cannot be told."""
        return (self.total - self.done) / self.rate if self.rate > 0 else None

    def add(self, row: Row) -> None:
        """Count one output line."""
        response = row.get("response")
        body = response.get("body") if isinstance(response, dict) else None
        if isinstance(response, dict) and 200 <= response["status_code"] < 300:
            self.succeeded += 1
            usage = body.get("usage") if isinstance(body, dict) else None
            tokens = usage.get("completion_tokens") if isinstance(usage, dict) else None
            self.output_tokens += tokens if isinstance(tokens, int) else 0
            return
        self.failed += 1
        reason = _reason(row)
        if reason in self.reasons or len(self.reasons) < MAX_REASONS:
            self.reasons[reason] = self.reasons.get(reason, 0) + 1

    def keep(self, row: Row) -> None:
        """Count a line that an earlier run wrote."""
        self.skipped += 1
        self.add(row)


async def run(source: Source, journal: Journal, tally: Tally, asker: Asks, stop: asyncio.Event) -> bool:
    """Do every line that the journal has not; False when `stop` ended it, with what runs then given up.

    The journal holds all that was answered, synced at least once a second. Raises BatchError when no line can go on.
    """
    lines = source.read()

    async def worker() -> None:
        for line in lines:  # one iterator for all: each line is taken once
            if not journal.done(line.number):
                await _do(line, journal, tally, asker)
            elif line.number % 1000 == 0:
                await asyncio.sleep(0)  # a long way to where it was left must not deafen the loop to signals

    workers = [asyncio.create_task(worker(), name=f"batch worker {n}") for n in range(asker.concurrency)]
    work = asyncio.gather(*workers)
    stopped = asyncio.create_task(stop.wait(), name="batch stop")
    syncing = asyncio.create_task(_sync(journal), name="batch sync")
    tasks: list[asyncio.Future[Any]] = [work, stopped, syncing]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if syncing.done():
            syncing.result()
        if not work.done():
            return False
        work.result()
        return True
    finally:
        for task in (*tasks, *workers):
            task.cancel()
        await asyncio.gather(*tasks, *workers, return_exceptions=True)
        journal.sync()


async def _do(line: Line | BadLine, journal: Journal, tally: Tally, asker: Asks) -> None:
    id = journal.id(line.number)
    if isinstance(line, BadLine):
        row = failed(id, line.custom_id, line.code, line.message, line.number)
        await asyncio.sleep(0)
    else:
        row = await asker.ask(line, id)
    journal.append(line.number, row)
    tally.add(row)


async def _sync(journal: Journal) -> None:
    while True:
        await asyncio.sleep(SYNC_S)
        await asyncio.to_thread(journal.sync)


def _reason(row: Row) -> str:
    """Why a line failed, in a few words."""
    if row["error"] is not None:
        return f"{row['error']['code']}: {row['error']['message']}"[:200]
    body = row["response"]["body"]
    error = body.get("error") if isinstance(body, dict) else body
    message = error.get("message") if isinstance(error, dict) else error
    return f"{row['response']['status_code']}: {message or 'no reason given'}"[:200]
