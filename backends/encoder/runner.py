"""Runs the graph, here in ONNX Runtime or by asking Triton for the model that holds it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from ..inflight.entry import EntryError
from .entry import Entry
from .packing import by_bucket, pack
from .tokens import Tokens

Rows = NDArray[np.float32]
Feed = dict[str, NDArray[np.int64]]


class Runner(Protocol):
    """Rows of output, float32 [width], for each text, or the error of the run that it was in."""

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


class SessionRunner:
    """ONNX Runtime in this process, batches packed by `packing.pack`.

    Where the CUDA provider is asked for or at hand and a run on it fails, the session is rebuilt on the CPU for good:
    ``fallback`` is true from then on.
    """

    def __init__(self, entry: Entry) -> None:
        self._entry, self._path = entry, entry.folder / "model.onnx"
        cuda = "CUDAExecutionProvider" in ort.get_available_providers()
        if entry.device == "cuda" and not cuda:
            raise EntryError("config.pbtxt: device is cuda, but this ONNX Runtime has no CUDA provider")
        self.fallback = False
        self.device = "cuda" if cuda and entry.device != "cpu" else "cpu"
        try:
            self._session = self._open()
        except Exception:
            if self.device == "cpu":
                raise
            self._to_cpu()

    def run(self, texts: Sequence[Tokens]) -> list[Rows | Exception]:
        """See `Runner`."""
        answers: list[Rows | Exception] = [RuntimeError("not run")] * len(texts)
        for batch in pack([len(text) for text in texts], self._entry.max_tokens_per_batch):
            rows = [texts[index] for index in batch]
            given = feed(rows, max(len(text) for text in rows), self._entry.pad, self._entry.inputs)
            try:
                output: list[Rows | Exception] = list(self._once(given))
            except Exception as error:  # one bad run ends its own texts, not their neighbours
                output = [error] * len(batch)
            for index, row in zip(batch, output, strict=True):
                answers[index] = row
        return answers

    def _once(self, given: Feed) -> Rows:
        try:
            rows: Rows = self._session.run([self._entry.output], given)[0]
        except Exception:
            if self.device == "cpu":
                raise
            self._to_cpu()
            rows = self._session.run([self._entry.output], given)[0]
        return rows

    def _to_cpu(self) -> None:
        self.device, self.fallback = "cpu", True
        self._session = self._open()

    def _open(self) -> ort.InferenceSession:
        options = ort.SessionOptions()
        options.intra_op_num_threads = self._entry.threads
        # The other instance computes while this one waits: a thread that spins would take its core away.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 3
        provider = "CUDAExecutionProvider" if self.device == "cuda" else "CPUExecutionProvider"
        # On the CPU the fused residual and layer norm takes longer than the two alone: an eighth of a run of MiniLM.
        slower = ["SkipLayerNormFusion"] if self.device == "cpu" else []
        return ort.InferenceSession(str(Path(self._path)), options, providers=[provider], disabled_optimizers=slower)


class EngineRunner:
    """Another model of this Triton runs the graph: one request a length bucket, which Triton batches with those of the
    other instances. One after the other: nothing says that a stub may ask from several threads at once.

    ``ask`` sends one request's inputs and returns its rows; it raises what went wrong.
    """

    device = "cpu"
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
                try:
                    output: list[Rows | Exception] = list(
                        self._ask(feed([texts[i] for i in indices], padded, entry.pad, entry.inputs))
                    )
                except Exception as error:  # its own texts' only
                    output = [error] * len(indices)
                for index, row in zip(indices, output, strict=True):
                    answers[index] = row
        return answers
