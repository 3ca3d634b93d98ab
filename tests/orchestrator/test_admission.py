"""The bound on requests in flight."""

from __future__ import annotations

import asyncio
from contextlib import ExitStack

import pytest

from orchestrator.admission import Admission
from orchestrator.errors import Draining, GatewayFull


def test_limit_is_exact_and_places_come_back() -> None:
    """The place after the last is refused, a freed one is given again, also after an error inside."""
    admission = Admission(2)
    with ExitStack() as held:
        held.enter_context(admission.permit())
        held.enter_context(admission.permit())
        with pytest.raises(GatewayFull), admission.permit():
            pass
        assert admission.in_flight == 2
    with pytest.raises(ZeroDivisionError), admission.permit():
        raise ZeroDivisionError
    assert admission.in_flight == 0


async def test_closing_refuses_and_idle_waits() -> None:
    """After close() nothing more enters, and idle() returns when the last one has left."""
    admission = Admission(2)
    with admission.permit():
        admission.close()
        with pytest.raises(Draining), admission.permit():
            pass
        waiter = asyncio.create_task(admission.idle())
        await asyncio.sleep(0)
        assert not waiter.done()
    await asyncio.wait_for(waiter, 1)
