"""Copies one slot onto another where numpy cannot reach: on the device, by a graph of Identity nodes.

The graph runs on the provider that the model runs on, and is written out here byte by byte: the backend has no onnx.
Source of the field numbers: https://github.com/onnx/onnx/blob/main/onnx/onnx.proto
"""

from __future__ import annotations

from collections.abc import Sequence

import onnxruntime as ort

from .devices import Placement
from .slots import Slots
from .trt import PROVIDER as TENSORRT_PROVIDER

IR_VERSION, OPSET = 8, 16  # the first with Identity over every type that slots have is 16


class DeviceMover:
    """Moves slots of some caches; all its bindings are to memory that exists, so a move allocates nothing."""

    def __init__(self, caches: Sequence[Slots], placement: Placement) -> None:
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        # TensorRT would build an engine for it, with the profiles of another graph, and keep it among the entry's.
        providers = [(name, dict(given)) for name, given in placement.providers if name != TENSORRT_PROVIDER]
        self._session = ort.InferenceSession(identities(caches), options, providers=providers)
        self._session.disable_fallback()
        self._caches = caches

    def move(self, source: int, target: int) -> None:
        """Copy the whole of a slot, in every cache."""
        binding = self._session.io_binding()
        for i, cache in enumerate(self._caches):
            cache.bind_input(binding, f"from_{i}", source, 1)
            cache.bind_output(binding, f"to_{i}", target, 1)
        self._session.run_with_iobinding(binding)


def identities(caches: Sequence[Slots]) -> bytes:
    """A ModelProto: to_i = Identity(from_i), each of the shape and type of one slot of its cache."""
    nodes, inputs, outputs = b"", b"", b""
    for i, cache in enumerate(caches):
        source, target = f"from_{i}".encode(), f"to_{i}".encode()
        nodes += _bytes(1, _bytes(1, source) + _bytes(2, target) + _bytes(4, b"Identity"))
        dims = b"".join(_bytes(1, _number(1, size)) for size in (1, *cache.shape))
        kind = _bytes(2, _bytes(1, _number(1, cache.element_type) + _bytes(2, dims)))
        inputs += _bytes(11, _bytes(1, source) + kind)
        outputs += _bytes(12, _bytes(1, target) + kind)
    graph = nodes + _bytes(2, b"move") + inputs + outputs
    return _number(1, IR_VERSION) + _bytes(7, graph) + _bytes(8, _bytes(1, b"") + _number(2, OPSET))


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _bytes(field: int, value: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(value)) + value


def _varint(value: int) -> bytes:
    out = b""
    while value > 0x7F:
        out += bytes([value & 0x7F | 0x80])
        value >>= 7
    return out + bytes([value])
