"""Less than 8 bits as numbers of entries in a table of 8-bit integers, finer near zero than far from it.

Inputs and weights are many near zero and few far from it, and levels that follow them lose about half of what even
levels lose (results/calibration.md). Known are sums of powers of two (APoT, Li et al. 2020, arXiv 1909.13144), floating
point of 4 bits (LLM-FP4, Liu et al. 2023, arXiv 2310.16836) and tables for weights (QLoRA, Dettmers et al. 2023,
arXiv 2305.14314). Here all entries of a table lie within 256 neighbouring integers, so that the arithmetic is that of
8-bit integers, once a table of 2^bits entries has unpacked what is stored. 8 bits are those of LSQ.
"""

import functools
import math

import torch
from torch import Tensor, nn

from common.config.schema import QuantizationConfig
from common.quantization.fake_quant import fake_quantize
from common.quantization.levels import rounding_errors, sums_of
from common.quantization.quantizers import lsq
from common.quantization.ranges import HIGH_SHRINKS, Range, stretched

SPAN = 255  # of the integers in a table, the largest less the smallest
NEGATIVES = 32  # so many numbers of negative codes of inputs are tried, at most
LARGEST = 127  # entry of a table for weights
CURVATURES = (0.0, 1.0, 2.0, 3.0)  # of the tables for weights; one more, of 4, gains 1 to 2 % (results/calibration.md)
WEIGHT_SHRINKS = torch.linspace(1.05, 0.3, 32)  # candidates: the largest magnitude times these
EXPONENTS = {  # an integer of the same size, and which bits of it are the exponent
    torch.float64: (torch.int64, 0x7FF << 52),
    torch.float32: (torch.int32, 0xFF << 23),
    torch.bfloat16: (torch.int16, 0xFF << 7),
    torch.float16: (torch.int16, 0x1F << 10),
}


def Quantizer(step_shape: tuple[int, ...], batched: bool) -> nn.Module:  # noqa: N802, the name of all quantizers
    """That of inputs where `batched`, else that of weights."""
    return Inputs(step_shape, batched) if batched else Weights(step_shape, batched)


class Inputs(lsq.Quantizer):
    """`step` times integers of at most `digits` significant binary digits, which are small floating-point numbers.

    In the state dict as LSQ, with `digits` last in `_extra_state`; 0 stands for even levels.
    """

    def __init__(self, step_shape: tuple[int, ...], batched: bool) -> None:
        super().__init__(step_shape, batched)
        self.digits = 0

    def start_input(self, sample: Tensor, bits: int, config: QuantizationConfig) -> str:
        """As LSQ, with the number of digits that gives the least squared error."""
        if bits >= 8 or config.scale_init == "lsq":
            self.digits = 0
            return super().start_input(sample, bits, config)
        found, self.digits = input_range(stretched(sample, config.range_headroom), bits, config.activation_range)
        self.start(found)
        return f"integers of {self.digits} binary digit{'s' * (self.digits > 1)}"

    def forward(self, x: Tensor) -> Tensor:
        if not self.initialised or not self.digits:
            return super().forward(x)
        rounding = functools.partial(round_to_digits, digits=self.digits)
        return fake_quantize(x, self.step.abs(), self.low, self.high, self.gradient_scale(x), rounding)

    def get_extra_state(self) -> Tensor:
        return torch.cat([super().get_extra_state(), torch.tensor([self.digits])])

    def set_extra_state(self, state: Tensor) -> None:
        super().set_extra_state(state)
        self.digits = int(state[3])


class Weights(lsq.Quantizer):
    """`step` times the entries of one of four tables, which each channel chooses.

    In the state dict as LSQ, with `tables`, the number of each channel's table, int64 of the shape of `step`, and the
    bits of a weight last in `_extra_state`; 8 stands for even levels.
    """

    tables: Tensor
    nearest: Tensor | None

    def __init__(self, step_shape: tuple[int, ...], batched: bool) -> None:
        super().__init__(step_shape, batched)
        self.register_buffer("tables", torch.zeros(step_shape, dtype=torch.long))
        self.register_buffer("nearest", None, persistent=False)
        self._take_bits(8)

    def _take_bits(self, bits: int) -> None:
        self.bits = bits
        self.nearest = nearest_entries(bits).to(self.step) if bits < 8 else None

    def start_weight(self, weight: Tensor, bits: int, axis: int, config: QuantizationConfig) -> None:
        """Takes over the tables and steps of least squared error, in place."""
        if bits >= 8 or config.scale_init == "lsq":
            self._take_bits(8)
            super().start_weight(weight, bits, axis, config)
            return
        per_channel = self.step.numel() > 1
        rows = weight.detach().transpose(0, axis).flatten(1) if per_channel else weight.detach().reshape(1, -1)
        step, tables = weight_tables(rows, bits)
        self._take_bits(bits)
        self.tables.copy_(tables.view_as(self.tables))
        self.start(Range(step.view_as(self.step), -LARGEST, LARGEST, step.new_zeros(1)))

    def levels(self) -> Tensor:
        """[channels, 2^bits] in steps, rising."""
        if self.nearest is None:
            return super().levels()
        return tables_of(self.bits).to(self.step)[self.tables.flatten()]

    def forward(self, x: Tensor) -> Tensor:
        if not self.initialised or self.nearest is None:
            return super().forward(x)
        return fake_quantize(x, self.step.abs(), self.low, self.high, self.gradient_scale(x), self._round)

    def _round(self, x: Tensor) -> Tensor:
        # Borders between entries are multiples of a half, so the half below x says which entry is nearest.
        halves = x.mul(2).floor_().add_(2 * LARGEST).clamp_(0, 4 * LARGEST).long()
        assert self.nearest is not None
        return self.nearest.flatten()[halves + self.tables * self.nearest.shape[1]]

    def get_extra_state(self) -> Tensor:
        return torch.cat([super().get_extra_state(), torch.tensor([self.bits])])

    def set_extra_state(self, state: Tensor) -> None:
        super().set_extra_state(state)
        self._take_bits(int(state[3]))


def round_to_digits(x: Tensor, digits: int) -> Tensor:
    """Rounds to integers of at most so many significant binary digits, half to even."""
    integer, exponent = EXPONENTS[x.dtype]
    # The highest power of two in x, which is what the bits of its exponent alone stand for.
    gap = (x.view(integer) & exponent).view(x.dtype).mul_(2.0 ** (1 - digits)).clamp_(min=1)
    return torch.div(x, gap).round_().mul_(gap)


def input_range(sample: Tensor, bits: int, kind: str) -> tuple[Range, int]:
    """The range of least squared error, without an offset, and the number of significant digits of its codes.

    Args:
        sample: float values [n] of which it is a fair part that holds the smallest and the largest one.
        bits: 2 to 7.
        kind: `unsigned` from zero, `signed` with as many codes below zero as above, or any other for as many as are
            best.
    """
    sums = sums_of(sample[None])
    values = sums[0][0]
    few = range(0, 2**bits, max(2**bits // NEGATIVES, 1))
    negatives = {"signed": [2 ** (bits - 1) - 1], "unsigned": [0]}.get(kind, few)
    least, found = float("inf"), (Range(sample.new_ones(1), 0, 1, sample.new_zeros(1)), 0)
    for digits in range(1, bits + 1):
        for below in negatives:
            codes = _input_codes(digits, below, below if kind == "signed" else 2**bits - 1 - below)
            ends = zip(values[[0, -1]], (codes[0], codes[-1]), strict=True)
            fits = max([0.0, *(float(end / code) for end, code in ends if code)])
            steps = (fits * HIGH_SHRINKS.to(values)).clamp(min=1e-8)
            error, index = rounding_errors(sums, torch.outer(steps, torch.tensor(codes).to(values))[None])[0].min(0)
            if error < least:
                least = float(error)
                found = Range(steps[index].to(sample).view(1), codes[0], codes[-1], sample.new_zeros(1)), digits
    return found


def _input_codes(digits: int, below: int, above: int) -> list[int]:
    """Zero and so many integers below and above it, of at most `digits` significant digits and within SPAN."""
    largest = SPAN // 2 if below == above else SPAN  # as many on both sides: half of SPAN for each
    numbers = [n for n in range(1, largest + 1) if n % (1 << max(n.bit_length() - digits, 0)) == 0]
    negative = [-n for n in reversed(numbers[:below])]
    last = SPAN + (negative[0] if negative else 0)
    return [*negative, 0, *(n for n in numbers[:above] if n <= last)]


@functools.cache
def tables_of(bits: int) -> Tensor:
    """The tables for weights, [4, 2^bits] rising integers: a hyperbolic sine of evenly spaced numbers around zero."""
    places = (torch.arange(2**bits, dtype=torch.float64) * 2 + 1 - 2**bits) / (2**bits - 1)  # -1 to 1
    curves = [torch.sinh(c * places) / math.sinh(c) if c else places for c in CURVATURES]
    return (torch.stack(curves) * LARGEST).round()


@functools.cache
def nearest_entries(bits: int) -> Tensor:
    """The entry of each table nearest to what lies from i / 2 - 127 on, below the next half, [4, 4 * 127 + 1]."""
    middles = (torch.arange(4 * LARGEST + 1, dtype=torch.float64) + 0.5) / 2 - LARGEST
    tables = tables_of(bits)
    return tables.gather(1, (tables[:, None] - middles[:, None]).abs().argmin(2))


def weight_tables(rows: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Steps and numbers of tables of least squared error for rows [r, n] of weights, [r] each."""
    sums = sums_of(rows)
    largest = sums[0][:, [0, -1]].abs().amax(1).clamp(min=1e-6)
    steps = torch.outer(largest, WEIGHT_SHRINKS.to(largest)) / LARGEST  # [r, candidates]
    tables = tables_of(bits).to(steps)
    errors = torch.stack([rounding_errors(sums, steps[..., None] * table) for table in tables], 1)
    best = errors.flatten(1).argmin(1)
    count = len(WEIGHT_SHRINKS)
    return steps.gather(1, (best % count)[:, None])[:, 0].to(rows), best // count
