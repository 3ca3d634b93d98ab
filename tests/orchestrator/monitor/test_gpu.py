"""GPU memory: through NVIDIA's own binding on a library of ours, and with drivers that fail in every way."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pynvml
import pytest

from orchestrator.monitor.gpu import AGAIN_S, LIBRARY, Gpu, Gpus


class Driver:
    """As pynvml: two GPUs; what is in `lost` does not answer, -1 is the driver itself."""

    NVMLError = pynvml.NVMLError

    def __init__(self) -> None:
        self.lost: set[int] = set()
        self.left = 0

    def nvmlDeviceGetCount(self) -> int:
        self._ask(-1)
        return 2

    def nvmlDeviceGetHandleByIndex(self, number: int) -> int:
        self._ask(number)
        return number

    def nvmlDeviceGetMemoryInfo(self, number: int) -> Any:
        return SimpleNamespace(total=80 << 30, free=0, used=(number + 1) << 30)

    def nvmlShutdown(self) -> None:
        self.left += 1
        self._ask(-1)

    def _ask(self, number: int) -> None:
        if number in self.lost:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST)


GOOD = (Gpu("0", 1 << 30, 80 << 30), Gpu("1", 2 << 30, 80 << 30))
NOTHING = (Gpu("0", None, None), Gpu("1", None, None))


def test_a_gpu_that_is_lost_is_unknown_and_the_other_is_not() -> None:
    """One that fell off the bus keeps its place without numbers, and has them again when it answers."""
    driver = Driver()
    gpus = Gpus(lambda: driver)
    assert gpus.read() == GOOD
    driver.lost = {1}
    assert gpus.read() == (GOOD[0], NOTHING[1])
    driver.lost = set()
    assert gpus.read() == GOOD


def test_a_driver_that_fails_is_begun_anew(caplog: pytest.LogCaptureFixture) -> None:
    """While it does not answer the GPUs are unknown, it is not asked all the time, and the log says so once."""
    driver, loads, now = Driver(), [], [0.0]

    def load() -> Driver:
        loads.append(now[0])
        return driver

    gpus = Gpus(load, lambda: now[0])
    assert gpus.read() == GOOD
    driver.lost = {-1}
    for now[0] in (10.0, 20.0, 30.0):
        assert gpus.read() == NOTHING
    assert loads == [0.0] and driver.left == 1
    driver.lost = set()
    now[0] = 10.0 + AGAIN_S
    assert gpus.read() == GOOD and loads == [0.0, now[0]]
    assert [record.levelname for record in caplog.records] == ["WARNING"]


@pytest.mark.parametrize("error", [OSError("no library"), ImportError("no module"), pynvml.NVMLError(9)])
def test_a_machine_without_a_driver(error: Exception, caplog: pytest.LogCaptureFixture) -> None:
    """It has no GPU, is asked again after some minutes only, and one line of level debug says why."""
    caplog.set_level(logging.DEBUG)
    asked, now = [], [0.0]

    def load() -> Any:
        asked.append(now[0])
        raise error

    gpus = Gpus(load, lambda: now[0])
    for now[0] in (0.0, 10.0, AGAIN_S - 1, AGAIN_S + 1):
        assert gpus.read() == ()
    assert asked == [0.0, AGAIN_S + 1]
    assert {record.levelname for record in caplog.records} == {"DEBUG"} and len(caplog.records) == 2


_READ = """
import json, os, sys
from dataclasses import astuple
from orchestrator.monitor.gpu import Gpus
gpus = Gpus()
print(json.dumps([astuple(gpu) for gpu in gpus.read()]))
open(os.environ["FAKE_NVML_LOST"], "w").close()
print(json.dumps([astuple(gpu) for gpu in gpus.read()]))
"""


def test_through_the_real_binding(tmp_path: Path) -> None:
    """pynvml's own functions and structures are used as they are meant: a library in its place is read."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    source = Path(__file__).with_name("nvml.c")
    subprocess.run([compiler, "-shared", "-fPIC", "-o", tmp_path / LIBRARY, source], check=True)
    environ = {**os.environ, "LD_LIBRARY_PATH": str(tmp_path), "FAKE_NVML_LOST": str(tmp_path / "lost")}
    done = subprocess.run([sys.executable, "-c", _READ], env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    before, after = map(json.loads, done.stdout.splitlines())
    assert before == [["0", 1 << 30, 80 << 30], ["1", 2 << 30, 80 << 30]]
    assert after == [["0", 1 << 30, 80 << 30], ["1", None, None]]


def test_here_it_says_what_there_is() -> None:
    """On this machine, with a GPU or without, nothing is raised and every GPU has what it has."""
    for gpu in Gpus().read():
        assert gpu.used_bytes is not None and gpu.total_bytes is not None and gpu.used_bytes <= gpu.total_bytes
