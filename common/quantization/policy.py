"""Which layer gets how many bits, and why."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from torch import nn

from common.config.schema import QuantizationConfig
from common.detection.detector import Detector
from common.detection.types import LayerPolicy, Role
from common.runtime.errors import UserError

FLOAT = 32  # bits of what is not quantized


@dataclass(frozen=True)
class LayerPlan:
    """What becomes of one layer; 32 bits mean float."""

    name: str
    role: Role
    weight_bits: int
    activation_bits: int
    reason: str

    @property
    def is_quantized(self) -> bool:
        """Whether anything of the layer is rounded."""
        return self.weight_bits < FLOAT or self.activation_bits < FLOAT

    def widened(self, bits: int, reason: str = "") -> "LayerPlan":
        """With at least so many bits for weights and inputs, and why added to the reason; float stays float."""
        if not self.is_quantized:
            return self
        more = [max(planned, bits) for planned in (self.weight_bits, self.activation_bits)]
        return replace(self, weight_bits=more[0], activation_bits=more[1], reason=self.reason + reason)


def plan_layers(detector: Detector, module: nn.Module, config: QuantizationConfig) -> list[LayerPlan]:
    """The bits of every layer of the policy: those of its role, unless a pattern of `quantization.layers` names it.

    Where several patterns match, the last one counts.

    Raises:
        UserError: a pattern that matches no layer, or gives bits only to layers that always stay in float.
    """
    policy = detector.quantization_policy(module)
    for pattern, bits in config.layers.items():
        matched = [layer for layer in policy if fnmatchcase(layer.name, pattern)]
        if not matched:
            example = policy[len(policy) // 2].name if policy else "none"
            raise UserError(f"quantization.layers: no layer matches {pattern!r}; names look like {example}")
        if all(layer.always_float for layer in matched) and min(bits.weight_bits, bits.activation_bits) < FLOAT:
            kept = f"{matched[0].name} ({matched[0].reason}), which stays in float"
            raise UserError(f"quantization.layers: {pattern!r} matches only {kept}; remove the pattern")
    return [_plan(layer, config) for layer in policy]


def _plan(layer: LayerPolicy, config: QuantizationConfig) -> LayerPlan:
    bits = (config.weight_bits, config.activation_bits)
    reason = f"{layer.role}: {layer.reason}"
    if layer.role in config.float_roles:
        bits, reason = (FLOAT, FLOAT), f"{reason}; in float_roles"
    elif layer.role in config.eight_bit_roles:
        bits, reason = (8, 8), f"{reason}; in eight_bit_roles"
    for pattern, exception in config.layers.items():
        if fnmatchcase(layer.name, pattern):
            bits = (exception.weight_bits, exception.activation_bits)
            reason = f"{layer.role}: {layer.reason}; matches {pattern!r} of layers"
    if layer.always_float and min(bits) < FLOAT:
        bits, reason = (FLOAT, FLOAT), f"{layer.role}: {layer.reason}; always in float"
    if layer.role == "product":
        bits = (FLOAT, bits[1])  # there are no weights
    return LayerPlan(layer.name, layer.role, *bits, reason)


def with_weights(plan: Sequence[LayerPlan]) -> list[LayerPlan]:
    """The quantized layers, without the inputs of attention products."""
    return [entry for entry in plan if entry.is_quantized and entry.role != "product"]
