"""Quantized layers that take the place, the name and the parameters of the float ones.

So do the inputs of attention's two matrix products: queries, keys, values and probabilities.
"""

from typing import Any, TypeVar

from torch import Tensor, nn
from torch.nn import functional as F

from common.config.schema import QuantizationConfig
from common.detection.attention import AttentionInput, Probabilities
from common.quantization.quantizers import input_quantizer, logarithmic

BASES = {"log2": 2.0, "log_sqrt2": 2**0.5}  # of the logarithmic quantizers
# Up to so many bits `auto` takes log_sqrt2 in the place of uniform levels. Relative squared errors of a micro Swin's
# attention on a few drawn images, mean of 8 blocks, at 4, 6 and 8 bits: uniform .0332, .0047, .0004; minifloat .0089,
# .0008, .0004; log_sqrt2 .0093, .0088, .0088; log2 always .0355.
LOGARITHMIC_BITS = 4


class QuantConv2d(nn.Conv2d):
    """A convolution of the rounded input with the rounded weight. A quantizer that is None leaves its side in float."""

    weight_quantizer: nn.Module | None
    input_quantizer: nn.Module | None

    def forward(self, input: Tensor) -> Tensor:
        x, weight = _rounded(self, input)
        return self._conv_forward(x, weight, self.bias)


class QuantLinear(nn.Linear):
    """A linear layer of the rounded input and the rounded weight. A quantizer that is None leaves its side in float."""

    weight_quantizer: nn.Module | None
    input_quantizer: nn.Module | None

    def forward(self, input: Tensor) -> Tensor:
        x, weight = _rounded(self, input)
        return F.linear(x, weight, self.bias)


class QuantConvTranspose2d(nn.ConvTranspose2d):
    """A transposed convolution of the rounded input with the rounded weight [in, out, kh, kw], as QuantConv2d."""

    weight_quantizer: nn.Module | None
    input_quantizer: nn.Module | None

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        x, weight = _rounded(self, input)
        padding: Any = self.padding
        return F.conv_transpose2d(
            x, weight, self.bias, self.stride, padding, self.output_padding, self.groups, self.dilation
        )


QuantLayer = QuantConv2d | QuantConvTranspose2d | QuantLinear
QUANTIZABLE = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)
_CONVOLUTION = (
    *("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode"),
)
_FRESH = (nn.Conv2d(1, 1, 1, device="meta"), nn.ConvTranspose2d(1, 1, 1, device="meta"), nn.Linear(1, 1, device="meta"))
_OWN = {name for layer in _FRESH for name in vars(layer)}  # torch's attributes
Layer = TypeVar("Layer", bound=nn.Module)


def _rounded(layer: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    if layer.input_quantizer is not None:
        x = layer.input_quantizer(x)
    weight = layer.weight if layer.weight_quantizer is None else layer.weight_quantizer(layer.weight)
    return x, weight


def quantized_layer(layer: Any, weight_quantizer: nn.Module | None, input_quantizer: nn.Module | None) -> QuantLayer:
    """The quantized counterpart of one of QUANTIZABLE; it shares the parameters of the float one."""
    new: Any
    if isinstance(layer, nn.Conv2d):
        options: Any = {name: getattr(layer, name) for name in _CONVOLUTION}
        new = QuantConv2d(**options, bias=layer.bias is not None, device="meta")
    elif isinstance(layer, nn.ConvTranspose2d) and layer.groups == 1:
        options = {name: getattr(layer, name) for name in (*_CONVOLUTION, "output_padding")}
        new = QuantConvTranspose2d(**options, bias=layer.bias is not None, device="meta")
    elif isinstance(layer, nn.Linear):
        new = QuantLinear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
    else:
        raise TypeError(
            f"cannot quantize a {type(layer).__name__}; only Conv2d, Linear and ConvTranspose2d of one group"
        )
    new.weight, new.bias = layer.weight, layer.bias
    new.weight_quantizer, new.input_quantizer = weight_quantizer, input_quantizer
    return keep_notes(layer, new.train(layer.training))


def keep_notes(layer: nn.Module, new: Layer) -> Layer:
    """`new` with what a detector has noted at the layer that it replaces, as Ultralytics notes what a layer reads."""
    for name in vars(layer).keys() - _OWN:
        setattr(new, name, getattr(layer, name))
    return new


def output_axis(layer: nn.Module) -> int:
    """The dimension of a layer's weight that counts its outputs."""
    return 1 if isinstance(layer, nn.ConvTranspose2d) else 0


def quantized_layers(module: nn.Module) -> dict[str, QuantLayer]:
    """The quantized layers of a module by name, in the module's order."""
    return {name: layer for name, layer in module.named_modules() if isinstance(layer, QuantLayer)}


def weight_count(module: nn.Module, name: str) -> int:
    """How many weights the named layer has."""
    weight = module.get_submodule(name).weight
    assert isinstance(weight, Tensor)
    return weight.numel()


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
