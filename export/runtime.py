"""The reference runtime: ONNX Runtime over dense KV slots, as small as can be.

`export.verify` runs the final artefact through it. The serving backend has a runner of its own (the packages share
files, not code); both bind past and present to the same memory, so a step copies no cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnxruntime

Logits = npt.NDArray[np.float32]


class SlotRuntime:
    """An exported decoder with ``slots`` sequences' worth of KV cache.

    Raises whatever ONNX Runtime raises when the file cannot be opened or a step fails.
    """

    def __init__(self, path: Path, slots: int, threads: int = 0) -> None:
        """Open ``path``; ``threads`` 0 means one for each core."""
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        pasts = [value for value in self._session.get_inputs() if value.name.startswith("past_")]
        self.slots = slots
        self.max_len = int(pasts[0].shape[2])
        self.vocab_size = int(next(value for value in self._session.get_outputs() if value.name == "logits").shape[1])
        # np.zeros maps pages lazily: positions that are never reached cost no memory.
        self._cache = {value.name: np.zeros((slots, *value.shape[1:]), np.float32) for value in pasts}

    def prefill(self, slot: int, tokens: Sequence[int], past: int) -> Logits:
        """Run one chunk of a prompt in ``slot`` behind ``past`` tokens; logits [vocab] of the chunk's last position."""
        ids = np.asarray([tokens], np.int64)
        positions = past + np.arange(len(tokens), dtype=np.int64)[None]
        last: Logits = self._step(
            ids, positions, np.asarray([past + len(tokens)]), np.asarray([len(tokens) - 1]), slot
        )[0]
        return last

    def prefill_fresh(self, prompts: Sequence[Sequence[int]]) -> Logits:
        """Run whole prompts of different lengths at once in the first slots; logits [rows, vocab].

        Rows are padded on the right. The operator takes several rows with more than one token only without a past.
        """
        lengths = np.asarray([len(prompt) for prompt in prompts])
        ids = np.zeros((len(prompts), int(lengths.max())), np.int64)
        for row, prompt in enumerate(prompts):
            ids[row, : len(prompt)] = prompt
        positions = np.broadcast_to(np.arange(ids.shape[1], dtype=np.int64), ids.shape).copy()
        return self._step(ids, positions, lengths, lengths - 1, 0)

    def decode(self, tokens: Sequence[int], pasts: Sequence[int]) -> Logits:
        """One token for each of the first ``len(tokens)`` slots, behind ``pasts`` tokens; logits [rows, vocab]."""
        ids = np.asarray(tokens, np.int64)[:, None]
        lengths = np.asarray(pasts)
        return self._step(ids, lengths[:, None].astype(np.int64), lengths + 1, np.zeros(len(tokens), np.int64), 0)

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first ``length`` positions of a slot's cache, so that active slots stay dense."""
        for cache in self._cache.values():
            cache[target, :, :length] = cache[source, :, :length]

    def _step(
        self,
        ids: npt.NDArray[np.int64],
        positions: npt.NDArray[np.int64],
        lengths: npt.NDArray[np.int64],
        last: npt.NDArray[np.int64],
        first: int,
    ) -> Logits:
        rows = ids.shape[0]
        binding = self._session.io_binding()
        inputs = {
            "input_ids": ids,
            "position_ids": positions,
            "seqlens_k": (lengths - 1).astype(np.int32),
            "total_sequence_length": np.asarray(lengths.max(), np.int32),
            "last_index": last.astype(np.int64),
        }
        for name, array in inputs.items():
            binding.bind_cpu_input(name, array)
        for name, cache in self._cache.items():
            shape = (rows, *cache.shape[1:])
            address = cache[first:].ctypes.data
            binding.bind_input(name, "cpu", 0, np.float32, shape, address)
            binding.bind_output(name.replace("past", "present", 1), "cpu", 0, np.float32, shape, address)
        logits = np.empty((rows, self.vocab_size), np.float32)
        binding.bind_output("logits", "cpu", 0, np.float32, logits.shape, logits.ctypes.data)
        self._session.run_with_iobinding(binding)
        return logits
