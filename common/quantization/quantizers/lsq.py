"""LSQ: learned step size (Esser et al. 2020, arXiv 1902.08153), with a fixed integer zero point where asked for."""

import torch
from torch import Tensor, nn

from common.config.schema import QuantizationConfig
from common.quantization.fake_quant import fake_quantize, lsq_gradient_scale
from common.quantization.ranges import Range, activation_range, stretched, weight_range


class Quantizer(nn.Module):
    """Rounds to codes low..high; a zero point z shifts those bounds by -z, so that zero stays exact.

    In the state dict: `step`, and `_extra_state` [low, high, initialised] (int64). The last three are plain numbers
    in memory, so that no forward pass has to wait for a GPU.
    """

    integer_offset = True

    def __init__(self, step_shape: tuple[int, ...], batched: bool) -> None:
        super().__init__()
        self.step = nn.Parameter(torch.ones(step_shape))
        self.batched = batched
        self.low, self.high, self.initialised = 0, 0, False

    def start(self, found: Range) -> None:
        """Takes over a range, in place."""
        zero_point = round(float(-found.offset / found.step.reshape(-1)[0])) if found.offset.any() else 0
        self.low, self.high, self.initialised = found.low - zero_point, found.high - zero_point, True
        self.step.data.copy_(found.step)

    def start_weight(self, weight: Tensor, bits: int, axis: int, config: QuantizationConfig) -> None:
        """Takes over a range for a weight whose dimension `axis` counts its outputs, in place."""
        per_channel = self.step.numel() > 1
        self.start(weight_range(weight, bits, per_channel, config.scale_init, axis))

    def levels(self) -> Tensor:
        """What is rounded to, in steps: [codes], rising."""
        return torch.arange(self.low, self.high + 1).to(self.step)

    def start_input(self, sample: Tensor, bits: int, config: QuantizationConfig) -> str:
        """Takes over a range for inputs of which `sample` [n] is a fair part with the smallest and the largest one."""
        kind = config.activation_range
        if kind == "auto":
            kind = "unsigned" if sample.min() >= 0 else "affine"
        if kind == "affine" and config.scale_init == "lsq":
            kind = "signed"  # this start knows no offset, and without one an affine range has no negative codes
        sample = stretched(sample, config.range_headroom)
        self.start(activation_range(sample, bits, kind, config.scale_init, self.integer_offset))
        return kind

    def forward(self, x: Tensor) -> Tensor:
        if not self.initialised:
            return x
        return fake_quantize(x, self.step.abs(), self.low, self.high, self.gradient_scale(x))

    def gradient_scale(self, x: Tensor) -> float:
        values = x.numel() // (x.shape[0] if self.batched else self.step.numel())
        return lsq_gradient_scale(values, self.high)

    def get_extra_state(self) -> Tensor:
        return torch.tensor([self.low, self.high, int(self.initialised)])

    def set_extra_state(self, state: Tensor) -> None:
        self.low, self.high, self.initialised = int(state[0]), int(state[1]), bool(state[2])
