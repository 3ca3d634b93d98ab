"""The number formats that an entry can have: which device runs each, and how far its logits may drift.

    fp32   CPU            the reference
    fp16   CPU and CUDA   half the size; ONNX Runtime's CPU computes most of it in fp32, so it is no faster there
    bf16   CUDA           needs compute capability 8.0; ONNX Runtime's CPU has no bf16 operators
    int8   CPU            dynamic activations; ONNX Runtime's CUDA has no such product
    int4   CPU            blocks of weights; states its drift

ONNX Runtime's attention over slots has no CUDA kernel for float32, so what keeps float32 slots is served on the CPU.
Encoders keep none: in fp32 they run on both.

What the device can run is asked of ONNX Runtime, on the machine that exports: an entry is never published unverified.
"""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

import onnxruntime

from export.errors import ExportError

CUDA = "CUDAExecutionProvider"
BF16_CAPABILITY = (8, 0)
# Above this share of the logits' spread an int4 entry is published only when it is asked for by --allow-drift.
INT4_DRIFT = 0.10


class DeviceError(ExportError):
    """The device cannot run the precision."""


@dataclass(frozen=True)
class Precision:
    """A number format. ``max_drift`` bounds rms(Δlogit)/std(logit); None: int4, whose bound the caller may raise."""

    name: str
    kv_dtype: str
    weight_bytes: float
    max_drift: float | None


TABLE = {
    format.name: format
    for format in (
        Precision("fp32", "float32", 4, 1e-3),
        Precision("fp16", "float16", 2, 0.02),
        Precision("bf16", "bfloat16", 2, 0.02),
        Precision("int8", "float32", 1, 0.06),
        # Half a byte and a float32 scale for each block of 32.
        Precision("int4", "float32", 0.625, None),
    )
}
PRECISIONS = tuple(TABLE)
HALVES = ("fp16", "bf16")


def runs_here(device: str, providers: Sequence[str] | None = None) -> str:
    """The device that verifies here what is meant for ``device``: ``cuda`` where ONNX Runtime has it, else ``cpu``."""
    available = onnxruntime.get_available_providers() if providers is None else providers
    return "cuda" if device != "cpu" and CUDA in available else "cpu"


def check_device(precision: str, device: str, providers: Sequence[str] | None = None, slots: bool = True) -> str:
    """The device to verify on (``cpu`` or ``cuda``), once it is sure that ``device`` runs ``precision``.

    An entry for CUDA may be made on a machine without a GPU as long as ONNX Runtime's CPU runs the same file.
    ``slots`` False: an encoder, which keeps none.

    Raises:
        DeviceError: the device cannot run the precision, or nothing here can verify it; the hint says what can.
    """
    here = runs_here(device, providers)
    if precision == "bf16":
        if here != "cuda":
            raise DeviceError(_BF16, "On this device take --precision fp32 or int8; fp16 for a GPU can be made here.")
        capability = compute_capability()
        if capability is not None and capability < BF16_CAPABILITY:
            version = ".".join(str(part) for part in capability)
            raise DeviceError(f"{_BF16} The GPU here has {version}.", "Take --precision fp16.")
    if serves_on(precision, "auto", slots) == "cpu":
        if device == "cuda":
            gpu = "fp16" if slots else "fp32"
            raise DeviceError(
                f"{precision} runs on a CPU: {_NO_PRODUCT if precision == 'int8' else _NO_KERNEL}",
                f"On an NVIDIA GPU take --precision {gpu}; for a CPU give --device cpu.",
            )
        return "cpu"
    return here


def serves_on(precision: str, device: str, slots: bool = True) -> str:
    """The ``device`` that the entry's configuration asks for: ``auto`` only where both kinds run the precision."""
    if precision == "int8" or (slots and TABLE[precision].kv_dtype == "float32"):
        return "cpu"
    return "cuda" if precision == "bf16" else device


def compute_capability() -> tuple[int, int] | None:
    """The first NVIDIA GPU's compute capability as ``nvidia-smi`` states it; None where that cannot be asked."""
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        # A fixed command, so S603 has nothing to warn of.
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)  # noqa: S603
        major, minor = done.stdout.splitlines()[0].strip().split(".")
        return int(major), int(minor)
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None


_BF16 = "bf16 needs an NVIDIA GPU of compute capability 8.0 or newer with onnxruntime-gpu."
_NO_PRODUCT = "ONNX Runtime's CUDA provider has no product of dynamically quantised activations."
_NO_KERNEL = "it keeps float32 slots, and attention over them has no CUDA kernel in ONNX Runtime."
