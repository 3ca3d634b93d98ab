"""From the fp32 graph to the precision that was asked for, and what the manifest says about how."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from onnxscript import ir

from export import int4
from export.calibrate import Calibration, CalibrationText
from export.errors import ExportError, UnsupportedModel
from export.kvcache import quantize_cache
from export.quantize import quantize_int8
from export.runtime import SlotRuntime
from export.scan import half_without_overflow
from export.source import Source

CALIBRATED = ("int8", "int4")
# The share of its weights that a quantised entry may keep in fp32 because they are no matrices.
MAX_STACKED = 0.1


@dataclass(frozen=True)
class Converted:
    """The graph to save. ``facts`` go into the manifest: ``fp32_layers`` of fp16 and bf16, else ``quantization``."""

    graph: ir.Model
    facts: dict[str, Any] = field(default_factory=dict)


def check_options(
    precision: str,
    calibrate: Path | None,
    allow_drift: float | None,
    batch_invariant: bool = False,
    int8_cache: bool = False,
) -> None:
    """Raise `ExportError` for an option that the precision has no use for."""
    if int8_cache and precision not in CALIBRATED:
        raise ExportError(
            f"--kv-cache-dtype int8 is for int8 and int4; {precision} promises closer logits than it leaves.",
            "Leave it out, or give --precision int8.",
        )
    if batch_invariant and precision != "int8":
        raise ExportError(f"--batch-invariant is for int8; {precision} is so by itself or cannot be.", "Leave it out.")
    if calibrate is not None and precision not in CALIBRATED:
        raise ExportError(
            f"--calibrate is for int8 and int4; {precision} rounds nothing that a text could improve.", "Leave it out."
        )
    if allow_drift is not None and precision != "int4":
        raise ExportError(f"--allow-drift is for int4; {precision} has a bound of its own.", "Leave it out.")


def check_weights(source: Source, precision: str, instead: str) -> None:
    """Raise `UnsupportedModel` where int8 or int4 would leave much in fp32; ``instead`` is the precision to take.

    The weights themselves are not read.
    """
    if precision not in CALIBRATED:
        return
    share = sum(tensor.elements for tensor in source.stacked) / max(1, source.parameters())
    if share > MAX_STACKED:
        raise UnsupportedModel(
            f"{precision} shrinks matrices, and {share:.0%} of the weights of {source.id} are a mixture's experts or "
            f"other stacks of matrices ({source.stacked[0].name}): they would stay fp32.",
            f"Give --precision {instead}.",
        )


def convert(
    graph: ir.Model,
    precision: str,
    folder: Path,
    exercise: Callable[[SlotRuntime], None],
    device: str = "cpu",
    text: CalibrationText | None = None,
    batch_invariant: bool = False,
    int8_cache: bool = False,
    progress: Callable[[float | str], None] = lambda state: None,
) -> Converted:
    """Convert the optimised fp32 graph, in place where that can be.

    ``folder`` takes graphs that are only run here; they are removed again. ``exercise`` runs a graph over the lengths
    and batches to be verified, on ``device`` (``cpu`` or ``cuda``).

    Raises:
        UnsupportedModel: there is nothing to quantise, or the graph cannot be converted.
        VerificationError: half precision overflows and cannot be mended.
    """
    if precision == "fp32":
        return Converted(graph)
    if precision in ("fp16", "bf16"):
        mended = half_without_overflow(graph, precision, folder, exercise, device, progress)
        return Converted(mended.graph, {"fp32_layers": list(mended.fp32_layers), "largest_half": mended.largest})
    calibration = None if text is None else Calibration(text, folder / "calibrate")
    facts: dict[str, Any] = {"calibration": None if text is None else text.manifest()}
    if precision == "int8":
        quantize_int8(graph, calibration, progress, batch_invariant)
        scales = "row" if batch_invariant else "batch"
        facts |= {"bits": 8, "activations": "dynamic int8", "activation_scale": scales}
    else:
        int4.quantize_int4(graph, calibration, progress)
        facts |= {"bits": 4, "block_size": int4.BLOCK, "head_bits": int4.HEAD_BITS}
    if int8_cache:
        progress("measuring keys and values")
        quantize_cache(graph, folder, exercise)
    return Converted(graph, {"quantization": facts})
