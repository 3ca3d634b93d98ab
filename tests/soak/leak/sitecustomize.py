"""Makes a stack leak, so that the soak can be seen to fail: Python runs it at start when its folder is on PYTHONPATH.

SOAK_LEAK_BYTES are kept of each request that ends in a gateway's worker, and of every SOAK_LEAK_FILE_EVERY a file is
left open. SOAK_LEAK_STUB_BYTES are kept of each request that Triton's stub reads, and of every SOAK_LEAK_REGION_EVERY a
region of shared memory is left behind.
"""

import importlib.abc
import importlib.util
import os
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

kept: list[object] = []


def _given(name: str) -> int:
    return int(os.environ.get(f"SOAK_LEAK_{name}", "0"))


def _keep(size: int) -> None:
    kept.append(bytearray(os.urandom(1) * size))  # written to, so that it takes memory at once


class After(importlib.abc.MetaPathFinder):
    """Changes a module once it has been imported."""

    def __init__(self, name: str, change: Callable[[Any], None]) -> None:
        self._name, self._change = name, change
        sys.meta_path.insert(0, self)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self._name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        assert spec is not None and spec.loader is not None
        run = spec.loader.exec_module

        def run_and_change(module: ModuleType) -> None:
            run(module)
            self._change(module)

        spec.loader.exec_module = run_and_change  # type: ignore[method-assign]
        return spec


def _worker(module: Any) -> None:
    size, every = _given("BYTES"), _given("FILE_EVERY")
    record = module.Passage.record

    def record_and_leak(self: Any) -> object:
        _keep(size)
        if every and len(kept) % every == 0:
            os.open(os.devnull, os.O_RDONLY)
        return record(self)

    module.Passage.record = record_and_leak


def _server(module: Any) -> None:
    """The backend that this Triton is given has leaking.py behind its own reading of requests."""
    prepare, prefix = module.prepare_backends, module.shm_prefix

    def prepare_and_leak(installation: Any, home: Path, *rest: Any) -> Path:
        folder: Path = prepare(installation, home, *rest)
        leak = Path(__file__).with_name("leaking.py").read_text()
        values = (_given("STUB_BYTES"), _given("REGION_EVERY"), f"/dev/shm/{prefix(home)}leak_")  # noqa: S108
        with (folder / "inflight" / "request.py").open("a") as file:
            file.write(f"\n\n{leak}\n\nparse = leaking(parse, *{values!r})\n")
        return folder

    module.prepare_backends = prepare_and_leak


if "orchestrator.worker" in sys.orig_argv:
    After("orchestrator.passage", _worker)
else:
    After("orchestrator.local.tritonserver", _server)
