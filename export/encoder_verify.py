"""Does the encoder's artefact compute what transformers computes? The final file, alone and in padded batches.

Texts of many lengths run through transformers one by one, without padding. The artefact sees each of them twice: alone,
and in batches of mixed lengths padded on the right as they are served. The largest difference between the two is the
batch effect: in fp32 padding and neighbours may not change a row. Attention over long texts takes memory with their
length squared, so the longer a batch's texts, the fewer it has; the longest has one neighbour at least.

Embeddings are compared at unit length, so that one tolerance fits checkpoints that do not normalise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime
import torch
from torch import nn

from export.encoder import IDS, MASK, TYPES
from export.errors import SourceError, VerificationError

FP32_MAX_DIFF = {"embedding": 1e-5, "logits": 1e-4}
FP32_MAX_BATCH_EFFECT = 1e-5  # of a number of at most 1, relative to the largest one beyond
# Root mean square of the error over the standard deviation of the reference.
MAX_RMS = {"fp32": 1e-3, "int8": 0.06}
BATCH = 8
FULL_BATCH_TOKENS = 512  # up to this length a batch has `BATCH` texts

Rows = npt.NDArray[np.float32]


@dataclass(frozen=True)
class EncoderReference:
    """Token ids of one text and what transformers makes of them, float32 [dim] or [labels]."""

    ids: tuple[int, ...]
    output: Rows


def lengths_to_check(max_len: int) -> tuple[int, ...]:
    """Text lengths worth checking, in tokens: tiny ones, both sides of powers of two, and the longest."""
    wanted = (1, 2, 3, 5, 7, 8, 9, 15, 17, 31, 33, 64, 100, 129, max_len - 1, max_len)
    return tuple(sorted({length for length in wanted if 1 <= length <= max_len}))


def run_reference(
    module: nn.Module, texts: Sequence[tuple[int, ...]], inputs: int, progress: Callable[[float], None]
) -> list[EncoderReference]:
    """Every text alone through the module in torch, ``inputs`` of its arguments given.

    Raises:
        SourceError: the checkpoint itself computes NaN or infinity.
    """
    references = []
    for index, text in enumerate(texts):
        ids = torch.tensor([text])
        arguments = (ids, torch.ones_like(ids), torch.zeros_like(ids))[:inputs]
        with torch.no_grad():
            output: Rows = module(*arguments)[0].numpy().copy()
        if not np.isfinite(output).all():
            raise SourceError(
                "The checkpoint itself computes NaN or infinite numbers.", "Its weights are damaged: fetch it again."
            )
        references.append(EncoderReference(text, output))
        progress((index + 1) / len(texts))
    return references


class EncoderRuntime:
    """ONNX Runtime over the final file. Raises whatever it raises when the file cannot be opened or a run fails."""

    def __init__(self, path: Path, pad: int) -> None:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self._names = {value.name for value in self._session.get_inputs()}
        self._pad = pad

    def run(self, texts: Sequence[tuple[int, ...]]) -> Rows:
        """One row of output a text, of texts padded to the longest one."""
        longest = max(len(text) for text in texts)
        ids = np.full((len(texts), longest), self._pad, np.int64)
        mask = np.zeros_like(ids)
        for row, text in enumerate(texts):
            ids[row, : len(text)], mask[row, : len(text)] = text, 1
        given = {IDS: ids, MASK: mask, TYPES: np.zeros_like(ids)}
        rows: Rows = self._session.run(None, {name: given[name] for name in self._names})[0]
        return rows


def verify(
    runtime: EncoderRuntime,
    references: Sequence[EncoderReference],
    output: str,
    precision: str,
    progress: Callable[[float], None] = lambda fraction: None,
) -> dict[str, Any]:
    """Run the artefact against the references and return the manifest's ``parity`` block.

    Raises:
        VerificationError: outside the tolerances of ``precision``, or a number was NaN or infinite.
    """
    texts = [reference.ids for reference in references]
    alone = []
    for index, text in enumerate(texts):
        alone.append(runtime.run([text])[0])
        progress(0.5 * (index + 1) / len(texts))
    # Neighbours of every length: short texts beside long ones, in an order that is not theirs.
    order = sorted(range(len(texts)), key=lambda index: (index % 3, -index))
    together: dict[int, Rows] = {}
    for batch in batches(order, [len(text) for text in texts]):
        together.update(zip(batch, runtime.run([texts[index] for index in batch]), strict=True))
        progress(0.5 + 0.5 * len(together) / len(order))
    expected = np.stack([reference.output for reference in references])
    parity = compare(np.stack(alone), np.stack([together[index] for index in range(len(texts))]), expected, output)
    parity |= {"lengths": [len(text) for text in texts], "longest": max(len(text) for text in texts)}
    judge(parity, output, precision)
    return parity


def most_pairs(max_len: int) -> int:
    """Pairs of tokens (rows × length²) of the largest batch that is run: what attention computes a score for."""
    return min(BATCH * max_len**2, max(BATCH * FULL_BATCH_TOKENS**2, 2 * max_len**2))


def batches(order: Sequence[int], lengths: Sequence[int]) -> Iterator[list[int]]:
    """Cut ``order``, indices into ``lengths``, into batches of at most `BATCH` texts and `most_pairs` pairs."""
    most = most_pairs(max(lengths))
    batch: list[int] = []
    for index in order:
        grown = [*batch, index]
        if len(grown) > BATCH or len(grown) * max(lengths[each] for each in grown) ** 2 > most:
            yield batch
            grown = [index]
        batch = grown
    yield batch


def compare(alone: Rows, together: Rows, expected: Rows, output: str) -> dict[str, Any]:
    """The figures of both runs, float32 [texts, numbers] each, against transformers'."""
    both = np.concatenate([alone, together]).astype(np.float64)
    nonfinite = int((~np.isfinite(both)).sum())
    truth = np.concatenate([expected, expected]).astype(np.float64)
    if output == "embedding":
        length = np.maximum(np.linalg.norm(truth, axis=1, keepdims=True), 1e-12)
        both, truth = both / length, truth / length
    half = len(alone)
    error = both - truth
    spread = float(truth.std())
    finite = nonfinite == 0
    return {
        "max_abs_diff": float(np.abs(error).max()) if finite else None,
        "rms_over_std": float(np.sqrt(np.square(error).mean()) / max(spread, 1e-12)) if finite else None,
        "batch_effect": float(np.abs(both[:half] - both[half:]).max()) if finite else None,
        "largest": float(np.abs(truth).max()),
        "nonfinite": nonfinite,
        "compared": len(both),
    }


def judge(parity: dict[str, Any], output: str, precision: str) -> None:
    """Raise `VerificationError` if the figures are outside the tolerances of ``precision``."""
    if parity["nonfinite"]:
        raise VerificationError(f"The exported graph computed {parity['nonfinite']} NaN or infinite numbers.", _HINT)
    difference, drift, effect = parity["max_abs_diff"], parity["rms_over_std"], parity["batch_effect"]
    if precision != "fp32":
        if not drift <= MAX_RMS[precision]:
            raise VerificationError(
                f"{precision} moves this model's {output} by {drift:.1%} of its spread "
                f"(allowed: {MAX_RMS[precision]:.0%}).",
                "Export it with --precision fp32.",
            )
        return
    if not (difference <= FP32_MAX_DIFF[output] and drift <= MAX_RMS[precision]):
        raise VerificationError(
            f"The exported {output} differs from transformers by {difference:.1e} (allowed: "
            f"{FP32_MAX_DIFF[output]:.0e}; relative {drift:.1e}, allowed {MAX_RMS[precision]:.0e}).",
            _HINT,
        )
    allowed = FP32_MAX_BATCH_EFFECT * max(1.0, parity["largest"])
    if not effect <= allowed:
        raise VerificationError(
            f"Padding and neighbours in a batch move the {output} by {effect:.1e} (allowed: {allowed:.0e}).",
            _HINT,
        )


_HINT = "Nothing was published. Please report the model's name: this is a fault of the exporter or of ONNX Runtime."
