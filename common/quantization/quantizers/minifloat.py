"""Inputs of few bits as the codes of 8-bit integers that have few significant binary digits.

Such codes are small floating-point numbers: every integer near zero, then ever fewer. They suit inputs, many of which
are near zero and few far from it, better than even levels do (floating point of 4 bits: LLM-FP4, Liu et al. 2023,
arXiv 2310.16836; sums of powers of two: APoT, Li et al. 2020, arXiv 1909.13144). All codes of a tensor lie within 256
neighbouring integers, so that the arithmetic is that of 8-bit integers, and a table of 2^bits entries unpacks what is
stored.
"""

import torch
from torch import Tensor

from common.config import QuantizationConfig
from common.quantization.fake_quant import fake_quantize
from common.quantization.quantizers import lsq
from common.quantization.ranges import HIGH_SHRINKS, Range, stretched

SPAN = 255  # of the codes of a tensor, the largest less the smallest
NEGATIVES = 32  # so many numbers of negative codes are tried, at most


class Quantizer(lsq.Quantizer):
    """Weights as LSQ; inputs of less than 8 bits as `step` times integers of at most `digits` significant digits.

    In the state dict as LSQ, with `digits` last in `_extra_state`; 0 stands for even levels.
    """

    def __init__(self, step_shape: tuple[int, ...], batched: bool) -> None:
        super().__init__(step_shape, batched)
        self.digits = 0

    def start_input(self, sample: Tensor, bits: int, config: QuantizationConfig) -> str:
        """As LSQ, with the number of digits that gives the least squared error."""
        if bits >= 8 or config.initial_step == "lsq":
            return super().start_input(sample, bits, config)
        found, self.digits = minifloat_range(stretched(sample, config.input_margin), bits, config.activation_range)
        self.start(found)
        return f"minifloat, {self.digits} digit{'s' * (self.digits > 1)}"

    def forward(self, x: Tensor) -> Tensor:
        if not self.initialised:
            return x
        return fake_quantize(x, self.step.abs(), self.low, self.high, self.gradient_scale(x), self.digits)

    def get_extra_state(self) -> Tensor:
        return torch.cat([super().get_extra_state(), torch.tensor([self.digits])])

    def set_extra_state(self, state: Tensor) -> None:
        super().set_extra_state(state)
        self.digits = int(state[3])


def minifloat_range(sample: Tensor, bits: int, kind: str) -> tuple[Range, int]:
    """The range of least squared error, without an offset, and the number of significant digits of its codes.

    Args:
        sample: float values [n] of which it is a fair part that holds the smallest and the largest one.
        bits: 2 to 7.
        kind: `unsigned` from zero, `signed` with as many codes below zero as above, or any other for as many as are
            best.
    """
    values = sample.double().sort().values
    zero = values.new_zeros(1)
    sums = [torch.cat([zero, x.cumsum(0)]) for x in (torch.ones_like(values), values, values.square())]
    few = range(0, 2**bits, max(2**bits // NEGATIVES, 1))
    negatives = {"signed": [2 ** (bits - 1) - 1], "unsigned": [0]}.get(kind, few)
    least, found = float("inf"), (Range(sample.new_ones(1), 0, 1, sample.new_zeros(1)), 0)
    for digits in range(1, bits + 1):
        for below in negatives:
            codes = _codes(digits, below, below if kind == "signed" else 2**bits - 1 - below)
            fits = max(
                [float(end / code) for end, code in zip(values[[0, -1]], (codes[0], codes[-1]), strict=True) if code]
            )
            steps = (max(fits, 0.0) * HIGH_SHRINKS.to(values)).clamp(min=1e-8)
            error, index = _errors(values, sums, torch.outer(steps, torch.tensor(codes).to(values))).min(0)
            if error < least:
                least = float(error)
                found = Range(steps[index].to(sample).view(1), codes[0], codes[-1], sample.new_zeros(1)), digits
    return found


def _codes(digits: int, below: int, above: int) -> list[int]:
    """Zero and so many integers below and above it, of at most `digits` significant digits and within SPAN."""
    largest = SPAN // 2 if below == above else SPAN
    numbers = [n for n in range(1, largest + 1) if n % (1 << max(n.bit_length() - digits, 0)) == 0]
    negative = [-n for n in reversed(numbers[:below])]
    last = SPAN + (negative[0] if negative else 0)
    return [*negative, 0, *(n for n in numbers[:above] if n <= last)]


def _errors(values: Tensor, sums: list[Tensor], levels: Tensor) -> Tensor:
    """Squared error [candidates] of rising values [n] rounded to the nearest of their levels [candidates, k].

    `sums`: number, sum and sum of squares of the first 0, 1, ..., n values, [n + 1] each.
    """
    borders = torch.searchsorted(values, (levels[:, 1:] + levels[:, :-1]) / 2)
    start = borders.new_zeros(len(levels), 1)
    borders = torch.cat([start, borders, start + len(values)], 1)
    count, total = (x[borders].diff(dim=1) for x in sums[:2])
    return sums[2][-1] + (levels * (levels * count - 2 * total)).sum(1)
