"""What range of numbers a quantizer covers, the search for a good one, and the error of rounding to levels."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from common.quantization.fake_quant import signed_codes, unsigned_codes, weight_codes

Function = Callable[[Tensor], Tensor]  # element by element

Kind = Literal["symmetric", "unsigned", "asymmetric"]
Method = Literal["mse", "lsq"]
WEIGHT_SHRINKS = torch.linspace(1.0, 0.05, 96)  # candidates: the largest magnitude times these
HIGH_SHRINKS = torch.logspace(0.0, -1.4, 57, base=10.0)
LOW_SHRINKS = torch.linspace(1.0, 0.0, 9)
ASYMMETRIC_SHRINKS = torch.linspace(1.0, 0.3, 36)  # of the scale whose codes reach the smallest and the largest weight
ZERO_POINTS = 15  # tried for asymmetric weights
AT_A_TIME = 2**22  # numbers of one search in memory
IN_CACHE = 2**16  # numbers that are rounded at once
VALUES_PER_CODE = 40  # up to so many it is quicker to round each value than to look up where each code begins: measured
HEADROOM_FACTORS = 8  # of `with_headroom`


def nearest(x: Tensor, levels: Tensor) -> Tensor:
    """The index of the nearest of the rising `levels` [..., k] for each value of x [..., n]: [..., n]."""
    return torch.searchsorted((levels[..., 1:] + levels[..., :-1]).div_(2), x.contiguous())


def sums_of(rows: Tensor, through: Function | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Rising values of rows [r, n] and the sums of the first 0, 1, ..., n of them and of their squares; float64.

    With `through` the sums are of what that function gives for the values.
    """
    values = rows.double().sort(1).values
    outputs = values if through is None else through(values)
    total, squares = (torch.nn.functional.pad(x.cumsum(1), (1, 0)) for x in (outputs, outputs.square()))
    return values, total, squares


def rounding_errors(sums: tuple[Tensor, Tensor, Tensor], levels: Tensor, through: Function | None = None) -> Tensor:
    """Squared error [r, candidates] of rows rounded to the nearest of rising levels [r, candidates, k].

    Args:
        sums: of the rows, from `sums_of`.
        levels: float.
        through: the function that `sums_of` had; the error is that of what it gives.
    """
    values, total, squares = sums
    rows, candidates, _ = levels.shape
    borders = torch.searchsorted(values, ((levels[..., 1:] + levels[..., :-1]) / 2).flatten(1))
    borders = torch.nn.functional.pad(borders.view(rows, candidates, -1), (1, 0))
    borders = torch.nn.functional.pad(borders, (0, 1), value=values.shape[1])
    levels = levels if through is None else through(levels)
    within = total.gather(1, borders.flatten(1)).view_as(borders).diff(dim=2)
    return squares[:, -1:] + (levels * (levels * borders.diff(dim=2) - 2 * within)).sum(2)


@dataclass(frozen=True)
class Range:
    """Codes `low` to `high` stand for code * scale + offset."""

    scale: Tensor  # positive, [out, 1, ...] or [1]
    low: int
    high: int
    offset: Tensor  # [1], or of the shape of `scale`


def weight_range(weight: Tensor, bits: int, per_channel: bool, method: Method, axis: int = 0) -> Range:
    """The symmetric range for weights [out, ...]; the scale is [out, 1, ...] or [1]; `axis` is that of `out`.

    `lsq` is 2 mean|w| / sqrt(Qp) (LSQ, section 2.1); `mse` the scale of least squared error among 96.
    """
    low, high = weight_codes(bits)
    weight = weight.transpose(0, axis)
    rows = weight.detach().flatten(1) if per_channel else weight.detach().reshape(1, -1)
    if method == "lsq":
        scale = _lsq_scale(rows, high)
    else:
        largest = rows.abs().amax(1)
        scales = largest * WEIGHT_SHRINKS.to(rows)[:, None] / high  # [candidates, rows]
        errors = torch.stack([_error(rows, s[:, None], low, high).sum(1) for s in _positive(scales)])
        scale = scales.gather(0, errors.argmin(0, keepdim=True))[0]
    shape = (-1, *[1] * (weight.ndim - 1)) if per_channel else (1,)
    scale = _positive(scale).view(shape)
    return Range(scale.transpose(0, axis) if per_channel else scale, low, high, weight.new_zeros(1))


def asymmetric_weight_range(weight: Tensor, bits: int, per_channel: bool, axis: int = 0) -> Range:
    """The range of least squared error with a zero point for each scale, so that zero has a code.

    Arguments as those of `weight_range`; the offset has the shape of the scale, of which it is a multiple. Channels
    are seldom alike on both sides of zero: 4 bits lose a quarter less than without a zero point.
    """
    low, high = signed_codes(bits)
    rows = weight.detach().transpose(0, axis)
    rows = rows.flatten(1) if per_channel else rows.reshape(1, -1)
    # Zero points that leave at least one code on either side of zero, evenly spaced.
    zeros = torch.linspace(low + 1, high - 1, min(ZERO_POINTS, 2**bits - 2)).round().to(rows.device).double()
    candidates = len(zeros) * len(ASYMMETRIC_SHRINKS)
    parts = rows.split(max(AT_A_TIME // (candidates * 2**bits), 1))
    found = [_affine(part, zeros, low, high) for part in parts]
    scale, zero = (torch.cat(parts).to(rows) for parts in zip(*found, strict=True))
    shape = (-1, *[1] * (weight.ndim - 1)) if per_channel else (1,)
    scale, zero = (x.view(shape).transpose(0, axis) if per_channel else x for x in (_positive(scale), zero))
    return Range(scale, low, high, -zero * scale)


def _affine(rows: Tensor, zeros: Tensor, low: int, high: int) -> tuple[Tensor, Tensor]:
    """Scales [r] and zero points [r] of least squared error for rows [r, n], of zero points [z]; float64."""
    smallest, largest = rows.amin(1, keepdim=True).double(), rows.amax(1, keepdim=True).double()
    reaching = torch.maximum(largest / (high - zeros), smallest / (low - zeros))  # [r, z]
    scales = _positive(reaching[..., None] * ASYMMETRIC_SHRINKS.to(reaching))  # [r, z, shrinks]
    if rows.shape[1] < VALUES_PER_CODE * (high - low + 1):
        errors = _errors_by_rounding(rows, scales, zeros, low, high)
    else:
        levels = torch.arange(low, high + 1).to(zeros) - zeros[:, None, None]  # [z, 1, codes]
        errors = rounding_errors(sums_of(rows), (scales[..., None] * levels).flatten(1, 2))
    best = errors.argmin(1)
    return scales.flatten(1).gather(1, best[:, None])[:, 0], zeros[best // len(ASYMMETRIC_SHRINKS)]


def _errors_by_rounding(rows: Tensor, scales: Tensor, zeros: Tensor, low: int, high: int) -> Tensor:
    """Errors [r, z * shrinks] of rows [r, n] at scales [r, z, shrinks]; rounds every value, a few rows at a time."""
    errors = torch.empty_like(scales)
    step = max(IN_CACHE // (scales.shape[2] * rows.shape[1]), 1)
    for part, found, of in zip(rows.split(step), errors.split(step), scales.to(rows).split(step), strict=True):
        for index, zero in enumerate(zeros.tolist()):
            scale = of[:, index, :, None]
            levels = (part[:, None] / scale).round_().clamp_(low - zero, high - zero).mul_(scale)
            found[:, index] = torch.linalg.vector_norm(levels.sub_(part[:, None]), dim=2)
    return errors.flatten(1)


def activation_range(
    sample: Tensor, bits: int, kind: Kind, method: Method, integer_offset: bool, through: Function | None = None
) -> Range:
    """The range for values of which `sample` [n] is a fair part that holds the smallest and the largest one.

    Args:
        sample: float values.
        bits: 2 to 8.
        kind: `symmetric` around zero, `unsigned` from zero, or `asymmetric` between any two numbers.
        method: `mse` for the least squared error, `lsq` for 2 mean|x| / sqrt(Qp) without an offset.
        integer_offset: whether the offset must be a multiple of the scale (a zero point), so that zero has a code.
        through: what reads the values, element by element; errors are measured behind it.
    """
    low, high = signed_codes(bits) if kind == "symmetric" else unsigned_codes(bits)
    zero = sample.new_zeros(1)
    if method == "lsq":
        return Range(_positive(_lsq_scale(sample[None], high)), low, high, zero)
    sums = sums_of(sample[None], through)
    if kind != "asymmetric":
        largest = torch.maximum(sample.max() / high, sample.min() / low if low else zero[0])
        scales = _positive(largest * HIGH_SHRINKS.to(sample))
        best = _least(sums, scales, torch.zeros_like(scales), low, high, through)
        return Range(scales[best].view(1), low, high, zero)
    top, bottom = sample.max().clamp(min=0), sample.min().clamp(max=0)
    offsets = (bottom * LOW_SHRINKS.to(sample)).repeat_interleave(len(HIGH_SHRINKS))
    scales = _positive(((top * HIGH_SHRINKS.to(sample)).repeat(len(LOW_SHRINKS)) - offsets) / high)
    if integer_offset:
        offsets = (offsets / scales).round() * scales
    best = _least(sums, scales, offsets, low, high, through)
    return Range(scales[best].view(1), low, high, offsets[best].view(1))


def _least(
    sums: tuple[Tensor, Tensor, Tensor], scales: Tensor, offsets: Tensor, low: int, high: int, through: Function | None
) -> Tensor:
    """The index of the candidate range (scale [c], offset [c]) of least squared error."""
    codes = torch.arange(low, high + 1).to(scales)
    levels = codes * scales[:, None] + offsets[:, None]
    return rounding_errors(sums, levels[None].double(), through)[0].argmin()


def with_headroom(sample: Tensor, headroom: float) -> Tensor:
    """The values [n] of a sample in random order, each times one of eight factors, evenly spaced from 1 to `headroom`.

    A range searched on them holds for inputs up to so many times as large. The search weighs rounding against clipping,
    so that many bits get more headroom than few.
    """
    factors = torch.linspace(1, headroom, HEADROOM_FACTORS).to(sample)
    return sample * factors.repeat(-(-len(sample) // HEADROOM_FACTORS))[: len(sample)]


def _lsq_scale(rows: Tensor, high: int) -> Tensor:
    return 2 * rows.abs().mean(1) / math.sqrt(high)


def _positive(scale: Tensor) -> Tensor:
    return scale.clamp(min=1e-8)


def _error(x: Tensor, scale: Tensor, low: int, high: int) -> Tensor:
    return ((x / scale).round_().clamp_(low, high) * scale - x).square_()
