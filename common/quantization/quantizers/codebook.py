"""Codebooks for weights of less than 8 bits: codes are indices into 2^b INT8 entries, dense near zero, sparse far out.

Weights are many near zero and few far from it; levels that follow them lose about half of what uniform ones lose
(docs/quantizers.md). Known relatives are sums of powers of two (APoT, Li et al. 2020, arXiv 1909.13144) and NF4 (QLoRA,
Dettmers et al. 2023, arXiv 2305.14314). Here all entries are integers of -127 to 127, so that after a look-up the
arithmetic is that of INT8; with at most four significand bits they are numbers of FP8 E4M3 as well.
"""

import functools

import torch
from torch import Tensor

from common.config.schema import QuantizationConfig
from common.quantization.fake_quant import fake_quantize
from common.quantization.quantizers import lsq
from common.quantization.quantizers.minifloat import round_to_minifloat
from common.quantization.ranges import AT_A_TIME, Range, rounding_errors, sums_of

LARGEST = 127  # entry of a codebook at most
SIGNIFICAND_BITS = {"int8": 7, "fp8": 4}  # of the entries; four of them are exact in INT8 and in FP8 E4M3
CURVATURES = (0.0, 1.0, 2.0, 3.0)  # of the codebooks; a fifth, of 4, lowers the error by 1 to 2 % more
# In entries, from the middle of the curve: most channels reach further on one side of zero than on the other.
SHIFTS = (0.0, *(sign * step / 2 for step in range(1, 7) for sign in (1, -1)))
SHRINKS = torch.linspace(1.05, 0.2, 28)  # candidates of the scale that reaches all weights, times these


class Quantizer(lsq.Quantizer):
    """|scale| times the nearest entry of one of 52 fixed codebooks, which each channel chooses when it is started.

    The state dict is that of LSQ with `codebook_index` (int64, 0 to 51, of the shape of `scale`). In `_extra_state` the
    bits of a code follow, 0 before the start, and the significand bits of the entries unless they are those of INT8.
    """

    codebook_index: Tensor
    nearest: Tensor | None

    def __init__(self, scale_shape: tuple[int, ...], batched: bool) -> None:
        super().__init__(scale_shape, batched)
        self.register_buffer("codebook_index", torch.zeros(scale_shape, dtype=torch.long))
        self.register_buffer("nearest", None, persistent=False)
        self.bits, self.significand_bits = 0, SIGNIFICAND_BITS["int8"]

    def start_weight(self, weight: Tensor, bits: int, axis: int, config: QuantizationConfig) -> None:
        """Takes over, in place, the codebooks and scales of least squared error for 2 to 7 bits."""
        per_channel = self.scale.numel() > 1
        rows = weight.detach().transpose(0, axis).flatten(1) if per_channel else weight.detach().reshape(1, -1)
        self._take_bits(bits, SIGNIFICAND_BITS[config.codebook])
        scale, index = search_codebooks(rows, codebooks(bits, self.significand_bits))
        self.codebook_index.copy_(index.view_as(self.codebook_index))
        self.start(Range(scale.view_as(self.scale), -LARGEST, LARGEST, scale.new_zeros(1)))

    def levels(self) -> Tensor:
        """The entries of each channel's codebook, in units of the scale: [channels, 2^bits], rising."""
        return codebooks(self.bits, self.significand_bits).to(self.scale)[self.codebook_index.flatten()]

    def forward(self, x: Tensor) -> Tensor:
        if not self.initialised:
            return x
        return fake_quantize(x, self.scale.abs(), self.low, self.high, self.gradient_scale(x), self._round)

    def _round(self, x: Tensor) -> Tensor:
        # Borders between entries are multiples of a half, so the half below x says which entry is nearest.
        halves = x.mul(2).floor_().add_(2 * LARGEST).clamp_(0, 4 * LARGEST).long()
        assert self.nearest is not None
        return self.nearest.flatten()[halves + self.codebook_index * self.nearest.shape[1]]

    def _take_bits(self, bits: int, significand_bits: int) -> None:
        self.bits, self.significand_bits = bits, significand_bits
        self.nearest = nearest_entries(bits, significand_bits).to(self.scale) if bits else None

    def get_extra_state(self) -> Tensor:
        own = [self.bits] if self.significand_bits == SIGNIFICAND_BITS["int8"] else [self.bits, self.significand_bits]
        return torch.cat([super().get_extra_state(), torch.tensor(own)])

    def set_extra_state(self, state: Tensor) -> None:
        super().set_extra_state(state[:3])
        self._take_bits(int(state[3]), int(state[4]) if len(state) > 4 else SIGNIFICAND_BITS["int8"])


@functools.cache
def codebooks(bits: int, significand_bits: int = 7) -> Tensor:
    """The codebooks [52, 2^bits], rising integers of float64 of at most so many significand bits; 20 for 2 bits.

    Codebook 4 z + c has curvature CURVATURES[c] and shift SHIFTS[z]. With curvature c and shift z entry i is
    L sinh(c u) / sinh(c m), rounded to such an integer, with u = (2 (i + z) + 1 - 2^bits) / (2^bits - 1), m the largest
    |u|, and L the largest such integer up to 127. For c = 0 it is L u / m: uniform up to rounding and, where 2 z is
    even, without a zero.
    """
    largest = LARGEST - LARGEST % 2 ** (LARGEST.bit_length() - significand_bits)
    shifts = torch.tensor([z for z in SHIFTS if 2 * abs(z) < 2**bits - 1], dtype=torch.float64)[:, None]
    places = ((torch.arange(2**bits) + shifts) * 2 + 1 - 2**bits) / (2**bits - 1)
    end = places.abs().amax(1, keepdim=True)
    curves = [torch.sinh(c * places) / torch.sinh(c * end) if c else places / end for c in CURVATURES]
    return round_to_minifloat(torch.stack(curves, 1).flatten(0, 1) * largest, significand_bits)


@functools.cache
def nearest_entries(bits: int, significand_bits: int = 7) -> Tensor:
    """The entry of each codebook nearest to [i / 2 - 127, (i + 1) / 2 - 127), i from 0 to 508: [52, 509]."""
    middles = (torch.arange(4 * LARGEST + 1, dtype=torch.float64) + 0.5) / 2 - LARGEST
    entries = codebooks(bits, significand_bits)
    return entries.gather(1, (entries[:, None] - middles[:, None]).abs().argmin(2))


def search_codebooks(rows: Tensor, books: Tensor) -> tuple[Tensor, Tensor]:
    """Scales [r] and indices of `books` [k, entries] of least squared error for rows [r, n] of weights."""
    found = [_search(part, books) for part in rows.split(max(AT_A_TIME // (books.numel() * len(SHRINKS)), 1))]
    scale, index = (torch.cat(parts) for parts in zip(*found, strict=True))
    return scale.to(rows), index


def _search(rows: Tensor, books: Tensor) -> tuple[Tensor, Tensor]:
    sums = sums_of(rows)
    books = books.to(sums[0])
    smallest, largest = sums[0][:, :1], sums[0][:, -1:]
    ends = books[:, -1].clamp(min=1), books[:, 0].clamp(max=-1)  # of few bits one of them may be zero
    reaching = torch.maximum(largest / ends[0], smallest / ends[1]).clamp(min=1e-8)  # [r, k]
    scales = (reaching[..., None] * SHRINKS.to(reaching)).flatten(1)
    best = rounding_errors(sums, scales[..., None] * books.repeat_interleave(len(SHRINKS), 0)).argmin(1)
    return scales.gather(1, best[:, None])[:, 0], best // len(SHRINKS)
