"""A float detector becomes a quantized one, and a quantized one a folder and back."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from common.checkpoints.read import load_tensors, save_tensors
from common.checkpoints.state import load_state
from common.config.schema import QuantizationConfig
from common.detection.attention import AttentionInput
from common.detection.detector import Detector, build_detector
from common.quantization.description import DESCRIPTION, check_plan, read_config, read_description
from common.quantization.layers import (
    output_axis,
    quantized_layer,
    quantized_layers,
    rounded_attention_input,
    rounded_attention_inputs,
)
from common.quantization.placement import OWN_INPUTS, TENSOR_BITS, Placement
from common.quantization.policy import FLOAT, LayerPlan
from common.quantization.quantizers import input_quantizer, weight_quantizer
from common.quantization.tensors import TensorQuantizers, with_tensors
from common.runtime.errors import UserError
from common.runtime.files import write_checked_json

TENSORS = "model.safetensors"


def quantize(
    teacher: nn.Module, plan: Sequence[LayerPlan], config: QuantizationConfig, placement: Placement = OWN_INPUTS
) -> nn.Module:
    """A copy of `teacher` whose planned layers round; it computes the same until its quantizers are started.

    `placement` says which layers share a quantizer and which tensors between layers have one.
    """
    student = copy.deepcopy(teacher)
    shared: dict[tuple[str, int], nn.Module] = {}
    for entry in plan:
        layer: Any = student.get_submodule(entry.name)
        if entry.weight_bits == entry.activation_bits == FLOAT:
            continue
        parent, _, own = entry.name.rpartition(".")
        if isinstance(layer, AttentionInput):
            device = next(student.parameters()).device
            rounded = rounded_attention_input(layer, entry.activation_bits, config)
            setattr(student.get_submodule(parent), own, rounded.to(device))
            continue
        axis = output_axis(layer)
        channels = tuple(n if i == axis else 1 for i, n in enumerate(layer.weight.shape))
        shape = channels if config.weight_granularity == "channel" else (1,)
        device = layer.weight.device
        of_weight, of_input = None, None
        if entry.weight_bits < FLOAT:
            of_weight = weight_quantizer(shape, entry.weight_bits, config).to(device)
        if entry.activation_bits < FLOAT and entry.name not in placement.covered:
            reads = placement.shared.get(entry.name, entry.name), entry.activation_bits
            if reads not in shared:
                shared[reads] = input_quantizer(entry.activation_bits, config).to(device)
            of_input = shared[reads]
        setattr(student.get_submodule(parent), own, quantized_layer(layer, of_weight, of_input))
    if placement.tensors:
        device = next(student.parameters()).device
        made: dict[str, nn.Module] = {}
        between = {
            name: made.setdefault(placement.shared.get(name, name), input_quantizer(TENSOR_BITS, config).to(device))
            for name in placement.tensors
        }
        student.tensor_quantizers = TensorQuantizers(between, quantized_layers(student))
    student.placement = placement  # type: ignore[assignment]
    return student


def save_quantized(
    directory: Path,
    student: nn.Module,
    plan: Sequence[LayerPlan],
    family: str,
    architecture: Mapping[str, Any],
    config: QuantizationConfig,
) -> None:
    """Writes `model.safetensors` and, last, `quantization.json`; together they are all that `load_quantized` needs.

    Raises:
        UserError: the folder cannot be written.
    """
    parts: dict[str, Any] = {**quantized_layers(student), **rounded_attention_inputs(student)}
    named = [(n, q) for n, layer in parts.items() for q in (layer.weight_quantizer, layer.input_quantizer)]
    named += list(getattr(student, "tensor_quantizers", nn.ModuleDict()).items())
    for name, quantizer in named:
        if quantizer is not None and not quantizer.initialised:
            raise ValueError(f"{name}: not calibrated")
    save_tensors(directory / TENSORS, student.state_dict(), {"family": family})
    description = {
        "family": family,
        "architecture": dict(architecture),
        "quantization": config.model_dump(mode="json"),
        "layers": [asdict(entry) for entry in plan],
        "placement": asdict(student.placement),  # type: ignore[call-overload]
    }
    write_checked_json(directory / DESCRIPTION, description)


def saved_plan(directory: Path) -> list[LayerPlan]:
    """What became of each layer in a folder of `save_quantized`.

    Raises:
        UserError: the folder is incomplete or damaged.
    """
    return read_description(directory).plan


def load_quantized(directory: Path) -> tuple[Detector, nn.Module]:
    """The detector and its quantized module, in eval mode on the CPU, from a folder alone.

    Raises:
        UserError: the folder is incomplete or damaged.
    """
    description = read_description(directory)
    config = read_config(description, directory)
    state, _ = load_tensors(directory / TENSORS)
    try:
        detector = build_detector(description.family, description.architecture)
        module = detector.build()
        check_plan(description, detector.quantization_policy(module))
        module = quantize(module, description.plan, config, description.placed)
        load_state(module, state, str(directory / TENSORS), "quantization.json beside it")
    except (UserError, LookupError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        found = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{directory}: damaged quantized checkpoint ({found}); make it again") from error
    return with_tensors(detector), module.eval()
