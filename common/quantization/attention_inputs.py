"""Rounding of what goes into products of two activations: queries, keys, values and attention."""

from torch import Tensor, nn

from common.config.schema import QuantizationConfig
from common.detection.attention import Probabilities, ProductInput
from common.quantization.quantizers import logarithmic, quantizer_class

BASES = {"log2": 2.0, "log_sqrt2": 2**0.5}  # of the logarithmic quantizers
# Up to so many bits `auto` takes log_sqrt2 in the place of even levels. Relative squared errors of a micro Swin's
# attention on a few drawn images, mean of 8 blocks, at 4, 6 and 8 bits: lsq .0332, .0047, .0004; lut .0089, .0008,
# .0004; log_sqrt2 .0093, .0088, .0088; log2 always .0355.
LOGARITHMIC_BITS = 4


class RoundedInput(ProductInput):
    """A ProductInput that rounds."""

    weight_quantizer = None
    input_quantizer: nn.Module

    def forward(self, input: Tensor) -> Tensor:
        return self.input_quantizer(input)


def rounded_input(part: ProductInput, bits: int, config: QuantizationConfig) -> RoundedInput:
    """The rounding counterpart of a marked input; it changes nothing until its quantizer is started."""
    new = RoundedInput()
    kind: str = config.softmax_quantizer
    if kind == "auto" and config.quantizer != "lut" and bits <= LOGARITHMIC_BITS:
        kind = "log_sqrt2"
    if isinstance(part, Probabilities) and kind in BASES:
        new.input_quantizer = logarithmic.Quantizer(BASES[kind])
    else:
        new.input_quantizer = quantizer_class(config.quantizer)((1,), batched=True)
    return new.train(part.training)


def rounded_inputs(module: nn.Module) -> dict[str, RoundedInput]:
    """The inputs of products that are rounded, by name, in the module's order."""
    return {name: part for name, part in module.named_modules() if isinstance(part, RoundedInput)}
