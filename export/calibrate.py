"""A calibration text: which inputs of each weight matrix matter, measured on text like the model will see.

The fp32 graph reads the text in windows, each from an empty cache, and the mean of xxᵀ over all positions is kept for
what every matrix multiplies (`export.rounding` says what for). Of the text itself nothing is kept but its hash.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime
from onnxscript import ir

from export.errors import ExportError
from export.optimize import save

MAX_BYTES = 16_000_000
MAX_TOKENS = 16_384
MIN_TOKENS = 128
WINDOW = 256
# Second moments held at once; a large model reads the text once for every group of matrices that fits.
MOMENT_BYTES = 1_000_000_000

_GIVE = "Give a plain text file."

Moments = dict[str, npt.NDArray[np.float32]]


class CalibrationError(ExportError):
    """The calibration text cannot be used."""


@dataclass(frozen=True)
class CalibrationText:
    """Windows of token ids and where they are from; ``tokens`` is how many there are in all."""

    windows: tuple[tuple[int, ...], ...]
    sha256: str

    @property
    def tokens(self) -> int:
        """Tokens that are read."""
        return sum(len(window) for window in self.windows)

    def manifest(self) -> dict[str, Any]:
        """What the manifest says about it."""
        return {"sha256": self.sha256, "tokens": self.tokens}


def read_text(path: Path, encode: Callable[[str], Sequence[int]], vocab_size: int, max_len: int) -> CalibrationText:
    """Tokenise a UTF-8 file; windows are spread evenly over a text that has more than `MAX_TOKENS`.

    Raises:
        CalibrationError: the file is too large, no UTF-8, or too short to say anything.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise CalibrationError(f"The calibration text {path} cannot be read: {error.strerror}.", _GIVE) from error
    if len(content) > MAX_BYTES:
        raise CalibrationError(
            f"The calibration text {path} is larger than {MAX_BYTES // 1_000_000} MB.",
            f"Give a sample of it: {MAX_TOKENS} tokens are read at most.",
        )
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CalibrationError(f"The calibration text {path} is not UTF-8 (byte {error.start}).", _GIVE) from error
    tokens = [token for token in encode(text) if token < vocab_size]
    if len(tokens) < MIN_TOKENS:
        raise CalibrationError(
            f"The calibration text {path} has {len(tokens)} tokens; at least {MIN_TOKENS} are needed.",
            "Give a few pages of text like the model will see.",
        )
    size = min(WINDOW, max_len)
    starts = range(0, len(tokens) - size + 1, size) if len(tokens) >= size else range(1)
    chosen = np.linspace(0, len(starts) - 1, min(len(starts), MAX_TOKENS // size)).round().astype(int)
    windows = tuple(tuple(tokens[starts[index] : starts[index] + size]) for index in chosen)
    return CalibrationText(windows, hashlib.sha256(content).hexdigest())


@dataclass(frozen=True)
class Calibration:
    """A text to run, and an empty place for the fp32 graph that runs it."""

    text: CalibrationText
    folder: Path

    def moments(self, model: ir.Model, sources: Sequence[ir.Value]) -> Iterator[Moments]:
        """Mean xxᵀ float32 [inputs, inputs] of each source, by name, in groups that fit into `MOMENT_BYTES`.

        The graph is read before the first group is yielded; it may be changed from then on.
        """
        observed = {str(source.name): _before_gather(source) for source in sources}
        self.folder.mkdir(parents=True)
        try:
            outputs = list(dict.fromkeys(observed.values()))
            model.graph.outputs.extend(outputs)
            try:
                save(model, self.folder)
            finally:
                del model.graph.outputs[-len(outputs) :]
            names = {source: str(value.name) for source, value in observed.items()}
            widths = {str(value.name): int(value.shape[-1]) for value in outputs}
            session = onnxruntime.InferenceSession(
                str(self.folder / "model.onnx"), _options(), providers=["CPUExecutionProvider"]
            )
            for group in _groups(names, widths):
                measured = self._measure(session, {names[source]: widths[names[source]] for source in group})
                yield {source: measured[names[source]] for source in group}
        finally:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _measure(self, session: onnxruntime.InferenceSession, widths: dict[str, int]) -> Moments:
        sums = {name: np.zeros((width, width), np.float32) for name, width in widths.items()}
        empty = {
            value.name: np.zeros((1, *value.shape[1:]), np.float32)
            for value in session.get_inputs()
            if value.name.startswith("past_")
        }
        for window in self.text.windows:
            count = len(window)
            step = {
                "input_ids": np.asarray([window], np.int64),
                "position_ids": np.arange(count, dtype=np.int64)[None],
                "seqlens_k": np.asarray([count - 1], np.int32),
                "total_sequence_length": np.asarray(count, np.int32),
                "last_index": np.asarray([[count - 1]], np.int64),
            }
            for name, value in zip(sums, session.run(list(sums), {**step, **empty}), strict=True):
                rows = value.reshape(-1, value.shape[-1])
                sums[name] += rows.T @ rows / np.float32(self.text.tokens)
        return sums


def _before_gather(source: ir.Value) -> ir.Value:
    # The output embeddings see one position a row; before the gather there are all of them.
    node = source.producer()
    if node is not None and node.op_type == "Reshape" and node.inputs[0] is not None:
        node = node.inputs[0].producer()
    if node is not None and node.op_type == "GatherElements" and node.inputs[0] is not None:
        return node.inputs[0]
    return source


def _groups(names: dict[str, str], widths: dict[str, int]) -> Iterator[list[str]]:
    group: list[str] = []
    held = 0
    for source, name in names.items():
        size = 4 * widths[name] ** 2
        if group and held + size > MOMENT_BYTES:
            yield group
            group, held = [], 0
        group.append(source)
        held += size
    yield group


def _options() -> onnxruntime.SessionOptions:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return options
