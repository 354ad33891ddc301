"""The quantizers, one file each: `Quantizer` there is what `quantization.quantizer` names (`+` is written _plus)."""

import importlib
from typing import Protocol, cast

from torch import Tensor, nn

from common.config.schema import QuantizationConfig
from common.quantization.ranges import Range


class Quantizer(Protocol):
    """A module that rounds its input; until `start` has given it a range it returns its input unchanged."""

    initialised: bool
    step: nn.Parameter

    def start(self, found: Range) -> None:
        """Takes over a range, in place."""

    def start_input(self, sample: Tensor, bits: int, config: QuantizationConfig) -> str:
        """Finds a range for inputs from a sample [n], takes it over, in place, and returns its kind."""

    def start_weight(self, weight: Tensor, bits: int, axis: int, config: QuantizationConfig) -> None:
        """Finds a range for a weight whose dimension `axis` counts its outputs and takes it over, in place."""

    def levels(self) -> Tensor:
        """What a weight is rounded to, in steps: [k] or [channels, k], rising."""

    def __call__(self, x: Tensor) -> Tensor: ...


class QuantizerClass(Protocol):
    def __call__(self, step_shape: tuple[int, ...], batched: bool) -> nn.Module:
        """A quantizer with steps of this shape; `batched` where dimension 0 of its input counts images."""


def quantizer_class(name: str) -> QuantizerClass:
    """The class of the quantizer that a configuration names."""
    module = importlib.import_module(f"common.quantization.quantizers.{name.replace('+', '_plus')}")
    return cast(QuantizerClass, module.Quantizer)
