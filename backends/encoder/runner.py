"""Runs the graph, here in ONNX Runtime or by asking Triton for the model that holds it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from ..inflight.devices import CPU, CUDA_PROVIDER, ON_CPU, Placement, open_session, place_graph, translated
from ..inflight.entry import EntryError
from ..inflight.errors import DeviceLost, OutOfMemory, Unavailable
from .entry import Entry
from .packing import RUN_COST, RUN_COST_OF_SKIPPING, by_bucket, pack
from .tokens import Tokens

Rows = NDArray[np.float32]
Feed = dict[str, NDArray[np.int64]]


class Runner(Protocol):
    """Rows of output, float32 [width], for each text, or the error of the run that it was in.

    `device` is where it runs, empty where that is not known.
    """

    device: str
    fallback: bool

    def run(self, texts: Sequence[Tokens]) -> list[Rows | Exception]: ...


def feed(texts: Sequence[Tokens], padded: int, pad: int, inputs: Sequence[str]) -> Feed:
    """The graph's inputs, int64 [rows, padded], of texts that are padded on the right."""
    ids = np.full((len(texts), padded), pad, np.int64)
    mask = np.zeros_like(ids)
    types = np.zeros_like(ids)
    for row, text in enumerate(texts):
        ids[row, : len(text)] = text.ids
        mask[row, : len(text)] = 1
        types[row, : len(text)] = text.types
    given = {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}
    return {name: given[name] for name in inputs}


def by_halves(texts: Sequence[Tokens], run: Callable[[Sequence[Tokens]], Rows]) -> list[Rows | Exception]:
    """Run texts together; where that fails in halves, so that only a text that fails alone gets the error.

    A shortage of memory is met in the same way. Whoever is away is not asked again.
    """
    try:
        return list(run(texts))
    except Exception as error:
        if len(texts) == 1 or isinstance(error, Unavailable):
            return [error] * len(texts)
    half = len(texts) // 2
    return by_halves(texts[:half], run) + by_halves(texts[half:], run)


class SessionRunner:
    """ONNX Runtime in this process, batches packed by `packing.pack`.

    When its device fails the session is made again on the CPU, for good: ``fallback`` is true from then on. Raises
    EntryError where device cuda was asked for and cannot be had.
    """

    fallback = False

    def __init__(
        self, entry: Entry, device_id: int = 0, placing: Callable[[str, int], Placement] = place_graph
    ) -> None:
        self._entry, self._path = entry, entry.folder / "model.onnx"
        self._placement = placing(entry.device, device_id)
        self.device = self._placement.device
        if self._placement.note and CUDA_PROVIDER in ort.get_available_providers():  # without it nobody expects CUDA
            self._tell(f"runs on the {self.device}: {self._placement.note}")
        try:
            with translated(self._placement):
                self._session = self._open(self._placement)
        except (DeviceLost, OutOfMemory) as error:
            if entry.device != "auto" or self.device == CPU:
                hint = "" if self.device == CPU else "; or set device to auto or cpu in config.pbtxt"
                raise EntryError(f"{error}{hint}") from error
            self._to_cpu(error)

    def run(self, texts: Sequence[Tokens]) -> list[Rows | Exception]:
        """See `Runner`."""
        answers: list[Rows | Exception] = [RuntimeError("not run")] * len(texts)
        run_cost = RUN_COST_OF_SKIPPING if self._entry.skips_padding else RUN_COST
        for batch in pack([len(text) for text in texts], self._entry.max_tokens_per_batch, run_cost):
            output = by_halves([texts[index] for index in batch], self._once)
            for index, row in zip(batch, output, strict=True):
                answers[index] = row
        return answers

    def _once(self, texts: Sequence[Tokens]) -> Rows:
        given = feed(texts, max(len(text) for text in texts), self._entry.pad, self._entry.inputs)
        try:
            return self._compute(given)
        except DeviceLost as error:
            self._to_cpu(error)
            return self._compute(given)

    def _compute(self, given: Feed) -> Rows:
        with translated(self._placement):
            rows: Rows = self._session.run([self._entry.output], given)[0]
        return rows

    def _to_cpu(self, error: Exception) -> None:
        self._tell(f"{error}; it is opened on the CPU")
        self._session = self._open(ON_CPU)
        self._placement, self.device, self.fallback = ON_CPU, ON_CPU.device, True

    def _open(self, placement: Placement) -> ort.InferenceSession:
        options = ort.SessionOptions()
        options.intra_op_num_threads = self._entry.threads
        # The other instance computes while this one waits: a thread that spins would take its core away.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        # Softmax makes denormal numbers of masked scores, and the processor takes a hundred times as long for them.
        options.add_session_config_entry("session.set_denormal_as_zero", "1")
        options.log_severity_level = 3
        # On the CPU the fused residual and layer norm takes longer than the two alone: an eighth of a run of MiniLM.
        slower = ["SkipLayerNormFusion"] if placement.device == CPU else []
        return open_session(self._path, options, placement, slower)

    def _tell(self, line: str) -> None:
        print(f"encoder: {self._entry.folder.parent.name}: {line}", file=sys.stderr, flush=True)


class EngineRunner:
    """Another model of this Triton runs the graph: one request a length bucket, which Triton batches with those of the
    other instances. One after the other: nothing says that a stub may ask from several threads at once.

    ``ask`` sends one request's inputs and returns its rows; it raises what went wrong.
    """

    device = ""  # whatever Triton runs the other model on
    fallback = False

    def __init__(self, entry: Entry, ask: Callable[[Feed], Rows], max_rows: int) -> None:
        self._entry, self._ask, self._max_rows = entry, ask, max_rows

    def run(self, texts: Sequence[Tokens]) -> list[Rows | Exception]:
        """See `Runner`."""
        entry = self._entry
        answers: list[Rows | Exception] = [RuntimeError("not run")] * len(texts)
        for padded, fitting in by_bucket([len(t) for t in texts], entry.max_len, entry.max_tokens_per_batch):
            for at in range(0, len(fitting), self._max_rows):
                indices = fitting[at : at + self._max_rows]
                output = by_halves([texts[i] for i in indices], partial(self._padded, padded))
                for index, row in zip(indices, output, strict=True):
                    answers[index] = row
        return answers

    def _padded(self, padded: int, texts: Sequence[Tokens]) -> Rows:
        return self._ask(feed(texts, padded, self._entry.pad, self._entry.inputs))
