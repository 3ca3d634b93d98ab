"""Does the artefact compute what transformers computes? The final file, in slots, the way that it will be served.

Three runs over the same references, all of them fed with the reference's tokens:

1. *interleaved*: prompts arrive one after the other and are prefilled in chunks while those before them decode in one
   batch of mixed lengths; finished sequences leave holes that are filled by moving slots;
2. *fresh batch*: prompts of different lengths prefilled in one padded batch, then decoded together;
3. *alone*: the same prompts in batches of one; the largest difference to run 2 is the batch effect.

Greedy agreement is the share of positions whose most likely token is the reference's. As long as it is 1.0, feeding the
reference's tokens and running free are the same thing. Where the reference itself prefers its token by less than twice
the fp32 tolerance, another choice is a tie, not a disagreement.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from export.errors import VerificationError
from export.precision import INT4_DRIFT, TABLE
from export.reference import Reference
from export.runtime import Logits, SlotRuntime

FP32_MAX_DIFF = 1e-4
# Tiny checkpoints have tiny logits, for which an absolute bound alone would prove little.
FP32_MAX_RMS = 1e-3
BATCH = 8


@dataclass
class Comparison:
    """Running totals over every compared row of logits."""

    rows: int = 0
    max_abs: float = 0.0
    squared: float = 0.0
    variance: float = 0.0
    agreed: int = 0
    nonfinite: int = 0
    batch_effect: float = 0.0
    lengths: set[int] = field(default_factory=set)

    def add(self, logits: npt.NDArray[np.float32], expected: npt.NDArray[np.float32], length: int) -> None:
        """Compare one row [vocab] at ``length`` tokens with the reference's."""
        self.rows += 1
        self.lengths.add(length)
        finite = np.isfinite(logits)
        self.nonfinite += int(finite.size - finite.sum())
        if not finite.all():
            return
        difference = logits.astype(np.float64) - expected
        self.max_abs = max(self.max_abs, float(np.abs(difference).max()))
        self.squared += float(np.square(difference).mean())
        self.variance += float(expected.astype(np.float64).var())
        gap = float(expected.max() - expected[int(logits.argmax())])
        self.agreed += gap <= 2 * FP32_MAX_DIFF

    @property
    def rms_over_std(self) -> float:
        """Root mean square of the logits' error over the standard deviation of the reference's logits."""
        return float(np.sqrt(self.squared / self.variance)) if self.variance else 0.0

    @property
    def greedy_agreement(self) -> float:
        """Share of rows whose most likely token is the reference's."""
        return self.agreed / self.rows if self.rows else 0.0

    def parity(self, prompts: Sequence[int]) -> dict[str, Any]:
        """The manifest's ``parity`` block."""
        return {
            "max_abs_logit_diff": self.max_abs,
            "rms_over_std": self.rms_over_std,
            "greedy_agreement": self.greedy_agreement,
            "batch_effect": self.batch_effect,
            "nonfinite": self.nonfinite,
            "compared": self.rows,
            "lengths": sorted(prompts),
            "longest": max(self.lengths, default=0),
        }


def verify(
    runtime: SlotRuntime,
    references: Sequence[Reference],
    precision: str,
    chunk: int,
    progress: Callable[[float], None] = lambda fraction: None,
    allow_drift: float | None = None,
) -> dict[str, Any]:
    """Run the artefact against the references and return the ``parity`` block.

    Raises:
        VerificationError: outside the tolerances of ``precision``, or any logit was NaN or infinite.
    """
    comparison = Comparison()
    interleaved(runtime, references, chunk, comparison)
    progress(0.5)
    short = _short(runtime, references, chunk)
    together = fresh_batch(runtime, short, comparison)
    progress(0.75)
    for row, reference in enumerate(short):
        alone = fresh_batch(runtime, [reference], comparison)[:, 0]
        comparison.batch_effect = max(comparison.batch_effect, float(np.abs(alone - together[:, row]).max()))
    progress(1.0)
    parity = comparison.parity([len(reference.prompt) for reference in references])
    judge(parity, precision, allow_drift)
    return parity


def exercise(runtime: SlotRuntime, references: Sequence[Reference], chunk: int) -> None:
    """Run every length and batch size that `verify` runs, without comparing (`export.scan` watches)."""
    comparison = Comparison()
    interleaved(runtime, references, chunk, comparison)
    fresh_batch(runtime, _short(runtime, references, chunk), comparison)


def _short(runtime: SlotRuntime, references: Sequence[Reference], chunk: int) -> list[Reference]:
    return [reference for reference in references if len(reference.prompt) <= chunk][: min(BATCH, runtime.slots)]


def judge(parity: dict[str, Any], precision: str, allow_drift: float | None = None) -> None:
    """Raise `VerificationError` if the figures are outside the tolerances of ``precision``.

    ``allow_drift`` raises int4's bound on rms(Δlogit)/std(logit) above `INT4_DRIFT`.
    """
    if parity["nonfinite"]:
        raise VerificationError(f"The exported graph computed {parity['nonfinite']} NaN or infinite logits.", _HINT)
    difference, drift, agreement = parity["max_abs_logit_diff"], parity["rms_over_std"], parity["greedy_agreement"]
    allowed = TABLE[precision].max_drift
    if precision == "fp32":
        if not (difference <= FP32_MAX_DIFF and drift <= FP32_MAX_RMS):
            raise VerificationError(
                f"The exported logits differ from transformers by {difference:.1e} (allowed: {FP32_MAX_DIFF:.0e}; "
                f"relative {drift:.1e}, allowed {FP32_MAX_RMS:.0e}).",
                _HINT,
            )
        if agreement < 1.0:
            raise VerificationError(f"Only {agreement:.1%} of the greedy tokens agree with transformers.", _HINT)
    elif allowed is None:
        _judge_int4(drift, max(INT4_DRIFT, allow_drift or 0.0))
    elif not drift <= allowed:
        raise VerificationError(
            f"{precision} moves this model's logits by {drift:.1%} of their spread (allowed: {allowed:.0%}).",
            "Export it with --precision fp32.",
        )


def _judge_int4(drift: float, allowed: float) -> None:
    if not drift <= allowed:
        # Rounded up, so that the flag as printed lets it pass.
        enough = math.ceil(drift * 100) / 100 if math.isfinite(drift) else drift
        # Beyond 1 there is no such flag: the logits would be noise.
        flag = f"--allow-drift {enough:.2f} to publish it all the same, " if enough <= 1 else ""
        raise VerificationError(
            f"int4 moves this model's logits by {drift:.1%} of their spread (allowed: {allowed:.0%}).",
            f"Give --calibrate FILE with text like the model's to lower it, {flag}or --precision int8.",
        )


def interleaved(runtime: SlotRuntime, references: Sequence[Reference], chunk: int, comparison: Comparison) -> None:
    """Chunked prefill of one sequence between decode steps of all the others, slots kept dense."""
    waiting = list(references)[::-1]
    active: list[_Running] = []
    filling: _Running | None = None
    while waiting or active or filling:
        if filling is None and waiting and len(active) < runtime.slots:
            filling = _Running(waiting.pop())
        if filling is not None:
            logits = filling.prefill(runtime, slot=len(active), chunk=chunk)
            if logits is not None:
                filling.compare(logits, comparison)
                active.append(filling)
                filling = None
        if not active:
            continue
        rows = runtime.decode([running.next_token for running in active], [running.past for running in active])
        for running, logits in zip(active, rows, strict=True):
            running.past += 1
            running.compare(logits, comparison)
        for hole in reversed([row for row, running in enumerate(active) if running.finished]):
            last = len(active) - 1
            if hole != last:
                runtime.move(last, hole, active[last].past)
            active[hole] = active[last]
            active.pop()
            if filling is not None:
                runtime.move(last + 1, last, filling.past)


def fresh_batch(runtime: SlotRuntime, references: Sequence[Reference], comparison: Comparison) -> Logits:
    """Prefill all prompts in one padded batch, then decode them together; logits [steps + 1, rows, vocab]."""
    steps = [runtime.prefill_fresh([reference.prompt for reference in references])]
    count = len(references[0].tokens)
    for step in range(count):
        tokens = [reference.tokens[step] for reference in references]
        steps.append(runtime.decode(tokens, [len(reference.prompt) + step for reference in references]))
    for step, rows in enumerate(steps):
        for reference, logits in zip(references, rows, strict=True):
            comparison.add(logits, reference.logits[step], len(reference.prompt) + step)
    return np.stack(steps)


class _Running:
    """One reference on its way through the slots."""

    def __init__(self, reference: Reference) -> None:
        self.reference = reference
        self.past = 0
        self._compared = 0

    @property
    def next_token(self) -> int:
        return self.reference.tokens[self.past - len(self.reference.prompt)]

    @property
    def finished(self) -> bool:
        return self._compared == len(self.reference.logits)

    def prefill(self, runtime: SlotRuntime, slot: int, chunk: int) -> Logits | None:
        """Run the next chunk; the logits once the prompt is complete."""
        tokens = self.reference.prompt[self.past : self.past + chunk]
        logits = runtime.prefill(slot, tokens, self.past)
        self.past += len(tokens)
        return logits if self.past == len(self.reference.prompt) else None

    def compare(self, logits: npt.NDArray[np.float32], comparison: Comparison) -> None:
        comparison.add(logits, self.reference.logits[self._compared], self.past)
        self._compared += 1


_HINT = "Nothing was published. Please report the model's name: this is a fault of the exporter or of ONNX Runtime."
