"""Waiting for the parts of a stack that starts: bounded, ended by a failure, and by whoever stops it meanwhile."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Any

import aiohttp

from orchestrator.local.preflight import StartError
from orchestrator.local.process import Child

POLL_S = 0.1


@dataclass(frozen=True)
class Patience:
    """`timeout_s` bounds each wait; `stopping` ends all of them."""

    timeout_s: float
    stopping: asyncio.Event

    async def until(
        self, check: Callable[[], Awaitable[bool]], child: Callable[[], Child], failure: str,
        refused: Callable[[], Awaitable[str | None]] | None = None,
    ) -> bool:  # fmt: skip
        """Poll an async check until it holds. False when stopping; raises StartError at the deadline, when the child
        ends, or when `refused` has a reason.
        """
        deadline = time.monotonic() + self.timeout_s
        while not await check():
            if self.stopping.is_set():
                return False
            process = child()
            reason = await refused() if refused is not None else None
            if process.returncode is not None or reason or time.monotonic() > deadline:
                why = reason or process.last_lines() or "it said nothing"
                raise StartError(
                    f"{failure}: {why}", f"the whole log is {process.log}; `truthgpt doctor` looks for common causes"
                )
            await asyncio.sleep(POLL_S)
        return True


async def together(*work: Coroutine[Any, Any, bool]) -> bool:
    """Whether all of it comes true. The first one that raises ends the others, and is raised."""
    tasks = [asyncio.create_task(one) for one in work]
    try:
        return all(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def status_of(url: str, timeout_s: float) -> int | None:
    """Status of a GET, or None when there was no answer in time."""
    try:
        async with (
            aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=timeout_s)) as session,
            session.get(url) as answer,
        ):
            return answer.status
    except (aiohttp.ClientError, TimeoutError, OSError):
        return None
