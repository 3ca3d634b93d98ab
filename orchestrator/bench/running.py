"""One measurement from its first question to its figures."""

from __future__ import annotations

import asyncio

from orchestrator.bench.figures import Run
from orchestrator.bench.plan import Load, Progress, Target
from orchestrator.bench.prompts import Sizing


async def measure(
    target: Target, load: Load, progress: Progress | None = None, *, stop: asyncio.Event | None = None,
    sizing: Sizing | None = None,
) -> Run:  # fmt: skip
    """Put the load on the target and tell what came of it.

    First a few requests are made that are not counted: they show that the endpoint answers, and how long a prompt has
    to be; a `Run` knows what they found, and its `sizing` spares the next one the questions. When `stop` is set, what
    is under way is cancelled and the figures so far are returned, `interrupted`. Failed requests are counted in
    `Run.errors`; raises BenchError when already the first question is not answered well.
    """
    raise NotImplementedError
