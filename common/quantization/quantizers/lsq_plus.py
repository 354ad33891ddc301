"""LSQ+: uniform levels of learned scale and learned real offset of inputs (Bhalgat et al. 2020, arXiv 2004.09576)."""

import torch
from torch import Tensor, nn

from common.quantization.fake_quant import fake_quantize, scale_gradient
from common.quantization.quantizers import lsq
from common.quantization.ranges import Range


class Quantizer(lsq.Quantizer):
    """clamp(round((x - offset) / |scale|), low, high) * |scale| + offset (eq. 1 to 5); weights are those of LSQ.

    The gradient of the offset is that of the result, summed where `x` is out of range, with the factor of the scale's.
    """

    integer_offset = False

    def __init__(self, scale_shape: tuple[int, ...], batched: bool) -> None:
        super().__init__(scale_shape, batched)
        self.offset = nn.Parameter(torch.zeros(1)) if batched else None

    def start(self, found: Range) -> None:
        """Takes over a range, in place."""
        if self.offset is None:
            super().start(found)
        else:
            super().start(Range(found.scale, found.low, found.high, torch.zeros_like(found.offset)))
            self.offset.data.copy_(found.offset)

    def forward(self, x: Tensor) -> Tensor:
        if self.offset is None or not self.initialised:
            return super().forward(x)
        factor = self.gradient_scale(x)
        offset = scale_gradient(self.offset, factor)
        return fake_quantize(x - offset, self.scale.abs(), self.low, self.high, factor) + offset
