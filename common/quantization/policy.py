"""Which layer gets how many bits, and why."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from torch import nn

from common.config.schema import QuantizationConfig
from common.detection.detector import Detector, TransformerDetector
from common.detection.types import LayerPolicy, Role
from common.runtime.errors import UserError

FLOAT = 32  # bits of what is not quantized
UNIFORM_BITS = 8  # from so many bits on levels are uniform whatever the configuration says


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
        UserError: a pattern that matches no layer, or gives bits only to layers that always stay in float; or a
            setting for transformers where the detector is none.
    """
    policy = detector.quantization_policy(module)
    _check_transformer(detector, policy, config)
    for pattern, bits in config.layers.items():
        matched = [layer for layer in policy if fnmatchcase(layer.name, pattern)]
        if not matched:
            example = policy[len(policy) // 2].name if policy else "none"
            raise UserError(f"quantization.layers: no layer matches {pattern!r}; names look like {example}")
        if all(layer.always_float for layer in matched) and min(bits.weight_bits, bits.activation_bits) < FLOAT:
            kept = f"{matched[0].name} ({matched[0].reason}), which stays in float"
            raise UserError(f"quantization.layers: {pattern!r} matches only {kept}; remove the pattern")
    return [_plan(layer, config) for layer in policy]


def _check_transformer(detector: Detector, policy: Sequence[LayerPolicy], config: QuantizationConfig) -> None:
    if config.fold_layernorm and not isinstance(detector, TransformerDetector):
        raise UserError("quantization.fold_layernorm: found true, but this detector has no LayerNorm; leave it out")
    if config.softmax_quantizer != "auto" and not any(layer.role == "attention_input" for layer in policy):
        raise UserError(
            f"quantization.softmax_quantizer: found {config.softmax_quantizer!r}, but this detector has no attention "
            "whose inputs are quantized; leave it out"
        )


def idle_levels(plan: Sequence[LayerPlan], config: QuantizationConfig) -> list[str]:
    """A line for each kind of levels that a configuration asks for and no layer of the plan has bits for."""
    lines = []
    for side in ("weight", "activation"):
        levels = getattr(config, f"{side}_levels")
        if levels != "uniform" and not any(getattr(entry, f"{side}_bits") < UNIFORM_BITS for entry in plan):
            lines.append(
                f"quantization.{side}_levels: {levels} is for less than {UNIFORM_BITS} bits, which no layer has; "
                "levels are uniform"
            )
    return lines


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
    if layer.role == "attention_input":
        bits = (FLOAT, bits[1])  # there are no weights
    return LayerPlan(layer.name, layer.role, *bits, reason)


def with_weights(plan: Sequence[LayerPlan]) -> list[LayerPlan]:
    """The quantized layers, without attention inputs."""
    return [entry for entry in plan if entry.is_quantized and entry.role != "attention_input"]
