"""LSQ: uniform levels of learned scale (Esser et al. 2020, arXiv 1902.08153), with a fixed integer zero point."""

import torch
from torch import Tensor, nn

from common.config.schema import QuantizationConfig
from common.quantization.fake_quant import fake_quantize, lsq_gradient_scale
from common.quantization.ranges import Range, activation_range, weight_range, with_headroom


class Quantizer(nn.Module):
    """clamp(round(x / |scale|), low, high) * |scale|; a zero point z shifts both bounds by -z, so that zero is exact.

    The state dict has `scale`, and `_extra_state` [low, high, initialised] (int64). These three are plain numbers in
    memory, so that no forward pass has to wait for a GPU.
    """

    integer_offset = True

    def __init__(self, scale_shape: tuple[int, ...], batched: bool) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(scale_shape))
        self.batched = batched
        self.low, self.high, self.initialised = 0, 0, False

    def start(self, found: Range) -> None:
        """Takes over a range, in place."""
        zero_point = round(float(-found.offset / found.scale.reshape(-1)[0])) if found.offset.any() else 0
        self.low, self.high, self.initialised = found.low - zero_point, found.high - zero_point, True
        self.scale.data.copy_(found.scale)

    def start_weight(self, weight: Tensor, bits: int, axis: int, config: QuantizationConfig) -> None:
        """Takes over, in place, a range found for a weight whose dimension `axis` counts its outputs."""
        per_channel = self.scale.numel() > 1
        self.start(weight_range(weight, bits, per_channel, config.scale_init, axis))

    def levels(self) -> Tensor:
        """What weights are rounded to, in units of the scale: [codes], rising."""
        return torch.arange(self.low, self.high + 1).to(self.scale)

    def start_input(self, sample: Tensor, bits: int, config: QuantizationConfig) -> str:
        """Takes over, in place, a range found on a sample [n] that holds the smallest and the largest input."""
        kind = config.activation_range
        if kind == "auto" and sample.min() >= 0:
            kind = "unsigned"
        elif kind == "auto":
            kind = "affine" if config.scale_init == "mse" else "signed"  # LSQ's formula knows no zero point
        sample = with_headroom(sample, config.range_headroom)
        self.start(activation_range(sample, bits, kind, config.scale_init, self.integer_offset))
        return kind

    def forward(self, x: Tensor) -> Tensor:
        if not self.initialised:
            return x
        return fake_quantize(x, self.scale.abs(), self.low, self.high, self.gradient_scale(x))

    def gradient_scale(self, x: Tensor) -> float:
        """The factor of the scale's gradient; N counts the values of one image, or the weights of one scale."""
        values = x.numel() // (x.shape[0] if self.batched else self.scale.numel())
        return lsq_gradient_scale(values, self.high)

    def get_extra_state(self) -> Tensor:
        return torch.tensor([self.low, self.high, int(self.initialised)])

    def set_extra_state(self, state: Tensor) -> None:
        self.low, self.high, self.initialised = int(state[0]), int(state[1]), bool(state[2])
