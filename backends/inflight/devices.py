"""Where a graph runs: from what an entry asks for to ONNX Runtime's providers, and from its errors to ours.

`place` is the one place that knows providers and their options; the runners take what it says.
Source: https://onnxruntime.ai/docs/execution-providers/CUDA-ExecutionProvider.html
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnxruntime as ort

from .entry import EntryError
from .errors import DeviceLost, EngineError, OutOfMemory

CPU, CUDA = "cpu", "cuda"
CUDA_PROVIDER = "CUDAExecutionProvider"
HALF = ("float16", "bfloat16")
# As ONNX Runtime words them: its arenas, the CUDA runtime (error 2), cuBLAS and cuDNN, and C++'s own.
_OUT_OF_MEMORY = re.compile(
    r"failed to allocate memory|out of memory|is smaller than requested bytes|\bCUDA failure 2:|"
    r"_STATUS_ALLOC_FAILED|bad_alloc|bad allocation",
    re.IGNORECASE,
)
_DEVICE = re.compile(
    r"\b(CUDA|CUDNN|CUBLAS|CUBLASLT|CUFFT|CURAND|NVRTC) (failure|error)|\bcuda(?!ExecutionProvider)[A-Z]\w+|"
    r"CU(DNN|BLAS)_STATUS_\w+|illegal (memory access|address)|device-side assert|device (lost|unavailable)|"
    r"launch failure",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Placement:
    """Where a session runs. `device` is what the heartbeat says, `memory` where weights and slots are ("cpu" or
    "cuda", on the device with this id), `providers` what the session is made with, the first one being required.
    `note`: why it is not the better one.
    """

    device: str
    memory: str
    device_id: int
    providers: tuple[tuple[str, Mapping[str, str]], ...]
    note: str = ""


ON_CPU = Placement(CPU, CPU, 0, (("CPUExecutionProvider", {}),))


def place(
    device: str,
    kv_dtype: str,
    device_id: int = 0,
    memory_limit_mb: int = 0,
    fault: Callable[[int], str | None] | None = None,
) -> Placement:
    """Where an entry runs whose config.pbtxt says `device` (auto, cpu or cuda) and whose slots are of `kv_dtype`.

    auto is CUDA where the graph can use it and a device answers, else the CPU. `fault` tells why device `device_id`
    cannot be used, None when it can; by default it asks ONNX Runtime. Raises EntryError where cuda was asked for and
    cannot be had.
    """
    if device == CPU or (device == "auto" and kv_dtype not in HALF):
        return ON_CPU
    if kv_dtype not in HALF:
        # The operator has no kernel for it: the whole cache would go to the CPU and back in each step.
        raise EntryError(
            f"config.pbtxt: parameter device is cuda, but attention over {kv_dtype} slots has no CUDA kernel; export "
            "the model with --precision fp16, or set device to cpu"
        )
    return place_graph(device, device_id, memory_limit_mb, fault)


def place_graph(
    device: str, device_id: int = 0, memory_limit_mb: int = 0, fault: Callable[[int], str | None] | None = None
) -> Placement:
    """The same for a graph without slots, which runs on CUDA in any precision."""
    if device == CPU:
        return ON_CPU
    why = (fault or cuda_fault)(device_id)
    if why is None:
        cuda = (CUDA_PROVIDER, cuda_options(device_id, memory_limit_mb))
        return Placement(CUDA, CUDA, device_id, (cuda, *ON_CPU.providers))
    if device == "auto":
        return replace(ON_CPU, note=why)
    raise EntryError(f"config.pbtxt: parameter device is cuda, but {why}; or set device to auto or cpu")


def cuda_options(device_id: int, memory_limit_mb: int) -> dict[str, str]:
    """The CUDA provider's options; `memory_limit_mb` 0 sets no limit."""
    options = {
        "device_id": str(device_id),
        # Doubling, the default, would take memory that the slots of another model need.
        "arena_extend_strategy": "kSameAsRequested",
        "cudnn_conv_algo_search": "HEURISTIC",  # a trial of every algorithm would be paid by a first request
        "use_tf32": "0",  # 10 bits of mantissa in what an export keeps in fp32 on purpose
    }
    if memory_limit_mb:
        options["gpu_mem_limit"] = str(memory_limit_mb << 20)
    return options


def cuda_fault(device_id: int) -> str | None:
    """Why CUDA device `device_id` cannot be used here, with what to do about it; None when it answers."""
    if CUDA_PROVIDER not in ort.get_available_providers():
        return "this ONNX Runtime has no CUDA provider: install onnxruntime-gpu in place of onnxruntime"
    try:
        ort.preload_dlls()  # CUDA and cuDNN from their Python packages, where those are installed
        _allocate_no_more_than_asked()
        ort.OrtValue.ortvalue_from_shape_and_type([1], np.float32, CUDA, device_id)
    except Exception as error:
        return (
            f"CUDA device {device_id} does not answer: check the NVIDIA driver (nvidia-smi), and that CUDA and cuDNN "
            f"are installed in the versions that onnxruntime-gpu {ort.__version__} was built for ({first_line(error)})"
        )
    return None


def _allocate_no_more_than_asked() -> None:
    """For slots, which come from an arena that all sessions share: by default it doubles what it takes, and so might
    take twice what the slots need. It is set for all before anything is allocated.
    """
    state = ort.capi.onnxruntime_pybind11_state
    if hasattr(state, "set_arena_extend_strategy"):
        state.set_arena_extend_strategy(state.ArenaExtendStrategy.kSameAsRequested)


def open_session(
    model: Path, options: ort.SessionOptions, placement: Placement, disabled_optimizers: Sequence[str] = ()
) -> ort.InferenceSession:
    """A session that runs where `placement` says or not at all.

    Raises DeviceLost where the device cannot be started, EntryError for a graph that its provider cannot run.
    """
    providers = [(name, dict(given)) for name, given in placement.providers]
    more = {"disabled_optimizers": list(disabled_optimizers)} if disabled_optimizers else {}
    try:
        session = ort.InferenceSession(str(model), options, providers=providers, **more)
    except Exception as error:
        if translate(error, placement) is not None:
            raise
        raise EntryError(
            f"{model} cannot run on {placement.device}: {first_line(error)}; a bf16 export needs a CUDA device, "
            "fp32, fp16 and int8 exports run on any"
        ) from error
    session.disable_fallback()  # ONNX Runtime's own would run on the CPU in silence
    wanted = placement.providers[0][0]
    if wanted not in session.get_providers():  # its libraries were not found: the session was made without it
        raise DeviceLost(f"ONNX Runtime could not start {wanted}: are CUDA and cuDNN installed in its versions?")
    return session


@contextmanager
def translated(placement: Placement) -> Iterator[None]:
    """ONNX Runtime's errors become ours here, once."""
    try:
        yield
    except (EntryError, DeviceLost):
        raise
    except Exception as error:
        ours = translate(error, placement)
        if ours is None:
            raise
        raise ours from error


def translate(error: Exception, placement: Placement) -> EngineError | None:
    """Our error for what a session raised; None when it says nothing of memory or of the device."""
    text = str(error)
    if isinstance(error, MemoryError) or _OUT_OF_MEMORY.search(text):
        return OutOfMemory(f"the {placement.device} has not enough memory left: {first_line(error)}")
    if placement.memory != CPU and _DEVICE.search(text):
        return DeviceLost(f"the {placement.device} session failed: {first_line(error)}")
    return None


def first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__
