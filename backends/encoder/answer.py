"""From the graph's rows to what is answered: scores and labels; what is not finite is an error, never a number."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ..inflight.errors import EngineError, Internal, InvalidArgument

Rows = NDArray[np.float32]

NONFINITE = "the model computed numbers that are not finite (NaN or infinity)"
UNKNOWN = "indices element out of data bounds"  # as ONNX Runtime says of an id beyond the embedding table


def gathered(rows: Sequence[Rows | Exception], width: int) -> Rows | EngineError:
    """One request's rows as float32 [texts, width], or why there are none."""
    for number, row in enumerate(rows):
        if isinstance(row, Exception) and UNKNOWN in str(row):
            return InvalidArgument(f"text_input[{number}] has a token that the model's embedding table does not have")
        if isinstance(row, EngineError):
            return row
        if isinstance(row, Exception):
            return Internal(f"the run of text_input[{number}] failed: {type(row).__name__}: {row}")
        if row.shape != (width,):
            return Internal(f"the model answered {row.shape} numbers for text_input[{number}], not {width}")
        if not np.isfinite(row).all():
            return Internal(f"text_input[{number}]: {NONFINITE}")
    return np.stack([np.asarray(row, np.float32) for row in rows])


def scores(logits: Rows, problem: str) -> Rows:
    """Scores of logits [texts, labels]: softmax, sigmoid for ``multi_label``, as they are for ``regression``."""
    if problem == "regression":
        return logits
    wide = logits.astype(np.float64)
    if problem == "multi_label":
        result = 1 / (1 + np.exp(-np.clip(wide, -700, 700)))
    else:
        powers = np.exp(wide - wide.max(axis=1, keepdims=True))
        result = powers / powers.sum(axis=1, keepdims=True)
    return result.astype(np.float32)


def best_labels(rows: Rows, labels: Sequence[str]) -> list[str]:
    """The label of each row's highest score."""
    return [labels[int(index)] for index in rows.argmax(axis=1)]
