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
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from .devices import CPU, Placement, open_session, translated
from .entry import EntryError
from .mover import DeviceMover
from .slots import Slots, cache_inputs

Logits = NDArray[np.float32]
MAX_VERIFIED = 17  # positions of one row whose logits are computed at once: a draft of 16 and the token before it


@dataclass(frozen=True)
class Block:
    """Some positions of one slot, out of the cache: for each cache an array [kv_heads, positions, head_dim]."""

    parts: tuple[NDArray[np.generic], ...]

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)


class Runner:
    """One model's session over `slots` slots. Not thread-safe: the engine's thread is its only caller.

    `device` is where it runs. `can_verify`: the graph computes logits for several positions of a row. `can_save`: slots
    can be copied out and in. Every method raises OutOfMemory or DeviceLost where that is what the session's error
    means, else what ONNX Runtime raises; after OutOfMemory the same call may be made again. Logits are valid until the
    next call.
    """

    def __init__(self, model: Path, slots: int, threads: int, placement: Placement) -> None:
        """Open `model`. Raises EntryError for a graph that this provider or this runner cannot run."""
        self.device, self._placement = placement.device, placement
        with translated(self._placement):
            self._session = _session(model, threads, placement)
            self._cache = {given.name: Slots(given, slots, placement) for given in cache_inputs(self._session)}
            on_device = placement.memory != CPU and bool(self._cache)
            self._mover = DeviceMover(list(self._cache.values()), placement) if on_device else None
        self.can_verify = _picks(self._session)
        self.can_save = not on_device
        # What is bound on the CPU is read where it lies; ONNX Runtime copies it to a device when it is bound.
        self._rebinds = placement.memory != CPU
        self._tokens = np.zeros((slots, 1), np.int64)
        self._positions = np.zeros((slots, 1), np.int64)
        self._lengths = np.zeros(slots, np.int32)
        rows = max(slots, MAX_VERIFIED)
        self._last = np.zeros(rows, np.int64)
        self._total = np.zeros((), np.int32)
        self._logits = np.zeros((rows, _vocab_size(self._session)), np.float32)
        self._decode_bindings: dict[int, ort.IOBinding] = {}
        self._slot_bindings: dict[tuple[int, int], ort.IOBinding] = {}

    def decode(self, tokens: Ids[int], positions: Ids[int]) -> Logits:
        """Feed tokens[r] at positions[r] of slot r for the first rows; float32 [rows, vocab]."""
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
        return self._feed(slot, tokens, start, 1)

    def verify(self, slot: int, tokens: Ids[int], start: int) -> Logits:
        """Feed at most MAX_VERIFIED tokens at positions start.. of `slot`; float32 [tokens, vocab], a row for each."""
        return self._feed(slot, tokens, start, len(tokens))

    def prefill_fresh(self, first: int, prompts: Ids[Ids[int]]) -> Logits:
        """Feed whole prompts of any lengths to slots first.., which hold nothing; float32 [prompts, vocab].

        Rows are padded on the right; what that leaves behind a prompt is overwritten by its next tokens.
        """
        rows, lengths = len(prompts), [len(prompt) for prompt in prompts]
        ids = np.zeros((rows, _even(max(lengths))), np.int64)
        for row, prompt in enumerate(prompts):
            ids[row, : lengths[row]] = prompt
        positions = np.broadcast_to(np.arange(ids.shape[1], dtype=np.int64), ids.shape).copy()
        self._lengths[:rows] = lengths
        self._lengths[:rows] -= 1
        self._last[:rows] = self._lengths[:rows]
        self._total[()] = ids.shape[1]
        with translated(self._placement):
            binding = self._bind(first, rows)
            _input(binding, "input_ids", ids)
            _input(binding, "position_ids", positions)
            self._run(binding, rows)
        return self._logits[:rows]

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` positions (or more) of one slot's cache to another's."""
        if self._mover is not None:
            with translated(self._placement):
                self._mover.move(source, target)
            return
        for cache in self._cache.values():
            cache.array[target, :, :length] = cache.array[source, :, :length]

    def save(self, slot: int, start: int, stop: int) -> Block:
        """A copy of positions start..stop-1 of a slot; only where `can_save`."""
        return Block(tuple(cache.array[slot, :, start:stop].copy() for cache in self._cache.values()))

    def load(self, slot: int, start: int, block: Block) -> None:
        """Write what `save` took to positions start.. of a slot."""
        for cache, part in zip(self._cache.values(), block.parts, strict=True):
            cache.array[slot, :, start : start + part.shape[1]] = part

    def _feed(self, slot: int, tokens: Ids[int], start: int, picks: int) -> Logits:
        count = len(tokens)
        width = count if start else _even(count)  # the operator takes padding only where there is no past
        ids = np.zeros((1, width), np.int64)
        ids[0, :count] = tokens
        positions = np.arange(start, start + width, dtype=np.int64)[None]
        self._lengths[0] = start + count - 1
        self._last[:picks] = np.arange(count - picks, count)
        self._total[()] = start + width
        with translated(self._placement):
            binding = self._slot_bindings.get((slot, picks))
            if binding is None:
                binding = self._slot_bindings[slot, picks] = self._bind(slot, 1, picks)
            _input(binding, "input_ids", ids)
            _input(binding, "position_ids", positions)
            self._run(binding, 1, picks)
        return self._logits[:picks]

    def _run(self, binding: ort.IOBinding, rows: int, picks: int = 1) -> None:
        if self._rebinds:
            self._bind_lengths(binding, rows, picks)
            binding.synchronize_inputs()
        self._session.run_with_iobinding(binding)

    def _bind(self, first: int, rows: int, picks: int = 1) -> ort.IOBinding:
        binding = self._session.io_binding()
        for name, cache in self._cache.items():
            cache.bind_input(binding, name, first, rows)
            cache.bind_output(binding, name.replace("past", "present", 1), first, rows)
        self._bind_lengths(binding, rows, picks)
        logits = self._logits[: rows * picks]
        binding.bind_output("logits", CPU, 0, logits.dtype, logits.shape, logits.ctypes.data)
        return binding

    def _bind_lengths(self, binding: ort.IOBinding, rows: int, picks: int) -> None:
        _input(binding, "seqlens_k", self._lengths[:rows])
        last = self._last[: rows * picks]
        _input(binding, "last_index", last.reshape(rows, picks) if self.can_verify else last)
        _input(binding, "total_sequence_length", self._total)


def _session(model: Path, threads: int, placement: Placement) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    return open_session(model, options, placement)


def _even(width: int) -> int:
    """A width at which attention computes every row of a chunk by the same kernel, whatever the chunk's length.

    At one more than a multiple of its block of queries ONNX Runtime computes the last row as it does a decode step,
    with other rounding.
    """
    return width + width % 2 if width > 1 else 1


def _picks(session: ort.InferenceSession) -> bool:
    """Whether `last_index` is [rows, picks]; in older exports it is [rows]."""
    return any(given.name == "last_index" and len(given.shape) == 2 for given in session.get_inputs())


def _vocab_size(session: ort.InferenceSession) -> int:
    logits = next((out for out in session.get_outputs() if out.name == "logits"), None)
    if logits is None or logits.type != "tensor(float)" or not isinstance(logits.shape[-1], int):
        raise EntryError("model.onnx has no output logits of float32 [rows, vocab]; export the model again")
    return int(logits.shape[-1])


def _input(binding: ort.IOBinding, name: str, array: NDArray[np.generic]) -> None:
    binding.bind_input(name, CPU, 0, array.dtype, array.shape, array.ctypes.data)
