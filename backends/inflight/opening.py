"""Opens an entry's model where it is to run, and knows how to open it on the CPU when that fails."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass

from .devices import CPU, ON_CPU, Placement, place
from .entry import Entry, EntryError
from .errors import DeviceLost, OutOfMemory
from .runner import Runner
from .steps import Tuning
from .trt import TENSORRT, is_for_tensorrt, place_for_tensorrt, record_engine
from .warmup import BUDGET_S, warm


@dataclass(frozen=True)
class Opened:
    """A runner that has run once. `on_cpu` opens another one on the CPU, None where that would be nothing new;
    `fallback`: it is on the CPU because its device failed.
    """

    runner: Runner
    on_cpu: Callable[[], Runner] | None
    fallback: bool


def open_model(entry: Entry, device_id: int, placing: Callable[..., Placement] = place) -> Opened:
    """Open an entry on the device that it asks for; with `device` auto, on the CPU if that device fails at once.

    Raises EntryError where it cannot run.
    """
    name = entry.folder.parent.name
    if is_for_tensorrt(entry.folder):
        wanted = place_for_tensorrt(
            entry.folder, entry.device, entry.slots, entry.prefill_chunk, device_id, entry.gpu_memory_limit_mb
        )
    else:
        wanted = placing(entry.device, entry.graph.kv_dtype, device_id, entry.gpu_memory_limit_mb)
    if wanted.note:
        _tell(f"{name} runs on the {wanted.device}: {wanted.note}")

    def on_cpu() -> Runner:
        return _runner(entry, ON_CPU, 0.0)  # requests are waiting for it

    try:
        return Opened(_runner(entry, wanted), None if wanted.device == CPU else on_cpu, False)
    except OutOfMemory as error:
        raise EntryError(
            f"{name} does not fit: {error}; lower slots ({entry.slots}) in config.pbtxt, or export "
            "the model with a shorter --max-len"
        ) from error
    except DeviceLost as error:
        if entry.device != "auto":
            raise EntryError(f"{error}; or set device to auto or cpu in config.pbtxt") from error
        _tell(f"{error}; {name} is opened on the CPU")
        return Opened(_runner(entry, ON_CPU), None, True)


def tuning(entry: Entry, runner: Runner) -> Tuning:
    """How the engine saves time with this entry where it was opened: slots on a device cannot be copied out."""
    return Tuning(
        prefix_cache_bytes=entry.prefix_cache_bytes if runner.can_save else 0,
        token_target_s=entry.token_target_s,
        speculation=entry.speculation,
        exact=entry.precision == "fp32",
    )


def _tell(line: str) -> None:
    print(f"inflight: {line}", file=sys.stderr, flush=True)


def _runner(entry: Entry, placement: Placement, warm_s: float = BUDGET_S) -> Runner:
    runner = Runner(entry.folder / "model.onnx", entry.slots, entry.threads, placement)
    warm(runner, entry.slots, entry.prefill_chunk, entry.graph.max_len, warm_s)
    if placement.device == TENSORRT:
        record_engine(entry.folder, placement.device_id)
    return runner
