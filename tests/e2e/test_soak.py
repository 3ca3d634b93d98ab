"""A minute of `make soak`, and the proof that it would find a leak."""

from __future__ import annotations

import pytest

from tests.soak import control, engine
from tests.soak.report import line


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_minute_of_everything_leaves_nothing_behind() -> None:
    """Every kind of request on two workers: each is answered as it should be, and no process holds more memory, files,
    threads or shared memory for it, nor does Redis.
    """
    report = engine.run(seconds=60, rate=100)
    print(line(report))  # for who wants to see how far from its bounds it stays
    assert report.problems == []


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_a_leak_is_found() -> None:
    """The same check fails for workers that keep 16 KiB of each request and a file of every 60th, some 5 in all of what
    is looked at, and for a stub that does the same with memory and shared memory; and it says that it is they.
    """
    report = control.leaking()
    growing = {figure for figure, found in report.findings.items() if not found.flat}
    # eight seconds prove of nothing else that it is flat
    assert growing >= control.LEAKS and len(growing) < len(control.LEAKS) + 4, report.problems
    assert control.unseen(report) == []
    assert sum("grows by" in problem for problem in report.problems) == len(growing)
