"""What range of numbers a quantizer covers, and the search for a good one."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from common.quantization.fake_quant import signed_codes, unsigned_codes

Kind = Literal["signed", "unsigned", "affine"]
Method = Literal["mse", "lsq"]
WEIGHT_SHRINKS = torch.linspace(1.0, 0.05, 96)  # candidates: the largest magnitude times these
HIGH_SHRINKS = torch.logspace(0.0, -1.4, 57, base=10.0)
LOW_SHRINKS = torch.linspace(1.0, 0.0, 9)
STRETCHES = 8  # factors of `stretched`


@dataclass(frozen=True)
class Range:
    """Codes `low` to `high` stand for (code * step + offset)."""

    step: Tensor  # positive
    low: int
    high: int
    offset: Tensor  # one element


def weight_range(weight: Tensor, bits: int, per_channel: bool, method: Method, axis: int = 0) -> Range:
    """The symmetric signed range for weights [out, ...]; the step is [out, 1, ...] or [1]; `axis` is that of `out`.

    `lsq` is 2 mean|w| / sqrt(Qp) (LSQ, section 2.1); `mse` the step of least squared error among 96.
    """
    low, high = signed_codes(bits)
    weight = weight.transpose(0, axis)
    rows = weight.detach().flatten(1) if per_channel else weight.detach().reshape(1, -1)
    if method == "lsq":
        step = _lsq_step(rows, high)
    else:
        largest = rows.abs().amax(1)
        steps = largest * WEIGHT_SHRINKS.to(rows)[:, None] / high  # [candidates, rows]
        errors = torch.stack([_error(rows, s[:, None], low, high).sum(1) for s in _positive(steps)])
        step = steps.gather(0, errors.argmin(0, keepdim=True))[0]
    shape = (-1, *[1] * (weight.ndim - 1)) if per_channel else (1,)
    step = _positive(step).view(shape)
    return Range(step.transpose(0, axis) if per_channel else step, low, high, weight.new_zeros(1))


def activation_range(sample: Tensor, bits: int, kind: Kind, method: Method, integer_offset: bool) -> Range:
    """The range for values of which `sample` [n] is a fair part that holds the smallest and the largest one.

    Args:
        sample: float values.
        bits: 2 to 8.
        kind: `signed` around zero, `unsigned` from zero, or `affine` between any two numbers.
        method: `mse` for the least squared error, `lsq` for 2 mean|x| / sqrt(Qp) without an offset.
        integer_offset: whether the offset must be a whole number of steps, so that zero has a code.
    """
    low, high = signed_codes(bits) if kind == "signed" else unsigned_codes(bits)
    zero = sample.new_zeros(1)
    if method == "lsq":
        return Range(_positive(_lsq_step(sample[None], high)), low, high, zero)
    if kind != "affine":
        largest = torch.maximum(sample.max() / high, sample.min() / low if low else zero[0])
        steps = _positive(largest * HIGH_SHRINKS.to(sample))
        errors = torch.stack([_error(sample, s, low, high).sum() for s in steps])
        return Range(steps[errors.argmin()].view(1), low, high, zero)
    return _affine(sample, low, high, integer_offset)


def stretched(sample: Tensor, margin: float) -> Tensor:
    """The values [n] of a sample in random order, each times one of eight factors that are even in [1, `margin`].

    A range that is searched for them holds for images up to so many times as strong. What that costs in rounding, the
    search weighs against what it saves in cut-off values, so that many bits get more room than few.
    """
    factors = torch.linspace(1, margin, STRETCHES).to(sample)
    return sample * factors.repeat(-(-len(sample) // STRETCHES))[: len(sample)]


def _affine(sample: Tensor, low: int, high: int, integer_offset: bool) -> Range:
    top, bottom = sample.max().clamp(min=0), sample.min().clamp(max=0)
    candidates, errors = [], []
    for shrink_low in LOW_SHRINKS.tolist():
        for shrink_high in HIGH_SHRINKS.tolist():
            offset = bottom * shrink_low
            step = _positive((top * shrink_high - offset) / high)
            if integer_offset:
                offset = (offset / step).round() * step
            candidates.append((step, offset))
            errors.append(_error(sample - offset, step, low, high).sum())
    step, offset = candidates[int(torch.stack(errors).argmin())]  # one look at the end: each waits for a GPU
    return Range(step.view(1), low, high, offset.view(1))


def _lsq_step(rows: Tensor, high: int) -> Tensor:
    return 2 * rows.abs().mean(1) / math.sqrt(high)


def _positive(step: Tensor) -> Tensor:
    return step.clamp(min=1e-8)


def _error(x: Tensor, step: Tensor, low: int, high: int) -> Tensor:
    return ((x / step).round_().clamp_(low, high) * step - x).square_()
