"""The quantizers, one file each: `Quantizer` there is what a key of `quantization` names (`+` is written _plus)."""

import importlib
from typing import Protocol, cast

from torch import Tensor, nn

from common.config.schema import QuantizationConfig
from common.quantization.policy import UNIFORM_BITS
from common.quantization.ranges import Range


class Quantizer(Protocol):
    """A module that rounds its input; until it is started it returns its input unchanged."""

    initialised: bool
    scale: nn.Parameter  # of the shape the constructor was given; its magnitude counts

    def __call__(self, x: Tensor) -> Tensor: ...


class InputQuantizer(Quantizer, Protocol):
    """Rounds activations, with one scale for the tensor."""

    def start_input(self, sample: Tensor, bits: int, config: QuantizationConfig) -> str:
        """Takes over, in place, a range found on a sample [n] of the inputs; returns its kind, for the report."""


class WeightQuantizer(Quantizer, Protocol):
    """Rounds weights, with a scale for each output channel or one for the tensor."""

    def start(self, found: Range) -> None:
        """Takes over a range, in place."""

    def start_weight(self, weight: Tensor, bits: int, axis: int, config: QuantizationConfig) -> None:
        """Takes over, in place, a range found for a weight whose dimension `axis` counts its outputs."""

    def levels(self) -> Tensor:
        """What weights are rounded to, in units of the scale, rising: [k] or [channels, k]."""


class QuantizerClass(Protocol):
    def __call__(self, scale_shape: tuple[int, ...], batched: bool) -> nn.Module:
        """A quantizer with scales of this shape; `batched` for inputs, whose dimension 0 counts images."""


def quantizer_class(name: str) -> QuantizerClass:
    """The class in the file that a configuration names."""
    module = importlib.import_module(f"common.quantization.quantizers.{name.replace('+', '_plus')}")
    return cast(QuantizerClass, module.Quantizer)


def weight_quantizer(scale_shape: tuple[int, ...], bits: int, config: QuantizationConfig) -> nn.Module:
    """The quantizer for weights of so many bits, not started; `scale_shape` broadcasts to the weight, or is (1,)."""
    return quantizer_class(_name(config, config.weight_levels, bits))(scale_shape, batched=False)


def input_quantizer(bits: int, config: QuantizationConfig) -> nn.Module:
    """The quantizer for inputs of so many bits, not started, with one scale."""
    return quantizer_class(_name(config, config.activation_levels, bits))((1,), batched=True)


def _name(config: QuantizationConfig, levels: str, bits: int) -> str:
    return config.quantizer if levels == "uniform" or bits >= UNIFORM_BITS else levels
