"""Waiting for a stack's parts: it ends when they are ready, when one fails, when time is up and when it is stopped."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from orchestrator.local.preflight import StartError
from orchestrator.local.process import Child
from orchestrator.local.waiting import Patience, together


async def never() -> bool:
    return False


async def started(tmp_path: Path, script: str) -> Child:
    return await Child.start("child", ["/bin/sh", "-c", script], {"PATH": "/usr/bin:/bin"}, tmp_path / "log")


async def test_a_child_that_ends_is_told_with_what_it_said(tmp_path: Path) -> None:
    """The failure has the end of its log, the hint says where all of it is."""
    child = await started(tmp_path, "echo error: no such thing; exit 3")
    await child.wait()
    with pytest.raises(StartError, match="it did not start: error: no such thing") as caught:
        await Patience(60.0, asyncio.Event()).until(never, lambda: child, "it did not start")
    assert str(tmp_path / "log") in caught.value.hint


async def test_a_wait_has_an_end(tmp_path: Path) -> None:
    """By its time-out, by a reason not to wait, or by whoever stops the stack; the child of the moment is looked at."""
    child, stopping = await started(tmp_path, "exec sleep 60"), asyncio.Event()

    async def refused() -> str:
        return "the model is damaged"

    try:
        with pytest.raises(StartError, match="it said nothing"):
            await Patience(0.3, stopping).until(never, lambda: child, "late")
        with pytest.raises(StartError, match="bad: the model is damaged"):
            await Patience(60.0, stopping).until(never, lambda: child, "bad", refused)
        asyncio.get_running_loop().call_later(0.2, stopping.set)
        assert await Patience(60.0, stopping).until(never, lambda: child, "stopped") is False
    finally:
        await child.kill()


async def test_the_first_failure_ends_what_goes_on_beside_it() -> None:
    """It is raised at once; without one all have to come true."""
    ended = asyncio.Event()

    async def long() -> bool:
        try:
            await asyncio.sleep(60)
        finally:
            ended.set()
        return True

    async def fails() -> bool:
        await asyncio.sleep(0)
        raise StartError("no")

    async def holds(value: bool) -> bool:
        return value

    with pytest.raises(StartError, match="no"):
        await together(long(), fails())
    assert ended.is_set()
    assert await together(holds(True), holds(True)) and not await together(holds(True), holds(False))
