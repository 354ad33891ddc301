"""Codebooks for weights of less than 8 bits: codes are indices into 2^b INT8 entries, dense near zero, sparse far out.

Weights are many near zero and few far from it; levels that follow them lose about half of what uniform ones lose
(docs/quantizers.md). Known relatives are sums of powers of two (APoT, Li et al. 2020, arXiv 1909.13144) and NF4 (QLoRA,
Dettmers et al. 2023, arXiv 2305.14314). Here all entries are integers of -127 to 127, so that after a look-up the
arithmetic is that of INT8.
"""

import functools
import math

import torch
from torch import Tensor

from common.config.schema import QuantizationConfig
from common.quantization.fake_quant import fake_quantize
from common.quantization.levels import rounding_errors, sums_of
from common.quantization.quantizers import lsq
from common.quantization.ranges import Range

LARGEST = 127  # entry of a codebook
CURVATURES = (0.0, 1.0, 2.0, 3.0)  # of the codebooks; a fifth, of 4, lowers the error by 1 to 2 % more
SHRINKS = torch.linspace(1.05, 0.3, 32)  # candidates of the scale: the largest magnitude / 127, times these


class Quantizer(lsq.Quantizer):
    """|scale| times the nearest entry of one of four fixed codebooks, which each channel chooses when it is started.

    The state dict is that of LSQ with `codebook_index` (int64, 0 to 3, of the shape of `scale`), and with the bits of a
    code last in `_extra_state`, 0 before the start.
    """

    codebook_index: Tensor
    nearest: Tensor | None

    def __init__(self, scale_shape: tuple[int, ...], batched: bool) -> None:
        super().__init__(scale_shape, batched)
        self.register_buffer("codebook_index", torch.zeros(scale_shape, dtype=torch.long))
        self.register_buffer("nearest", None, persistent=False)
        self.bits = 0

    def start_weight(self, weight: Tensor, bits: int, axis: int, config: QuantizationConfig) -> None:
        """Takes over, in place, the codebooks and scales of least squared error for 2 to 7 bits."""
        per_channel = self.scale.numel() > 1
        rows = weight.detach().transpose(0, axis).flatten(1) if per_channel else weight.detach().reshape(1, -1)
        scale, index = search_codebooks(rows, bits)
        self._take_bits(bits)
        self.codebook_index.copy_(index.view_as(self.codebook_index))
        self.start(Range(scale.view_as(self.scale), -LARGEST, LARGEST, scale.new_zeros(1)))

    def levels(self) -> Tensor:
        """The entries of each channel's codebook, in units of the scale: [channels, 2^bits], rising."""
        return codebooks(self.bits).to(self.scale)[self.codebook_index.flatten()]

    def forward(self, x: Tensor) -> Tensor:
        if not self.initialised:
            return x
        return fake_quantize(x, self.scale.abs(), self.low, self.high, self.gradient_scale(x), self._round)

    def _round(self, x: Tensor) -> Tensor:
        # Borders between entries are multiples of a half, so the half below x says which entry is nearest.
        halves = x.mul(2).floor_().add_(2 * LARGEST).clamp_(0, 4 * LARGEST).long()
        assert self.nearest is not None
        return self.nearest.flatten()[halves + self.codebook_index * self.nearest.shape[1]]

    def _take_bits(self, bits: int) -> None:
        self.bits = bits
        self.nearest = nearest_entries(bits).to(self.scale) if bits else None

    def get_extra_state(self) -> Tensor:
        return torch.cat([super().get_extra_state(), torch.tensor([self.bits])])

    def set_extra_state(self, state: Tensor) -> None:
        super().set_extra_state(state)
        self._take_bits(int(state[3]))


@functools.cache
def codebooks(bits: int) -> Tensor:
    """The four codebooks [4, 2^bits], rising integers of float64.

    Entry i of curvature c is round(127 sinh(c u) / sinh(c)) with u = (2 i + 1 - 2^bits) / (2^bits - 1), -1 to 1; for
    c = 0 it is round(127 u), which is uniform up to rounding and, unlike INT4, has no zero.
    """
    places = (torch.arange(2**bits, dtype=torch.float64) * 2 + 1 - 2**bits) / (2**bits - 1)
    curves = [torch.sinh(c * places) / math.sinh(c) if c else places for c in CURVATURES]
    return (torch.stack(curves) * LARGEST).round()


@functools.cache
def nearest_entries(bits: int) -> Tensor:
    """The entry of each codebook nearest to [i / 2 - 127, (i + 1) / 2 - 127), i from 0 to 508: [4, 509]."""
    middles = (torch.arange(4 * LARGEST + 1, dtype=torch.float64) + 0.5) / 2 - LARGEST
    entries = codebooks(bits)
    return entries.gather(1, (entries[:, None] - middles[:, None]).abs().argmin(2))


def search_codebooks(rows: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Scales [r] and indices of codebooks [r] of least squared error for rows [r, n] of weights."""
    sums = sums_of(rows)
    largest = sums[0][:, [0, -1]].abs().amax(1).clamp(min=1e-6)
    scales = torch.outer(largest, SHRINKS.to(largest)) / LARGEST  # [r, candidates]
    errors = torch.stack([rounding_errors(sums, scales[..., None] * book) for book in codebooks(bits).to(scales)], 1)
    best = errors.flatten(1).argmin(1)
    count = len(SHRINKS)
    return scales.gather(1, (best % count)[:, None])[:, 0].to(rows), best // count
