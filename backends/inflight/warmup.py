"""Runs the shapes that requests bring before Triton says that the model is ready.

The first run of a shape is slower than those after it: ONNX Runtime plans its memory, a device chooses its kernels,
bindings are made and pages are touched. All that is paid while the model is loaded, in place of by its first clients.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Ids
from functools import partial
from typing import Any, Protocol

from .errors import OutOfMemory

BUDGET_S = 5.0  # what a large model on a slow machine may take for shapes that are not the most frequent ones


class Warmable(Protocol):
    """What is run; see runner.Runner."""

    can_verify: bool

    def decode(self, tokens: Ids[int], positions: Ids[int]) -> Any: ...

    def prefill(self, slot: int, tokens: Ids[int], start: int) -> Any: ...

    def prefill_fresh(self, first: int, prompts: Ids[Ids[int]]) -> Any: ...

    def verify(self, slot: int, tokens: Ids[int], start: int) -> Any: ...


def warm(
    runner: Warmable,
    slots: int,
    prefill_chunk: int,
    max_len: int,
    budget_s: float = BUDGET_S,
    clock: Callable[[], float] = time.monotonic,
) -> int:
    """Run decode steps and chunks of prefill on empty slots, the most frequent shapes first; how many were run.

    The first prefill raises whatever is wrong with the model: OutOfMemory, DeviceLost or what ONNX Runtime raises.
    Behind it, less memory than every slot together needs is no failure: the engine sheds what does not fit. No new
    shape is begun after `budget_s` seconds. What is left in the slots is overwritten by the prompts that get them.
    """
    began = clock()
    runner.prefill(0, [0], 0)
    count = 1
    for run in _shapes(runner, slots, prefill_chunk, max_len):
        if clock() - began > budget_s:
            break
        try:
            run()
        except OutOfMemory:
            break
        count += 1
    return count


def _shapes(runner: Warmable, slots: int, prefill_chunk: int, max_len: int) -> Iterator[Callable[[], object]]:
    chunk = [0] * min(prefill_chunk, max_len)
    yield partial(runner.prefill, 0, chunk, 0)
    if 2 * len(chunk) <= max_len:
        yield partial(runner.prefill, 0, chunk, len(chunk))  # one behind another, whose past is not empty
    between = [1 << power for power in range(1, slots.bit_length()) if 1 << power < slots]
    for rows in dict.fromkeys((1, slots, *between)):  # kernels are chosen by powers of two at the finest
        yield partial(runner.decode, [0] * rows, [0] * rows)
    if slots > 1:
        yield partial(runner.prefill_fresh, 0, [chunk[: len(chunk) // 2 or 1]] * 2)
    if runner.can_verify:
        yield partial(runner.verify, 0, [0] * min(4, max_len), 0)
