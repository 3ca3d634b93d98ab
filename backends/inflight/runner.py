"""The ONNX Runtime session and the slot cache it works on in place.

The cache is one array [slots, kv_heads, max_len, head_dim] per layer for keys and one for values, of the shapes and
types that the graph's past inputs have. A graph's past input and present output are bound to the same memory, so
nothing is copied: rows 0..n-1 for a decode step, one slot's row for a chunk of prefill (GroupQueryAttention takes a
chunk with past context for one row only).

On a device the weights and the cache stay there; ids, positions and lengths go up with each step and the logits come
down. `total_sequence_length` stays in the CPU's memory, where GroupQueryAttention reads it on every provider.
"""

from __future__ import annotations

from collections.abc import Sequence as Ids
from pathlib import Path

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from .devices import CPU, Placement, open_session, translated
from .entry import EntryError
from .mover import DeviceMover
from .slots import Slots, cache_inputs

Logits = NDArray[np.float32]


class Block:
    """A copy of some positions of one slot, an array [kv_heads, positions, head_dim] for each cache."""

    def __init__(self, parts: list[NDArray[np.generic]]) -> None:
        self.parts = parts
        self.nbytes = sum(part.nbytes for part in parts)


class Runner:
    """One model's session over `slots` slots. Not thread-safe: the engine's thread is its only caller.

    `device` is where it runs. Every method raises OutOfMemory or DeviceLost where that is what the session's error
    means, else what ONNX Runtime raises; after OutOfMemory the same call may be made again.
    """

    def __init__(self, model: Path, slots: int, threads: int, placement: Placement) -> None:
        """Open `model`. Raises EntryError for a graph that this provider or this runner cannot run."""
        self.device, self._placement = placement.device, placement
        with translated(self._placement):
            self._session = _session(model, threads, placement)
            self._cache = {given.name: Slots(given, slots, placement) for given in cache_inputs(self._session)}
            on_device = placement.memory != CPU and bool(self._cache)
            self._mover = DeviceMover(list(self._cache.values()), placement) if on_device else None
        # What is bound on the CPU is read where it lies; ONNX Runtime copies it to a device when it is bound.
        self._rebinds = placement.memory != CPU
        self._tokens = np.zeros((slots, 1), np.int64)
        self._positions = np.zeros((slots, 1), np.int64)
        self._lengths = np.zeros(slots, np.int32)
        last = next(given for given in self._session.get_inputs() if given.name == "last_index")
        self.can_verify = len(last.shape) == 2
        self._last = np.zeros((slots, 1) if self.can_verify else slots, np.int64)
        self._total = np.zeros((), np.int32)
        self._logits = np.zeros((slots, _vocab_size(self._session)), np.float32)
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
        with translated(self._placement):
            binding = self._decode_bindings.get(rows)
            fresh = binding is None
            if binding is None:
                binding = self._decode_bindings[rows] = self._bind(0, rows)
            if fresh or self._rebinds:
                _input(binding, "input_ids", self._tokens[:rows])
                _input(binding, "position_ids", self._positions[:rows])
            self._run(binding, rows)
        return self._logits[:rows]

    def prefill(self, slot: int, tokens: Ids[int], start: int) -> Logits:
        """Feed a chunk of one prompt at positions start.. of `slot`; float32 [1, vocab] of its last position."""
        if start == 0 and len(tokens) % 2 and len(tokens) > 1:
            return self.prefill_fresh(slot, [tokens])
        count = len(tokens)
        ids = np.asarray(tokens, np.int64)[None]
        positions = np.arange(start, start + count, dtype=np.int64)[None]
        self._lengths[0] = start + count - 1
        self._last[0] = count - 1
        self._total[()] = start + count
        with translated(self._placement):
            binding = self._prefill_bindings.get(slot)
            if binding is None:
                binding = self._prefill_bindings[slot] = self._bind(slot, 1)
            _input(binding, "input_ids", ids)
            _input(binding, "position_ids", positions)
            self._run(binding, 1)
        return self._logits[:1]

    def prefill_fresh(self, first_slot: int, prompts: Ids[Ids[int]]) -> Logits:
        """Feed whole prompts, padded on the right to the longest one's even length, in slots first_slot..."""
        rows = len(prompts)
        width = max(len(prompt) for prompt in prompts)
        width += width % 2 if width > 1 else 0
        ids = np.zeros((rows, width), np.int64)
        for row, prompt in enumerate(prompts):
            ids[row, : len(prompt)] = prompt
        positions = np.broadcast_to(np.arange(width, dtype=np.int64), ids.shape).copy()
        ends = np.array([len(prompt) - 1 for prompt in prompts])
        self._lengths[:rows] = ends
        self._last[:rows] = ends[:, None] if self.can_verify else ends
        self._total[()] = width
        with translated(self._placement):
            binding = self._bind(first_slot, rows)
            _input(binding, "input_ids", ids)
            _input(binding, "position_ids", positions)
            self._run(binding, rows)
        return self._logits[:rows]

    def verify(self, slot: int, tokens: Ids[int], start: int) -> Logits:
        """Feed a chunk at positions start.. of `slot`; float32 [tokens, vocab], a row for each."""
        count = len(tokens)
        ids = np.asarray(tokens, np.int64)[None]
        positions = np.arange(start, start + count, dtype=np.int64)[None]
        last = np.arange(count, dtype=np.int64)[None]
        logits = np.empty((count, self._logits.shape[1]), np.float32)
        self._lengths[0] = start + count - 1
        self._total[()] = start + count
        with translated(self._placement):
            binding = self._bind(slot, 1)
            _input(binding, "input_ids", ids)
            _input(binding, "position_ids", positions)
            _input(binding, "last_index", last)
            binding.bind_output("logits", CPU, 0, logits.dtype, logits.shape, logits.ctypes.data)
            self._session.run_with_iobinding(binding)
        return logits

    def save(self, slot: int, start: int, stop: int) -> Block:
        """Copy positions start..stop-1 of a slot out."""
        return Block([cache.array[slot, :, start:stop].copy() for cache in self._cache.values()])

    def load(self, slot: int, start: int, block: Block) -> None:
        """Copy a block into a slot, from position `start` on."""
        for cache, part in zip(self._cache.values(), block.parts, strict=True):
            cache.array[slot, :, start : start + part.shape[1]] = part

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` positions (or more) of one slot's cache to another's."""
        if self._mover is not None:
            with translated(self._placement):
                self._mover.move(source, target)
            return
        for cache in self._cache.values():
            cache.array[target, :, :length] = cache.array[source, :, :length]

    def _run(self, binding: ort.IOBinding, rows: int) -> None:
        if self._rebinds:
            self._bind_lengths(binding, rows)
            binding.synchronize_inputs()
        self._session.run_with_iobinding(binding)

    def _bind(self, first: int, rows: int) -> ort.IOBinding:
        binding = self._session.io_binding()
        for name, cache in self._cache.items():
            cache.bind_input(binding, name, first, rows)
            cache.bind_output(binding, name.replace("past", "present", 1), first, rows)
        self._bind_lengths(binding, rows)
        logits = self._logits[:rows]
        binding.bind_output("logits", CPU, 0, logits.dtype, logits.shape, logits.ctypes.data)
        return binding

    def _bind_lengths(self, binding: ort.IOBinding, rows: int) -> None:
        _input(binding, "seqlens_k", self._lengths[:rows])
        _input(binding, "last_index", self._last[:rows])
        _input(binding, "total_sequence_length", self._total)


def _session(model: Path, threads: int, placement: Placement) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    return open_session(model, options, placement)


def _vocab_size(session: ort.InferenceSession) -> int:
    logits = next((out for out in session.get_outputs() if out.name == "logits"), None)
    if logits is None or logits.type != "tensor(float)" or not isinstance(logits.shape[-1], int):
        raise EntryError("model.onnx has no output logits of float32 [rows, vocab]; export the model again")
    return int(logits.shape[-1])


def _input(binding: ort.IOBinding, name: str, array: NDArray[np.generic]) -> None:
    binding.bind_input(name, CPU, 0, array.dtype, array.shape, array.ctypes.data)
