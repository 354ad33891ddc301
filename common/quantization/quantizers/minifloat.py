"""Minifloat grids for inputs of less than 8 bits: integers of at most p significand bits, times a scale.

Inputs behind SiLU are many near zero and few far from it, as are the numbers of small floating-point formats (LLM-FP4,
Liu et al. 2023, arXiv 2310.16836). Here all codes lie within 256 neighbouring integers, so that 8 bits hold them. With
at most four significand bits each code is a number of FP8 E4M3; two of them and 4 bits, signed, are E2M1.
"""

import functools

import torch
from torch import Tensor

from common.config.schema import QuantizationConfig
from common.quantization.fake_quant import fake_quantize
from common.quantization.quantizers import lsq
from common.quantization.ranges import HIGH_SHRINKS, Range, rounding_errors, sums_of, with_headroom

SPAN = 255  # the largest code less the smallest, at most
TRIED = 32  # numbers of negative codes, at most
EXPONENTS = {  # an integer type of the same size, and which of its bits are the exponent
    torch.float64: (torch.int64, 0x7FF << 52),
    torch.float32: (torch.int32, 0xFF << 23),
    torch.bfloat16: (torch.int16, 0xFF << 7),
    torch.float16: (torch.int16, 0x1F << 10),
}


class Quantizer(lsq.Quantizer):
    """|scale| times integers n = m 2^e of `low` to `high` whose significand m has at most `significand_bits` bits.

    The state dict is that of LSQ, with `significand_bits` last in `_extra_state`, 0 before the start.
    """

    def __init__(self, scale_shape: tuple[int, ...], batched: bool) -> None:
        super().__init__(scale_shape, batched)
        self.significand_bits = 0

    def start_input(self, sample: Tensor, bits: int, config: QuantizationConfig) -> str:
        """Takes over, in place, the scale, the significand bits and the range of least squared error for 2 to 7 bits.

        `sample` [n] holds the smallest and the largest input.
        """
        sample = with_headroom(sample, config.range_headroom)
        found, self.significand_bits = search_minifloat(sample, bits, config.activation_range)
        self.start(found)
        return f"minifloat of {self.significand_bits} significand bit{'s' * (self.significand_bits > 1)}"

    def forward(self, x: Tensor) -> Tensor:
        if not self.initialised:
            return x
        rounding = functools.partial(round_to_minifloat, significand_bits=self.significand_bits)
        return fake_quantize(x, self.scale.abs(), self.low, self.high, self.gradient_scale(x), rounding)

    def get_extra_state(self) -> Tensor:
        return torch.cat([super().get_extra_state(), torch.tensor([self.significand_bits])])

    def set_extra_state(self, state: Tensor) -> None:
        super().set_extra_state(state[:3])
        self.significand_bits = int(state[3])


def round_to_minifloat(x: Tensor, significand_bits: int) -> Tensor:
    """Rounds each value to the nearest integer of at most so many significand bits, half to even."""
    integer, exponent = EXPONENTS[x.dtype]
    # The highest power of two in x, which is what the bits of its exponent alone stand for.
    gap = (x.view(integer) & exponent).view(x.dtype).mul_(2.0 ** (1 - significand_bits)).clamp_(min=1)
    return torch.div(x, gap).round_().mul_(gap)


def search_minifloat(sample: Tensor, bits: int, kind: str) -> tuple[Range, int]:
    """The range of least squared error, without an offset, and the significand bits of its codes.

    Args:
        sample: float values [n] of which it is a fair part that holds the smallest and the largest one.
        bits: 2 to 7.
        kind: `unsigned` from zero, `symmetric` with as many codes below zero as above, `auto` with as many as are best.
    """
    sums = sums_of(sample[None])
    values = sums[0][0]
    few = range(0, 2**bits, max(2**bits // TRIED, 1))
    negatives = {"symmetric": [2 ** (bits - 1) - 1], "unsigned": [0]}.get(kind, few)
    least, found = float("inf"), (Range(sample.new_ones(1), 0, 1, sample.new_zeros(1)), 1)
    for significand_bits in range(1, bits + 1):
        for below in negatives:
            codes = minifloat_codes(significand_bits, below, below if kind == "symmetric" else 2**bits - 1 - below)
            ends = zip(values[[0, -1]], (codes[0], codes[-1]), strict=True)
            fits = max([0.0, *(float(end / code) for end, code in ends if code)])
            scales = (fits * HIGH_SHRINKS.to(values)).clamp(min=1e-8)
            error, index = rounding_errors(sums, torch.outer(scales, torch.tensor(codes).to(values))[None])[0].min(0)
            if error < least:
                least = float(error)
                best = Range(scales[index].to(sample).view(1), codes[0], codes[-1], sample.new_zeros(1))
                found = best, significand_bits
    return found


def minifloat_codes(significand_bits: int, below: int, above: int) -> list[int]:
    """Zero and so many integers below and above it, of at most `significand_bits` significand bits and within SPAN."""
    largest = SPAN // 2 if below == above else SPAN  # as many on both sides: half of SPAN for each
    numbers = [n for n in range(1, largest + 1) if n % (1 << max(n.bit_length() - significand_bits, 0)) == 0]
    negative = [-n for n in reversed(numbers[:below])]
    last = SPAN + (negative[0] if negative else 0)
    return [*negative, 0, *(n for n in numbers[:above] if n <= last)]
