"""The rule by which a soak is judged, on series whose truth is known."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from .verdict import BLOCKS, Bound, blocks, judge, theil_sen

MIB = 1 << 20
BOUND = Bound(slope=MIB, rise=MIB / 4)
numbers = st.floats(-1e6, 1e6)


def series(count: int, each: int, value: float, grows: float, noise: float, seed: int) -> list[tuple[float, float]]:
    """Samples of a figure that grows by `grows` bytes a request, `each` requests apart, with noise on top."""
    draw = random.Random(seed)
    return [(n * each, value + grows * n * each + draw.gauss(0, noise)) for n in range(count)]


@given(slope=numbers, offset=numbers, count=st.integers(2, 40))
def test_a_line_has_its_own_slope(slope: float, offset: float, count: int) -> None:
    """Points on a line give the line's slope."""
    points = [(float(x), slope * x + offset) for x in range(count)]
    assert theil_sen(points) == pytest.approx(slope, rel=1e-6, abs=1e-6)


@given(st.lists(st.tuples(st.integers(0, 10**6), numbers), max_size=30), numbers, numbers)
def test_no_point_and_equal_points_are_flat(points: list[tuple[float, float]], x: float, y: float) -> None:
    """Without two points that differ in x there is no slope, and the order of points is of no matter."""
    assert theil_sen([]) == theil_sen([(x, y)]) == theil_sen([(x, y), (x, y + 1)]) == 0.0
    assert theil_sen(points) == pytest.approx(theil_sen(points[::-1]))


@given(st.integers(0, 2), st.floats(1e3, 1e12), st.integers(0, 11))
def test_a_few_wild_points_change_nothing(wild: int, size: float, begin: int) -> None:
    """Up to two of twelve points may be anything, and a flat series stays flat."""
    points = [(float(x), 5.0) for x in range(12)]
    for n in range(wild):
        points[(begin + n) % 12] = (points[(begin + n) % 12][0], size)
    assert theil_sen(points) == 0.0


@given(st.lists(st.tuples(numbers, numbers), max_size=200), st.integers(1, 20))
def test_blocks_keep_the_order_and_lose_no_point(points: list[tuple[float, float]], count: int) -> None:
    """At most `count` blocks, none empty, each within what its points are."""
    found = blocks(points, count)
    assert len(found) == min(count, len(points))
    ys = [y for _, y in points]
    assert all(min(ys) <= y <= max(ys) for _, y in found)


# With fewer samples the noise alone makes such a rise now and then: a block has two or three of them.
@given(st.integers(0, 1000), st.integers(200, 1200), st.integers(20, 200))
def test_noise_and_warming_up_are_no_leak(seed: int, count: int, each: int) -> None:
    """40 MiB with noise of 100 KiB that were half as much at the beginning of the run are flat, however long it is."""
    points = series(count, each, 40 * MIB, 0.0, 100 * 1024, seed)
    points = [(x, y * (0.5 + min(0.5, n / (0.8 * count)))) for n, (x, y) in enumerate(points)]
    assert judge(points, BOUND).flat


@given(st.integers(0, 1000), st.sampled_from([(60, 100), (1200, 150)]))
def test_a_leak_is_seen(seed: int, run: tuple[int, int]) -> None:
    """512 bytes a request, in the same noise, are found in a minute of a hundred requests a second, and the slope is
    right to a quarter; so are they in twenty minutes.
    """
    found = judge(series(*run, 40 * MIB, 512, 100 * 1024, seed), BOUND)
    assert not found.flat
    assert found.slope == pytest.approx(512 * 10_000, rel=0.25)


def test_what_falls_is_flat() -> None:
    """A figure that shrinks has not failed."""
    assert judge(series(60, 100, 40 * MIB, -512, 0, 1), BOUND).flat


def test_either_bound_alone_does_not_fail() -> None:
    """A steep slope over few requests, and a rise over many at a slope that is allowed, are both flat."""
    steep = judge(series(60, 2, 40 * MIB, 1024, 0, 1), BOUND)
    assert steep.slope > BOUND.slope and steep.rise <= BOUND.rise and steep.flat
    slow = judge(series(1200, 200, 40 * MIB, 50, 0, 1), BOUND)
    assert slow.slope <= BOUND.slope and slow.rise > BOUND.rise and slow.flat


def test_too_short_a_run_is_no_proof() -> None:
    """Fewer samples than a slope can be taken of are an error, not a pass."""
    with pytest.raises(ValueError, match="too few"):
        judge(series(BLOCKS // 2, 100, 1, 0, 0, 1), BOUND)
    with pytest.raises(ValueError, match="too few"):
        judge([], BOUND)
