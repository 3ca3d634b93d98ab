"""The reference runtime: ONNX Runtime over dense KV slots, as small as can be.

`export.verify` runs the final artefact through it. The serving backend has a runner of its own (the packages share
files, not code); both bind past and present to the same memory, so a step copies no cache. Shapes and types of the
cache are what the graph's inputs say, for each of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime

from export.precision import DeviceError

Logits = npt.NDArray[np.float32]

PROVIDERS = {"cpu": ["CPUExecutionProvider"], "cuda": ["CUDAExecutionProvider", "CPUExecutionProvider"]}
# The memory's own type is as wide as the elements, which numpy need not know (it has no bfloat16).
_ELEMENTS: dict[str, tuple[int, type[np.float32 | np.uint16 | np.int8]]] = {
    "tensor(float)": (onnx.TensorProto.FLOAT, np.float32),
    "tensor(float16)": (onnx.TensorProto.FLOAT16, np.uint16),
    "tensor(bfloat16)": (onnx.TensorProto.BFLOAT16, np.uint16),
    "tensor(int8)": (onnx.TensorProto.INT8, np.int8),
}


class SlotRuntime:
    """An exported decoder with ``slots`` sequences' worth of KV cache.

    Raises whatever ONNX Runtime raises when the file cannot be opened or a step fails.
    """

    def __init__(self, path: Path, slots: int, threads: int = 0, device: str = "cpu") -> None:
        """Open ``path`` on a device (``cpu`` or ``cuda``); ``threads`` 0 means one for each core."""
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        self._session = _opened(path, options, device)
        self.slots = slots
        self.vocab_size = int(next(value for value in self._session.get_outputs() if value.name == "logits").shape[1])
        self._cache = {
            value.name: _Cache(slots, [int(size) for size in value.shape[1:]], value.type, device)
            for value in self._session.get_inputs()
            if value.name.startswith("past_")
        }
        # Further float32 outputs of the graph, and the arrays that every step writes them to.
        self.extra: dict[str, npt.NDArray[np.float32]] = {}

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
            cache.move(source, target, length)

    def after_step(self, slots: slice, positions: npt.NDArray[np.int64]) -> None:
        """Called after every step, which wrote ``positions`` [rows, seq] of ``slots``; for those who watch it."""

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
            "last_index": last.astype(np.int64)[:, None],
        }
        for name, array in inputs.items():
            binding.bind_cpu_input(name, array)
        for name, cache in self._cache.items():
            place = (cache.device, 0, cache.element, (rows, *cache.shape))
            binding.bind_input(name, *place, cache.address(first))
            binding.bind_output(name.replace("past", "present", 1), *place, cache.address(first))
        logits = np.empty((rows, self.vocab_size), np.float32)
        for name, array in {"logits": logits, **self.extra}.items():
            binding.bind_output(name, "cpu", 0, np.float32, array.shape, array.ctypes.data)
        self._session.run_with_iobinding(binding)
        self.after_step(slice(first, first + rows), positions)
        return logits


def _opened(path: Path, options: onnxruntime.SessionOptions, device: str) -> onnxruntime.InferenceSession:
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=PROVIDERS[device])
    except Exception as error:
        if device == "cpu":
            raise
        raise DeviceError(
            f"ONNX Runtime's CUDA provider cannot open the graph: {str(error).strip().splitlines()[0]}",
            "Check the driver and onnxruntime-gpu, or verify it on the processor: hide the GPU with "
            "CUDA_VISIBLE_DEVICES= or give --device cpu.",
        ) from error


class _Cache:
    """Keys or values of one layer: [slots, kv_heads, max_len, head_dim] in the device's memory."""

    def __init__(self, slots: int, shape: list[int], kind: str, device: str) -> None:
        self.shape = tuple(shape)
        self.device = device
        self.element, width = _ELEMENTS[kind]
        # np.zeros maps pages lazily: positions that are never reached cost no memory.
        self.array = np.zeros((slots, *shape), width)
        self._row = self.array.strides[0]
        self._there = None
        if device != "cpu":
            self._there = onnxruntime.OrtValue.ortvalue_from_numpy(self.array, device, 0)

    def address(self, slot: int) -> int:
        """Where a slot begins."""
        base: int = self.array.ctypes.data if self._there is None else self._there.data_ptr()
        return base + slot * self._row

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first ``length`` positions of a slot to another."""
        if self._there is None:
            self.array[target, :, :length] = self.array[source, :, :length]
        else:
            host = self._there.numpy()
            host[target, :, :length] = host[source, :, :length]
            self._there.update_inplace(host)
