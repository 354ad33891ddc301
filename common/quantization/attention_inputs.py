"""Rounding of the inputs of attention's two matrix products: queries, keys, values and probabilities."""

from torch import Tensor, nn

from common.config.schema import QuantizationConfig
from common.detection.attention import AttentionInput, Probabilities
from common.quantization.quantizers import input_quantizer, logarithmic

BASES = {"log2": 2.0, "log_sqrt2": 2**0.5}  # of the logarithmic quantizers
# Up to so many bits `auto` takes log_sqrt2 in the place of uniform levels. Relative squared errors of a micro Swin's
# attention on a few drawn images, mean of 8 blocks, at 4, 6 and 8 bits: uniform .0332, .0047, .0004; minifloat .0089,
# .0008, .0004; log_sqrt2 .0093, .0088, .0088; log2 always .0355.
LOGARITHMIC_BITS = 4


class RoundedAttentionInput(AttentionInput):
    """An AttentionInput that rounds."""

    weight_quantizer = None
    input_quantizer: nn.Module

    def forward(self, input: Tensor) -> Tensor:
        return self.input_quantizer(input)


def rounded_attention_input(part: AttentionInput, bits: int, config: QuantizationConfig) -> RoundedAttentionInput:
    """The rounding counterpart of a marked input; it changes nothing until its quantizer is started."""
    new = RoundedAttentionInput()
    kind = softmax_kind(bits, config.softmax_quantizer, config.activation_levels, config.scale_init)
    if isinstance(part, Probabilities) and kind in BASES:
        new.input_quantizer = logarithmic.Quantizer(BASES[kind])
    else:
        new.input_quantizer = input_quantizer(bits, config)
    return new.train(part.training)


def softmax_kind(bits: int, softmax_quantizer: str, activation_levels: str, scale_init: str) -> str:
    """What `softmax_quantizer` means for so many bits and these other settings: same, log2 or log_sqrt2."""
    if softmax_quantizer != "auto":
        return softmax_quantizer
    coarse = bits <= LOGARITHMIC_BITS and activation_levels == "uniform" and scale_init == "mse"
    return "log_sqrt2" if coarse else "same"


def rounded_attention_inputs(module: nn.Module) -> dict[str, RoundedAttentionInput]:
    """The attention inputs that are rounded, by name, in the module's order."""
    return {name: part for name, part in module.named_modules() if isinstance(part, RoundedAttentionInput)}
