"""LSQ+: learned step and learned real offset (Bhalgat et al. 2020, arXiv 2004.09576, eq. 1 to 5)."""

import torch
from torch import Tensor, nn

from common.quantization.fake_quant import fake_quantize, scale_gradient
from common.quantization.quantizers import lsq
from common.quantization.ranges import Range


class Quantizer(lsq.Quantizer):
    """(clamp(round((x - offset) / step), low, high) * step + offset, offset a parameter of activations only.

    The gradient of the offset is that of the result summed where `x` is out of range, with the scale of the step.
    """

    integer_offset = False

    def __init__(self, step_shape: tuple[int, ...], batched: bool) -> None:
        super().__init__(step_shape, batched)
        self.offset = nn.Parameter(torch.zeros(1)) if batched else None

    def start(self, found: Range) -> None:
        """Takes over a range, in place."""
        super().start(Range(found.step, found.low, found.high, torch.zeros_like(found.offset)))
        if self.offset is not None:
            self.offset.data.copy_(found.offset)

    def forward(self, x: Tensor) -> Tensor:
        if self.offset is None or not self.initialised:
            return super().forward(x)
        scale = self.gradient_scale(x)
        offset = scale_gradient(self.offset, scale)
        return fake_quantize(x - offset, self.step.abs(), self.low, self.high, scale) + offset
