"""From a float32 matrix to small integers and scales, with the smallest error that the format allows.

A matrix [inputs, outputs] is cut into blocks of consecutive inputs; each block of a column has one scale, by which the
largest weight becomes the largest integer. (Smaller scales, which clip the largest weights and represent the others
better, made the weights' error smaller; the logits of the demo model gained nothing by it.)

With a calibration text's second moments XᵀX the inputs are rounded one after the other, and the error that each makes
in the output is made up for by those still to come. That is kept only where it makes the output's error smaller.
Source: Frantar et al., GPTQ, https://arxiv.org/abs/2210.17323
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

# Share of the mean second moment that is added to each input's, so that the matrix can be inverted.
DAMPING = 0.01
# Inputs after which the made-up error is applied to all the later ones at once.
_LAZY = 128


@dataclass(frozen=True)
class Levels:
    """Integers ``low`` … ``high`` for blocks of ``block`` inputs (None: the whole column).

    ``signed_scale`` lets a scale be negative, so that the side that has one integer more takes the largest weight.
    """

    low: int
    high: int
    block: int | None = None

    @property
    def signed_scale(self) -> bool:
        """Whether there is one integer more below zero."""
        return -self.low != self.high


INT8 = Levels(-127, 127)


def rounded(
    weight: torch.Tensor, levels: Levels, moments: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Integers int8 [inputs, outputs] and scales float32 [blocks, outputs] for a float32 matrix [inputs, outputs].

    ``moments`` is the float32 [inputs, inputs] mean of xxᵀ over a calibration text, or None.
    """
    importance = torch.ones(weight.shape[0]) if moments is None else _importance(moments)
    plain, scales = _nearest(weight, levels, importance)
    if moments is None:
        return plain, scales
    compensated = _compensated(weight, scales, levels, moments, importance)
    error = _output_error(weight, plain, scales, levels, moments)
    better = _output_error(weight, compensated, scales, levels, moments) < error
    return (compensated if better else plain), scales


def restored(integers: torch.Tensor, scales: torch.Tensor, levels: Levels) -> torch.Tensor:
    """The float32 [inputs, outputs] matrix that integers and scales stand for."""
    return integers.float() * _spread(scales, levels, integers.shape[0])


def best_scales(block: torch.Tensor, levels: Levels, importance: torch.Tensor) -> torch.Tensor:
    """Scales [outputs] of one block [inputs, outputs]: the largest weight becomes the largest integer.

    Where one side of zero has an integer more, the largest weight may take that side, by a negative scale if need be;
    whichever has the smaller error, weighted by ``importance`` [inputs], is chosen for each column.
    """
    extreme = block.gather(0, block.abs().argmax(0, keepdim=True))[0]
    # A column of zeros gets the smallest scale instead of a division by zero.
    size = extreme.abs().clamp_min(torch.finfo(torch.float32).tiny * levels.high)
    near = size / levels.high
    if not levels.signed_scale:
        return near
    far = torch.where(extreme < 0, size, -size) / -levels.low

    def error(scale: torch.Tensor) -> torch.Tensor:
        integers = (block / scale).round_().clamp_(levels.low, levels.high)
        return integers.mul_(scale).sub_(block).square_().mul_(importance[:, None]).sum(0)

    return torch.where(error(far) < error(near), far, near)


def _importance(moments: torch.Tensor) -> torch.Tensor:
    diagonal = moments.diagonal()
    # An input that the text never used still has to be represented for texts that do.
    return diagonal.clamp_min(max(float(diagonal.mean()) * DAMPING, torch.finfo(torch.float32).tiny))


def _nearest(weight: torch.Tensor, levels: Levels, importance: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    size = levels.block or weight.shape[0]
    scales = torch.stack(
        [
            best_scales(weight[start : start + size], levels, importance[start : start + size])
            for start in range(0, weight.shape[0], size)
        ]
    )
    spread = _spread(scales, levels, weight.shape[0])
    return (weight / spread).round_().clamp_(levels.low, levels.high).to(torch.int8), scales


def _compensated(
    weight: torch.Tensor, scales: torch.Tensor, levels: Levels, moments: torch.Tensor, importance: torch.Tensor
) -> torch.Tensor:
    # The inputs that matter most go first, while there are most others to make up for their error.
    order = importance.argsort(descending=True)
    damped = moments.double()
    damped.diagonal().copy_(importance).add_(float(importance.mean()) * DAMPING)
    damped = damped[order][:, order]
    inverse = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True).float()
    left = weight[order]
    step = _spread(scales, levels, len(weight)).expand_as(weight)[order]
    integers = torch.empty_like(weight, dtype=torch.int8)
    for start in range(0, len(weight), _LAZY):
        end = min(start + _LAZY, len(weight))
        errors = torch.empty(end - start, weight.shape[1])
        for row in range(start, end):
            whole = (left[row] / step[row]).round_().clamp_(levels.low, levels.high)
            integers[order[row]] = whole.to(torch.int8)
            errors[row - start] = error = (left[row] - whole * step[row]) / inverse[row, row]
            left[row + 1 : end].addr_(inverse[row, row + 1 : end], error, alpha=-1)
        left[end:].addmm_(inverse[start:end, end:].T, errors, alpha=-1)
    return integers


def _output_error(
    weight: torch.Tensor, integers: torch.Tensor, scales: torch.Tensor, levels: Levels, moments: torch.Tensor
) -> float:
    """Mean squared error of the product over the calibration text: trace(Δᵀ E[xxᵀ] Δ)."""
    change = restored(integers, scales, levels).sub_(weight)
    return float((change * (moments @ change)).sum())


def _spread(scales: torch.Tensor, levels: Levels, inputs: int) -> torch.Tensor:
    if levels.block is None:
        return scales
    return scales.repeat_interleave(levels.block, 0)[:inputs]
