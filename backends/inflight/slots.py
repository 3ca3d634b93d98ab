"""The memory of one cache (the keys or the values of one layer): [slots, kv_heads, max_len, head_dim], zeros at first.

Whoever binds it needs addresses only, so what its elements are does not matter here beyond their size: numpy has no
bfloat16, and two bytes stand in for one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import onnxruntime as ort
from numpy.typing import DTypeLike

from .devices import CPU, Placement
from .entry import EntryError

# ONNX Runtime's name of a type -> its number in ONNX's TensorProto, and a numpy type of that size.
ELEMENTS: dict[str, tuple[int, DTypeLike]] = {
    "tensor(float)": (1, np.float32),
    "tensor(float16)": (10, np.float16),
    "tensor(bfloat16)": (16, np.uint16),
    "tensor(int8)": (3, np.int8),
}


@dataclass(frozen=True)
class CacheInput:
    """One `past_*` input of a graph. `shape`: [kv_heads, max_len, head_dim]."""

    name: str
    shape: tuple[int, ...]
    element_type: int
    stored_as: DTypeLike


def cache_inputs(session: ort.InferenceSession) -> list[CacheInput]:
    """The caches that a graph asks for. Raises EntryError for a shape or type that slots cannot have."""
    found = []
    for given in session.get_inputs():
        if not given.name.startswith("past_"):
            continue
        sizes = given.shape[1:]
        if len(sizes) != 3 or not all(isinstance(size, int) and size > 0 for size in sizes):
            raise EntryError(
                f"model.onnx: {given.name} is {given.shape}, not [rows, kv_heads, max_len, head_dim] with fixed sizes; "
                "export the model again"
            )
        if given.type not in ELEMENTS:
            raise EntryError(
                f"model.onnx: {given.name} is a {given.type}; slots are {', '.join(ELEMENTS)}; export the model again"
            )
        found.append(CacheInput(given.name, tuple(sizes), *ELEMENTS[given.type]))
    return found


class Slots:
    """One cache in the memory of a placement. Errors are ONNX Runtime's: the runner translates them."""

    def __init__(self, given: CacheInput, count: int, placement: Placement) -> None:
        self.shape, self.element_type = given.shape, given.element_type
        self._placement = placement
        # np.zeros maps pages on first touch: an idle slot costs no memory on the CPU.
        self.array = np.zeros((count, *given.shape), given.stored_as)
        self._address = self.array.ctypes.data
        self._slot_bytes = math.prod(given.shape) * self.array.itemsize
        if placement.memory != CPU:
            self._value = ort.OrtValue.ortvalue_from_numpy(self.array, placement.memory, placement.device_id)
            self._address = self._value.data_ptr()
            del self.array

    def bind_input(self, binding: ort.IOBinding, name: str, first: int, rows: int) -> None:
        """Slots first..first+rows-1 are the input `name`."""
        binding.bind_input(name, *self._view(first, rows))

    def bind_output(self, binding: ort.IOBinding, name: str, first: int, rows: int) -> None:
        """The output `name` is written into slots first..first+rows-1."""
        binding.bind_output(name, *self._view(first, rows))

    def _view(self, first: int, rows: int) -> tuple[str, int, int, tuple[int, ...], int]:
        where = self._placement
        address = self._address + first * self._slot_bytes
        return where.memory, where.device_id, self.element_type, (rows, *self.shape), address
