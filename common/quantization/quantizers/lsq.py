"""LSQ: uniform levels of learned scale (Esser et al. 2020, arXiv 1902.08153), with a fixed integer zero point."""

import torch
from torch import Tensor, nn

from common.config.schema import QuantizationConfig
from common.quantization.fake_quant import fake_quantize, lsq_gradient_scale
from common.quantization.policy import UNIFORM_BITS
from common.quantization.ranges import Range, activation_range, asymmetric_weight_range, weight_range, with_headroom


class Quantizer(nn.Module):
    """clamp(round(x / |scale|), low, high) * |scale|; a zero point z shifts both bounds by -z, so that zero is exact.

    The state dict has `scale`, and `_extra_state` [low, high, initialised, ...] (int64): the first three are plain
    numbers in memory, so that no forward pass has to wait for a GPU; then follow the zero points of a weight's
    channels, where it has them. With one scale the bounds have the zero point in them.
    """

    integer_offset = True
    zero_points: Tensor | None  # of the shape of `scale`, for more than one scale

    def __init__(self, scale_shape: tuple[int, ...], batched: bool) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(scale_shape))
        self.register_buffer("zero_points", None, persistent=False)
        self.batched = batched
        self.low, self.high, self.initialised = 0, 0, False

    def start(self, found: Range) -> None:
        """Takes over a range, in place."""
        zero_point = 0
        if found.offset.numel() > 1:
            self.zero_points = (-found.offset / found.scale).round()
        elif found.offset.any():
            zero_point = round(float(-found.offset.reshape(-1) / found.scale.reshape(-1)[0]))
        self.low, self.high, self.initialised = found.low - zero_point, found.high - zero_point, True
        self.scale.data.copy_(found.scale)

    def start_weight(self, weight: Tensor, bits: int, axis: int, config: QuantizationConfig) -> None:
        """Takes over, in place, a range found for a weight whose dimension `axis` counts its outputs."""
        per_channel = self.scale.numel() > 1
        if bits < UNIFORM_BITS and (config.weight_range, config.scale_init) == ("auto", "mse"):
            self.start(asymmetric_weight_range(weight, bits, per_channel, axis))
        else:
            self.start(weight_range(weight, bits, per_channel, config.scale_init, axis))

    def levels(self) -> Tensor:
        """What weights are rounded to, in units of the scale, rising: [codes], or [channels, codes]."""
        codes = torch.arange(self.low, self.high + 1).to(self.scale)
        return codes if self.zero_points is None else codes - self.zero_points.reshape(-1, 1)

    def start_input(self, sample: Tensor, bits: int, config: QuantizationConfig) -> str:
        """Takes over, in place, a range found on a sample [n] that holds the smallest and the largest input."""
        kind = config.activation_range
        if kind == "auto" and sample.min() >= 0:
            kind = "unsigned"
        elif kind == "auto":
            kind = "asymmetric" if config.scale_init == "mse" else "symmetric"  # LSQ's formula knows no zero point
        sample = with_headroom(sample, config.range_headroom)
        self.start(activation_range(sample, bits, kind, config.scale_init, self.integer_offset))
        return kind

    def forward(self, x: Tensor) -> Tensor:
        if not self.initialised:
            return x
        low, high = (b if self.zero_points is None else b - self.zero_points for b in (self.low, self.high))
        return fake_quantize(x, self.scale.abs(), low, high, self.gradient_scale(x))

    def gradient_scale(self, x: Tensor) -> float:
        """The factor of the scale's gradient; N counts the values of one image, or the weights of one scale."""
        values = x.numel() // (x.shape[0] if self.batched else self.scale.numel())
        return lsq_gradient_scale(values, self.high)

    def get_extra_state(self) -> Tensor:
        zero_points = [] if self.zero_points is None else self.zero_points.flatten().long().tolist()
        return torch.tensor([self.low, self.high, int(self.initialised), *zero_points])

    def set_extra_state(self, state: Tensor) -> None:
        self.low, self.high, self.initialised = int(state[0]), int(state[1]), bool(state[2])
        self.zero_points = state[3:].view_as(self.scale).to(self.scale) if len(state) > 3 else None
