"""Memory of the NVIDIA GPUs, as their driver tells it (NVML)."""

from __future__ import annotations

import ctypes
import importlib
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

log = logging.getLogger(__name__)

AGAIN_S = 300.0  # until a driver that was not there is looked for again
LIBRARY = "libnvidia-ml.so.1"


@dataclass(frozen=True)
class Gpu:
    """By its number; bytes are None of one that does not answer any more."""

    gpu: str
    used_bytes: int | None
    total_bytes: int | None


def nvml() -> Any:
    """The initialised module pynvml. Raises OSError, ImportError or its NVMLError where there is no driver."""
    ctypes.CDLL(LIBRARY)  # most machines have none, and need not spend 4 MB on a module to find that out
    module = importlib.import_module("pynvml")
    module.nvmlInit()
    return module


class Gpus:
    """`load` returns the driver's interface. `read` is to be called from one thread, which it may block."""

    def __init__(self, load: Callable[[], Any] = nvml, clock: Callable[[], float] = time.monotonic) -> None:
        self._load, self._clock = load, clock
        self._nvml: Any = None
        self._asked: float | None = None
        self._count = 0  # how many there have been

    def read(self) -> tuple[Gpu, ...]:
        """Each GPU that there is or was since the start; none where there is no driver."""
        if self._nvml is None and (self._asked is None or self._clock() - self._asked >= AGAIN_S):
            self._asked = self._clock()
            try:
                self._nvml = self._load()
            except Exception as error:  # a missing library, a missing module, or the driver's own errors
                log.debug("no GPU can be read: %s", error)
        if self._nvml is not None:
            try:
                self._count = max(self._count, int(self._nvml.nvmlDeviceGetCount()))
            except self._nvml.NVMLError as error:
                log.warning("the GPUs' driver does not answer any more: %s", error)
                self._give_up()
        return tuple(self._gpu(number) for number in range(self._count))

    def _gpu(self, number: int) -> Gpu:
        if self._nvml is not None:
            try:
                memory = self._nvml.nvmlDeviceGetMemoryInfo(self._nvml.nvmlDeviceGetHandleByIndex(number))
                return Gpu(str(number), int(memory.used), int(memory.total))
            except self._nvml.NVMLError as error:  # fell off the bus, or may not be asked
                log.debug("GPU %d cannot be read: %s", number, error)
        return Gpu(str(number), None, None)

    def _give_up(self) -> None:
        """Begin anew with the driver, in a while: one that was reloaded does not know us any more."""
        module, self._nvml, self._asked = self._nvml, None, self._clock()
        try:
            module.nvmlShutdown()
        except module.NVMLError as error:
            log.debug("NVML cannot be left: %s", error)
