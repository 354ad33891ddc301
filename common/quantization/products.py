"""Rounding of what goes into products of two activations: queries, keys, values and attention."""

from torch import Tensor, nn

from common.attention import Probabilities, ProductInput
from common.config import QuantizationConfig
from common.quantization.quantizers import logarithmic, quantizer_class

BASES = {"log2": 2.0, "log_sqrt2": 2**0.5}  # of the logarithmic quantizers
# Up to so many bits `auto` takes log_sqrt2. Relative squared errors of a micro Swin's attention on a few drawn images,
# mean of 8 blocks, at 4, 6 and 8 bits: uniform .0193, .0023, .0002; log_sqrt2 .0083, .0082, .0082; log2 always .0281.
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
    if kind == "auto":
        kind = "log_sqrt2" if bits <= LOGARITHMIC_BITS else "uniform"
    if isinstance(part, Probabilities) and kind in BASES:
        new.input_quantizer = logarithmic.Quantizer(BASES[kind])
    else:
        new.input_quantizer = quantizer_class(config.quantizer)((1,), batched=True)
    return new.train(part.training)


def rounded_inputs(module: nn.Module) -> dict[str, RoundedInput]:
    """The inputs of products that are rounded, by name, in the module's order."""
    return {name: part for name, part in module.named_modules() if isinstance(part, RoundedInput)}
