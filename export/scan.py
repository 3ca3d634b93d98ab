"""Where does half precision overflow? The largest magnitude of every half value, over all lengths and batch sizes.

Logits alone would not tell. ONNX Runtime's CPU computes most fp16 nodes in fp32 and rounds only where it must, so a sum
of 100,000 passes unseen there and is infinity on a GPU. The scan therefore runs the half graph with one more output,
the range of every value that is stored in half, and looks for what is, or comes near, no finite number.

A layer whose products overflow stays fp32 as a whole. Where only the sum of the residual stream does, that sum and its
readers stay fp32 (and with it the stream from there on), while the products read from it stay half.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from onnxscript import ir

from export.errors import VerificationError
from export.half import DTYPES, LIMITS, to_half
from export.optimize import layer_of, save
from export.runtime import SlotRuntime
from export.verify import BATCH

RANGES = "ranges"
# Text that was not scanned may reach further than what was.
HEADROOM = 2.0
ROUNDS = 8

# These only move values about: whatever they carry has been seen before.
_MOVES = frozenset(
    {
        "Reshape", "Transpose", "Split", "Concat", "Slice", "Squeeze", "Unsqueeze", "Expand", "Identity", "Gather",
        "GatherElements", "Flatten",
    }
)  # fmt: skip


@dataclass(frozen=True)
class Mended:
    """A half graph without overflow. ``fp32_layers`` are the modules of which something had to stay fp32."""

    graph: ir.Model
    fp32_layers: tuple[str, ...]
    largest: float


def half_without_overflow(
    graph: ir.Model,
    precision: str,
    folder: Path,
    exercise: Callable[[SlotRuntime], None],
    device: str = "cpu",
    say: Callable[[str], None] = lambda text: None,
) -> Mended:
    """The graph in half, with what overflows left in fp32. ``exercise`` runs the model over its lengths and batches.

    ``folder`` takes the graphs that are scanned; they are removed again.

    Raises:
        VerificationError: it still overflows after `ROUNDS` of this.
    """
    keep: set[str] = set()
    layers: dict[str, None] = {}
    worst: list[str] = []
    for round in range(ROUNDS):
        say(f"scanning for overflow, round {round + 1}")
        half = graph.clone()
        unfit = to_half(half, precision, keep)
        modules = layer_of(half)
        layers |= dict.fromkeys(modules[node] for node in unfit)
        ranges = measure(half, precision, folder / "scan", exercise, device)
        flagged = causes(half, ranges, LIMITS[precision] / (HEADROOM if precision == "fp16" else 1.0))
        if not flagged:
            return Mended(half, tuple(layers), max(ranges.values(), default=0.0))
        worst = _keep(half, flagged, modules, keep)
        layers |= dict.fromkeys(worst)
    raise VerificationError(
        f"{precision} overflows in {', '.join(worst)}, and keeping fp32 there does not mend it.",
        "Export it with --precision fp32, int8 or (on a GPU that has it) bf16.",
    )


def measure(
    half: ir.Model, precision: str, folder: Path, exercise: Callable[[SlotRuntime], None], device: str
) -> dict[str, float]:
    """The largest magnitude of every half value that a node computes, by name; NaN if there was one."""
    folder.mkdir(parents=True)
    try:
        with _ranges_added(half, precision) as names:
            save(half, folder)
        runtime = _Scan(folder / "model.onnx", len(names), device)
        exercise(runtime)
        return dict(zip(names, runtime.largest.tolist(), strict=True))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class _Scan(SlotRuntime):
    """A runtime that keeps the largest range seen of every value; NaN stays NaN."""

    def __init__(self, path: Path, count: int, device: str) -> None:
        super().__init__(path, BATCH, device=device)
        self.largest: npt.NDArray[np.float32] = np.zeros(count, np.float32)
        self._seen = np.empty(count, np.float32)
        self.extra[RANGES] = self._seen

    def after_step(self, slots: slice, positions: npt.NDArray[np.int64]) -> None:
        self.largest = np.maximum(self.largest, self._seen)


@contextmanager
def _ranges_added(model: ir.Model, precision: str) -> Iterator[list[str]]:
    """The graph with an output `RANGES` float32 [values]; yields the values' names and takes it off again."""
    half = DTYPES[precision]
    values = [
        output
        for node in model.graph
        if node.op_type not in _MOVES
        for output in node.outputs[:1]
        if output.dtype == half
    ]
    added: list[ir.Node] = []

    def add(op_type: str, inputs: list[ir.Value], **attributes: int) -> ir.Value:
        node = ir.node(op_type, inputs=inputs, attributes=attributes or None)
        added.append(node)
        return node.outputs[0]

    axis = ir.Value(name="ranges.axis", const_value=ir.tensor(np.zeros(1, np.int64)))
    axis.shape, axis.type = ir.Shape([1]), ir.TensorType(ir.DataType.INT64)
    model.graph.register_initializer(axis)
    magnitudes = []
    for value in values:
        size = add("Abs", [add("Cast", [value], to=int(ir.DataType.FLOAT))])
        # ReduceMax may lose a NaN, a sum never does.
        total, top = add("ReduceSum", [size], keepdims=0), add("ReduceMax", [size], keepdims=0)
        magnitudes.append(add("Unsqueeze", [add("Where", [add("IsNaN", [total]), total, top]), axis]))
    if magnitudes:
        ranges = add("Concat", magnitudes, axis=0)
        ranges.name, ranges.shape = RANGES, ir.Shape([len(values)])
        ranges.type = ir.TensorType(ir.DataType.FLOAT)
        model.graph.extend(added)
        model.graph.outputs.append(ranges)
    try:
        yield [str(value.name) for value in values]
    finally:
        if magnitudes:
            model.graph.outputs.pop()
            model.graph.remove(added, safe=True)
        model.graph.initializers.pop("ranges.axis")


def causes(model: ir.Model, ranges: dict[str, float], limit: float) -> list[ir.Value]:
    """Values out of range, without those that are NaN or infinite only because an input of theirs already was."""
    spoilt: set[ir.Value] = set()
    causes = []
    for node in model.graph:
        inherited = any(value in spoilt for value in node.inputs if value is not None)
        reached = ranges.get(str(node.outputs[0].name), 0.0)
        finite = bool(np.isfinite(reached))
        if inherited or not finite:
            spoilt.update(node.outputs)
        if not reached <= limit and (finite or not inherited):
            causes.append(node.outputs[0])
    return causes


def _keep(model: ir.Model, flagged: list[ir.Value], modules: dict[ir.Node, str], keep: set[str]) -> list[str]:
    """Add to ``keep`` what shall compute in fp32 from now on; returns the modules where that is."""
    producers = {output: node for node in model.graph for output in node.outputs}
    whole: set[str] = set()
    found: dict[str, None] = {}
    for value in flagged:
        node = producers[value]
        # A cast stands in for the value that it narrows: where that goes has to stay fp32.
        readers = [use.node for use in value.uses()]
        keep.update(str(reader.outputs[0].name) for reader in (node, *readers))
        places = [modules[reader] for reader in readers] if node.op_type == "Cast" else [modules[node]]
        found |= dict.fromkeys(places)
        if node.op_type not in ("Add", "Cast"):
            whole.add(modules[node])
    layered = {module for module in whole if re.search(r"\.\d+$", module)}
    keep.update(str(node.outputs[0].name) for node in model.graph if modules[node] in layered)
    return list(found)
