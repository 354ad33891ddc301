"""Fake quantization with a trainable scale: the function, its gradient, and the integers that n bits can hold."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

Rounding = Callable[[Tensor], Tensor]
Bound = int | Tensor  # a code, or one for each element of a scale


def signed_codes(bits: int) -> tuple[int, int]:
    """Smallest and largest signed integer of `bits` bits, two's complement."""
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


def weight_codes(bits: int) -> tuple[int, int]:
    """Smallest and largest code of weights: signed integers, of which 8 bits leave -128 out, as engines do.

    A BatchNorm of negative scale turns the codes round when it is folded in, and 8 bits have no +128.
    """
    low, high = signed_codes(bits)
    return max(low, -127), high


def unsigned_codes(bits: int) -> tuple[int, int]:
    """Smallest and largest unsigned integer of `bits` bits."""
    return 0, 2**bits - 1


class _FakeQuantize(torch.autograd.Function):
    """round(clamp(x / scale, low, high)) * scale; `rounding` is half to even as in ONNX, or to non-uniform levels.

    The gradient is that of LSQ (Esser et al. 2020, arXiv 1902.08153, eq. 3 and 5). With y the result and gx the
    gradient of x (that of y inside the range, 0 outside), eq. 3 sums to (<gy, y> - <gx, x>) / scale, which needs no
    tensor besides those that the layers around keep anyway.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, low: Bound, high: Bound, gradient_scale: float, rounding: Rounding
    ) -> Tensor:  # fmt: skip
        y = rounding(torch.div(x, scale).clamp_(low, high)).mul_(scale)  # type: ignore[arg-type]  # of one kind
        ctx.save_for_backward(x, scale, y)
        ctx.low, ctx.high, ctx.gradient_scale = low, high, gradient_scale
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = gradients
        x, scale, y = ctx.saved_tensors
        v = torch.div(x, scale)
        if isinstance(ctx.low, Tensor):
            grad_x = grad * ((v >= ctx.low) & (v <= ctx.high))
        else:
            kind = np.float64 if x.dtype == torch.float64 else np.float32
            # hardtanh passes what lies strictly between its bounds; a value on the first or last code is inside.
            below, above = (float(np.nextafter(kind(b), kind(s * np.inf))) for b, s in ((ctx.low, -1), (ctx.high, 1)))
            grad_x = torch.ops.aten.hardtanh_backward(grad, v, below, above)
        if not ctx.needs_input_grad[1]:
            return grad_x, None, None, None, None, None
        if scale.numel() == 1:
            total = (torch.dot(grad.flatten(), y.flatten()) - torch.dot(grad_x.flatten(), x.flatten())).view_as(scale)
        else:
            total = (grad * y).sum_to_size(scale.shape) - (grad_x * x).sum_to_size(scale.shape)
        return grad_x, total * ctx.gradient_scale / scale, None, None, None, None


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] * ctx.factor, None


def fake_quantize(
    x: Tensor, scale: Tensor, low: Bound, high: Bound, gradient_scale: float = 1.0, rounding: Rounding = torch.round_
) -> Tensor:  # fmt: skip
    """Rounds `x` to multiples of `scale` from low * scale to high * scale; the result has the shape of `x`.

    Args:
        x: any float tensor.
        scale: positive, of one element or broadcastable to `x`.
        low: smallest code, or one for each scale.
        high: largest code, of the same kind as `low`.
        gradient_scale: factor of the gradient of `scale` (LSQ, section 2.2).
        rounding: maps x / scale, already clamped, to codes; it may change its argument in place.
    """
    return _FakeQuantize.apply(x, scale, low, high, gradient_scale, rounding)


def scale_gradient(x: Tensor, factor: float) -> Tensor:
    """`x` itself, whose gradient is multiplied by `factor`."""
    return _ScaleGradient.apply(x, factor)


def lsq_gradient_scale(values_per_scale: int, high: int) -> float:
    """1 / sqrt(N Qp) (LSQ, section 2.2); N leaves the batch out, so that the batch size changes nothing."""
    return 1.0 / math.sqrt(values_per_scale * max(high, 1))
