"""Quantized layers that take the place, the name and the parameters of the float ones."""

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F


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


QuantLayer = QuantConv2d | QuantLinear
_CONVOLUTION = (
    *("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode"),
)


def _rounded(layer: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    if layer.input_quantizer is not None:
        x = layer.input_quantizer(x)
    weight = layer.weight if layer.weight_quantizer is None else layer.weight_quantizer(layer.weight)
    return x, weight


def quantized_layer(layer: Any, weight_quantizer: nn.Module | None, input_quantizer: nn.Module | None) -> QuantLayer:
    """The quantized counterpart of a Conv2d or Linear; it shares the parameters of the float one."""
    new: Any
    if isinstance(layer, nn.Conv2d):
        options: Any = {name: getattr(layer, name) for name in _CONVOLUTION}
        new = QuantConv2d(**options, bias=layer.bias is not None, device="meta")
    elif isinstance(layer, nn.Linear):
        new = QuantLinear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
    else:
        raise TypeError(f"cannot quantize a {type(layer).__name__}; only Conv2d and Linear")
    new.weight, new.bias = layer.weight, layer.bias
    new.weight_quantizer, new.input_quantizer = weight_quantizer, input_quantizer
    return new.train(layer.training)


def quantized_layers(module: nn.Module) -> dict[str, QuantLayer]:
    """The quantized layers of a module by name, in the module's order."""
    return {name: layer for name, layer in module.named_modules() if isinstance(layer, QuantLayer)}
