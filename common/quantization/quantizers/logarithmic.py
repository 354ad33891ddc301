"""A logarithmic quantizer for the outputs of a softmax, of base 2 or sqrt(2) (RepQ-ViT, Li et al. 2023, 2212.08254)."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from common.config.schema import QuantizationConfig
from common.quantization.fake_quant import lsq_gradient_scale
from common.quantization.ranges import Range

SHRINKS = torch.logspace(0.0, -1.5, 31, base=2.0)  # candidates for the largest value, times the largest one seen


class _Logarithmic(torch.autograd.Function):
    """scale * base^-round(-log_base(x / scale)), and 0 for the last code.

    The gradient passes the rounding of the logarithm straight through: y / x for x in range and 0 elsewhere. That of
    the scale is then 0 in range, and that of y where x lies above it.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, base: float, last: int, gradient_scale: float) -> Tensor:
        code = torch.log2(x / scale).mul_(-1 / math.log2(base)).round_()
        y = torch.exp2(code.clamp(min=0).mul_(-math.log2(base))).mul_(scale).masked_fill_(code >= last, 0.0)
        above = code < 0
        ctx.save_for_backward(x, y, above)
        ctx.gradient_scale, ctx.shape = gradient_scale, scale.shape
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = gradients
        x, y, above = ctx.saved_tensors
        grad_x = (grad * y / x).masked_fill_(above | (y == 0), 0.0)
        total = grad.masked_fill(~above, 0.0).sum().expand(ctx.shape) * ctx.gradient_scale
        return grad_x, total, None, None, None


class Quantizer(nn.Module):
    """Rounds values from 0 on to scale / base^code, code 0 to high - 1; code `high` is 0.

    `scale` is the largest value that has a code, a parameter of one element. The state dict is that of LSQ.
    """

    def __init__(self, base: float) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.base = base
        self.low, self.high, self.initialised = 0, 0, False

    def start(self, found: Range) -> None:
        """Takes over a range, in place; codes count powers of 1 / base."""
        self.low, self.high, self.initialised = found.low, found.high, True
        self.scale.data.copy_(found.scale)

    def start_input(self, sample: Tensor, bits: int, config: QuantizationConfig) -> str:
        """Takes over the range of least squared error; no headroom, since nothing exceeds a probability of 1."""
        self.start(logarithmic_range(sample, bits, self.base))
        return "logarithmic"

    def forward(self, x: Tensor) -> Tensor:
        if not self.initialised:
            return x
        factor = lsq_gradient_scale(x.numel() // x.shape[0], self.high)
        return _Logarithmic.apply(x, self.scale.abs(), self.base, self.high, factor)

    def get_extra_state(self) -> Tensor:
        return torch.tensor([self.low, self.high, int(self.initialised)])

    def set_extra_state(self, state: Tensor) -> None:
        self.low, self.high, self.initialised = int(state[0]), int(state[1]), bool(state[2])


def logarithmic_range(sample: Tensor, bits: int, base: float) -> Range:
    """The range of least squared error, of 31; `sample` [n], from 0 on, is a fair part that holds the largest value."""
    high = 2**bits - 1
    scales = sample.max().clamp(min=1e-8) * SHRINKS.to(sample)
    errors = torch.stack([(_Logarithmic.apply(sample, s, base, high, 1.0) - sample).square().sum() for s in scales])
    return Range(scales[errors.argmin()].view(1), 0, high, sample.new_zeros(1))
