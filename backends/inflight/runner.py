"""The ONNX Runtime session and the slot cache it works on in place.

The cache is one float32 array [slots, kv_heads, max_len, head_dim] per layer for keys and one for values. A graph's
past input and present
output are bound to the same memory, so nothing is copied: rows 0..n-1 for a decode step, one slot's row for a chunk
of prefill
(GroupQueryAttention takes a chunk with past context for one row only).
"""

from __future__ import annotations

from collections.abc import Sequence as Ids
from pathlib import Path

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from .entry import Graph

Logits = NDArray[np.float32]


class Runner:
    """One model's session over `slots` slots. Not thread-safe: the engine's thread is its only caller."""

    def __init__(self, model: Path, graph: Graph, slots: int, threads: int) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        self._session = ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
        self._graph = graph
        shape = (slots, graph.kv_heads, graph.max_len, graph.head_dim)
        # np.zeros maps pages on first touch: an idle slot costs no memory.
        self._cache = {
            f"{kind}_{i}": np.zeros(shape, np.float32) for i in range(graph.layers) for kind in ("key", "value")
        }
        self._tokens = np.zeros((slots, 1), np.int64)
        self._positions = np.zeros((slots, 1), np.int64)
        self._lengths = np.zeros(slots, np.int32)
        self._last = np.zeros(slots, np.int64)
        self._total = np.zeros((), np.int32)
        self._logits = np.zeros((slots, graph.vocab_size), np.float32)
        self._decode_bindings: dict[int, ort.IOBinding] = {}
        self._prefill_bindings: dict[int, ort.IOBinding] = {}

    def decode(self, tokens: Ids[int], positions: Ids[int]) -> Logits:
        """Feed tokens[r] at positions[r] of slot r for the first rows; float32 [rows, vocab], valid until the next
        call.
        """
        rows = len(tokens)
        self._tokens[:rows, 0] = tokens
        self._positions[:rows, 0] = positions
        self._lengths[:rows] = positions
        self._last[:rows] = 0
        self._total[()] = max(positions) + 1
        binding = self._decode_bindings.get(rows)
        if binding is None:
            binding = self._decode_bindings[rows] = self._bind(0, rows)
            _input(binding, "input_ids", self._tokens[:rows])
            _input(binding, "position_ids", self._positions[:rows])
        self._session.run_with_iobinding(binding)
        return self._logits[:rows]

    def prefill(self, slot: int, tokens: Ids[int], start: int) -> Logits:
        """Feed a chunk of one prompt at positions start.. of `slot`; float32 [1, vocab] of its last position."""
        count = len(tokens)
        ids = np.asarray(tokens, np.int64)[None]
        positions = np.arange(start, start + count, dtype=np.int64)[None]
        self._lengths[0] = start + count - 1
        self._last[0] = count - 1
        self._total[()] = start + count
        binding = self._prefill_bindings.get(slot)
        if binding is None:
            binding = self._prefill_bindings[slot] = self._bind(slot, 1)
        _input(binding, "input_ids", ids)
        _input(binding, "position_ids", positions)
        self._session.run_with_iobinding(binding)
        return self._logits[:1]

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` positions of one slot's cache to another's."""
        for cache in self._cache.values():
            cache[target, :, :length] = cache[source, :, :length]

    def _bind(self, first: int, rows: int) -> ort.IOBinding:
        binding = self._session.io_binding()
        for name, cache in self._cache.items():
            view = cache[first : first + rows]
            _input(binding, f"past_{name}", view)
            _output(binding, f"present_{name}", view)
        _input(binding, "seqlens_k", self._lengths[:rows])
        _input(binding, "last_index", self._last[:rows])
        _input(binding, "total_sequence_length", self._total)
        _output(binding, "logits", self._logits[:rows])
        return binding


def _input(binding: ort.IOBinding, name: str, array: NDArray[np.generic]) -> None:
    binding.bind_input(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)


def _output(binding: ort.IOBinding, name: str, array: NDArray[np.generic]) -> None:
    binding.bind_output(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
