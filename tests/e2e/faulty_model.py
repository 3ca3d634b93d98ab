"""Stands in for the backend's model.py inside the real Triton: its runner says that it is on CUDA and fails when told.

test_device_faults.py puts it in front of the real one in a running stack's copy of the backend. Beside the copy a file
`fault` says what is wrong now: nothing (no file), `rows N` (a decode step has memory for N rows) or `lost` (the device
failed). The errors are ONNX Runtime's own words, where its session raises them.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
sys.path.insert(0, str(FOLDER.parent))
from inflight import opening, real_model  # noqa: E402  (the stack's copy of the backend, found by the line above)
from inflight.devices import CUDA, Placement, translate  # noqa: E402

ON_CUDA = Placement(CUDA, CUDA, 0, ())
REOPEN_S = 1.0  # as a real model takes its time: the streams have to be written to meanwhile
SHORT = "BFCArena::AllocateRawInternal Failed to allocate memory for requested buffer of size 939524096"
LOST = "CUDA failure 700: an illegal memory access was encountered ; GPU=0 ; expr=cudaStreamSynchronize(stream_);"


class Faulty:
    """A runner on a device that exists only by name."""

    device = CUDA

    def __init__(self, runner: Any) -> None:
        self._runner = runner
        self.can_verify, self.can_save = runner.can_verify, runner.can_save

    def decode(self, tokens: Sequence[int], positions: Sequence[int]) -> Any:
        self._check(len(tokens))
        return self._runner.decode(tokens, positions)

    def prefill(self, slot: int, tokens: Sequence[int], start: int) -> Any:
        self._check(0)
        return self._runner.prefill(slot, tokens, start)

    def prefill_fresh(self, first_slot: int, prompts: Sequence[Sequence[int]]) -> Any:
        self._check(0)
        return self._runner.prefill_fresh(first_slot, prompts)

    def verify(self, slot: int, tokens: Sequence[int], start: int) -> Any:
        self._check(0)
        return self._runner.verify(slot, tokens, start)

    def save(self, slot: int, start: int, stop: int) -> Any:
        self._check(0)
        return self._runner.save(slot, start, stop)

    def load(self, slot: int, start: int, block: Any) -> None:
        self._check(0)
        self._runner.load(slot, start, block)

    def move(self, source: int, target: int, length: int) -> None:
        self._check(0)
        self._runner.move(source, target, length)

    def _check(self, rows: int) -> None:
        path = FOLDER / "fault"
        fault = path.read_text() if path.exists() else ""
        if fault == "lost" or (fault.startswith("rows") and rows > int(fault.split()[1])):
            error = translate(RuntimeError(LOST if fault == "lost" else SHORT), ON_CUDA)
            assert error is not None
            raise error


def _open(entry: Any, device_id: int) -> Any:
    opened = opening.open_model(entry, device_id)

    def on_cpu() -> Any:
        time.sleep(REOPEN_S)
        return opening.open_model(entry, device_id).runner

    return opening.Opened(Faulty(opened.runner), on_cpu, False)


real_model.open_model = _open
TritonPythonModel = real_model.TritonPythonModel
