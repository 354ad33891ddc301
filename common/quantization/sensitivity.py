"""How much the rounding of each layer alone changes what a detector predicts."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm

from common.config.schema import QuantizationConfig
from common.detection.detector import Detector
from common.detection.prediction_distance import prediction_distance
from common.quantization.calibrate import start_inputs, start_weight
from common.quantization.convert import quantize
from common.quantization.layers import QuantLayer, quantized_layers, weight_count
from common.quantization.observers import feeds
from common.quantization.policy import LayerPlan, with_weights


@dataclass(frozen=True)
class Sensitivity:
    """A layer, and the mean `prediction_distance` over the images when it alone is quantized."""

    name: str
    role: str
    weights: int  # their number
    planned_bits: tuple[int, int]  # of weights and activations
    planned: float  # change at those bits
    wider: dict[int, float]  # change at each of `mixed_precision_bits`, for weights and inputs


@torch.no_grad()
def scan(
    detector: Detector,
    teacher: nn.Module,
    plan: Sequence[LayerPlan],
    batches: Sequence[Tensor],
    config: QuantizationConfig,
) -> list[Sensitivity]:
    """Rounds one layer after the other, at its planned bits and at more, to the nearest code within searched ranges.

    No label and no score is used, only the float detector's predictions on the same images (as in ZeroQ, Cai et al.
    2020, arXiv 2001.00281, section 3.2).

    Args:
        detector: the adapter.
        teacher: the float module, in eval mode on the images' device; it is not changed.
        plan: from `plan_layers`; what it leaves in float is not scanned.
        batches: of images [B, 3, H, W] in [0, 1].
        config: settings; `mixed_precision_bits` are those that are tried besides the planned ones.

    Returns:
        One entry for each quantized layer, in the plan's order, without attention inputs, which have no weights.
    """
    planned = _changes(detector, teacher, plan, batches, config)
    wider = {
        bits: _changes(detector, teacher, [entry.widened(bits) for entry in plan], batches, config)
        for bits in sorted(set(config.mixed_precision_bits))
    }
    return [
        Sensitivity(
            entry.name,
            entry.role,
            weight_count(teacher, entry.name),
            (entry.weight_bits, entry.activation_bits),
            planned[entry.name],
            {bits: changes[entry.name] for bits, changes in wider.items()},
        )
        for entry in with_weights(plan)
    ]


def _changes(
    detector: Detector,
    teacher: nn.Module,
    plan: Sequence[LayerPlan],
    batches: Sequence[Tensor],
    config: QuantizationConfig,
) -> dict[str, float]:
    student = quantize(teacher, plan, config)
    layers = quantized_layers(student)
    entries = {entry.name: entry for entry in plan}
    runs = feeds(detector, teacher, batches)
    references = [run(teacher) for run in runs]
    start_inputs(teacher, layers, entries, runs, config)
    for name, layer in layers.items():
        start_weight(layer, entries[name].weight_bits, config)
        _switch(layer, False)
    changes = {}
    for name, layer in tqdm(layers.items(), desc="sensitivity", leave=False, disable=None):
        _switch(layer, True)
        pairs = zip(references, runs, strict=True)
        changes[name] = sum(float(prediction_distance(r, run(student))) for r, run in pairs) / len(runs)
        _switch(layer, False)
    return changes


def _switch(layer: QuantLayer, on: bool) -> None:
    """A quantizer that is not initialised returns its input as it is."""
    for quantizer in (layer.weight_quantizer, layer.input_quantizer):
        if quantizer is not None:
            quantizer.initialised = on  # type: ignore[assignment]
