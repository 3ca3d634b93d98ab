"""int8 slots: keys and values are stored as int8, with a constant scale for each channel of each head.

A slot takes a quarter of the memory, and a step over long contexts, which reads all of it, is shorter by up to a fifth.
In return a prompt is read more slowly, for ONNX Runtime widens what it reads when it takes several queries at once.

A scale is what the largest magnitude of its channel needs over the references that the entry is verified with, and
some room: what is beyond that in other texts becomes the largest value that there is.
Source: https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.GroupQueryAttention
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
from onnxscript import ir

from export.optimize import add_weight, save
from export.runtime import SlotRuntime
from export.verify import BATCH

ROOM = 1.25
LARGEST = 127
_SCALES = 12  # GroupQueryAttention's input k_scale; v_scale is the next one

Ranges = dict[str, npt.NDArray[np.float32]]


def quantize_cache(model: ir.Model, folder: Path, exercise: Callable[[SlotRuntime], None]) -> None:
    """Make every ``past_*`` and ``present_*`` int8, in place.

    ``folder`` takes the graph that is measured; it is removed again. ``exercise`` runs it over the lengths and batches
    to be verified.
    """
    ranges = measure(model, folder / "ranges", exercise)
    for node in model.graph:
        if node.op_type == "GroupQueryAttention":
            _quantize(model, node, ranges)
    for value in (*model.graph.inputs, *model.graph.outputs):
        if str(value.name).startswith(("past_", "present_")):
            value.type = ir.TensorType(ir.DataType.INT8)  # not its dtype: a clone's types are the original's objects


def measure(model: ir.Model, folder: Path, exercise: Callable[[SlotRuntime], None]) -> Ranges:
    """The largest magnitude in every channel of every cache: float32 [kv_heads, head_dim] by the input's name."""
    folder.mkdir(parents=True)
    try:
        save(model, folder)
        runtime = _Ranges(folder / "model.onnx", BATCH)
        exercise(runtime)
        return runtime.largest
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class _Ranges(SlotRuntime):
    """A runtime that keeps the largest magnitudes that were written into its caches."""

    def __init__(self, path: Path, slots: int) -> None:
        super().__init__(path, slots)
        self.largest: Ranges = {}

    def after_step(self, slots: slice, positions: npt.NDArray[np.int64]) -> None:
        for name, cache in self._cache.items():
            for row, written in zip(cache.array[slots], positions, strict=True):
                seen = np.abs(row[:, written[0] : written[-1] + 1]).max(axis=1)
                self.largest[name] = np.maximum(self.largest.get(name, seen), seen)


def _quantize(model: ir.Model, node: ir.Node, ranges: Ranges) -> None:
    node.resize_inputs(_SCALES + 2)
    for offset, name in enumerate([str(past.name) for past in node.inputs[3:5] if past is not None]):
        scales = np.maximum(ranges[name] * (ROOM / LARGEST), np.finfo(np.float32).tiny)
        scale = add_weight(model, f"{name}.scale", scales[None, :, None].astype(np.float32))
        node.replace_input_with(_SCALES + offset, scale)
    for letter in "kv":
        node.attributes.add(ir.AttrString(f"{letter}_quant_type", "PER_CHANNEL"))
    node.attributes.add(ir.AttrInt64("kv_cache_bit_width", 8))
