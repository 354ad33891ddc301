"""How much the rounding of each layer alone changes what a detector predicts, and bits that follow from it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from tqdm import tqdm

from common.config import QuantizationConfig
from common.detector import Detector
from common.errors import UserError
from common.predictions import rows_loss
from common.quantization.calibrate import start_inputs, start_weight
from common.quantization.convert import quantize
from common.quantization.modules import QuantLayer, quantized_layers
from common.quantization.observe import feeds
from common.quantization.policy import FLOAT, LayerPlan

MORE = 8  # bits of the layers that a budget is spent on


@dataclass(frozen=True)
class Sensitivity:
    """A layer, and the change of the predictions (`rows_loss`, a mean over images) when it alone is rounded."""

    name: str
    role: str
    weights: int  # their number
    planned_bits: tuple[int, int]  # of weights and activations
    planned: float  # change at those bits
    eight: float  # change at 8 bits


@torch.no_grad()
def scan(
    detector: Detector,
    teacher: nn.Module,
    plan: Sequence[LayerPlan],
    batches: Sequence[Tensor],
    config: QuantizationConfig,
) -> list[Sensitivity]:
    """Rounds one layer after the other, at its planned bits and at 8, to the nearest code within searched ranges.

    No label and no score is used, only the float detector's predictions on the same images (as in ZeroQ, Cai et al.
    2020, arXiv 2001.00281, section 3.2).

    Args:
        detector: the adapter.
        teacher: the float module, in eval mode on the images' device; it is not changed.
        plan: from `plan_layers`; what it leaves in float is not scanned.
        batches: of images [B, 3, H, W] in [0, 1].
        config: settings.

    Returns:
        One entry for each quantized layer, in the plan's order, without the inputs of products, which have no weights.
    """
    planned = _changes(detector, teacher, plan, batches, config)
    eight = _changes(detector, teacher, [_widened(entry, "") for entry in plan], batches, config)
    rounded = _with_weights(plan)
    sizes = {entry.name: _size(teacher, entry.name) for entry in rounded}
    return [
        Sensitivity(e.name, e.role, sizes[e.name], (e.weight_bits, e.activation_bits), planned[e.name], eight[e.name])
        for e in rounded
    ]


def meet_budget(plan: Sequence[LayerPlan], found: Sequence[Sensitivity], budget: float) -> list[LayerPlan]:
    """Gives 8 bits to the layers whose predictions gain most for each bit, until the weights have `budget` bits.

    Bits are counted as the mean over the weights of all quantized layers. A layer that no longer fits is passed over
    for a smaller one.

    Raises:
        UserError: the budget is below what the plan needs already.
    """
    count, spent = _spent([(entry.weights, entry.planned_bits[0]) for entry in found], budget)
    chosen = set()
    for entry in sorted(found, key=_gain, reverse=True):
        cost = _cost(entry)
        if entry.planned > entry.eight and spent + cost <= budget * count:
            spent += cost
            chosen.add(entry.name)
    return [
        _widened(entry, f"; {MORE} bits by the budget of {budget}") if entry.name in chosen else entry for entry in plan
    ]


def check_budget(plan: Sequence[LayerPlan], module: nn.Module, budget: float) -> None:
    """Whether `meet_budget` can meet it, before anything is scanned.

    Raises:
        UserError: the budget is below what the plan needs already.
    """
    _spent([(_size(module, entry.name), entry.weight_bits) for entry in _with_weights(plan)], budget)


def _spent(layers: Sequence[tuple[int, int]], budget: float) -> tuple[int, int]:
    """The number of weights of layers (weights, planned bits), and of their bits."""
    count = sum(weights for weights, _ in layers)
    spent = sum(weights * min(bits, MORE) for weights, bits in layers)
    if spent > budget * count + 1e-6:
        raise UserError(
            f"quantization.budget: {budget} bits, but the layers have {spent / count:.2f} on average; raise it, "
            "lower quantization.weight_bits, or leave out some of quantization.eight_bit_roles"
        )
    return count, spent


def _cost(entry: Sensitivity) -> int:
    """The bits that 8 for each weight take besides the planned ones; none where weights stay in float."""
    return entry.weights * max(MORE - entry.planned_bits[0], 0)


def _gain(entry: Sensitivity) -> float:
    return (entry.planned - entry.eight) / max(_cost(entry), 1)


def _widened(entry: LayerPlan, reason: str) -> LayerPlan:
    if not _is_quantized(entry):
        return entry
    bits = [MORE if planned < MORE else planned for planned in (entry.weight_bits, entry.activation_bits)]
    return replace(entry, weight_bits=bits[0], activation_bits=bits[1], reason=entry.reason + reason)


def _with_weights(plan: Sequence[LayerPlan]) -> list[LayerPlan]:
    """The quantized layers, without the inputs of products."""
    return [entry for entry in plan if _is_quantized(entry) and entry.role != "product"]


def _is_quantized(entry: LayerPlan) -> bool:
    return entry.weight_bits < FLOAT or entry.activation_bits < FLOAT


def _size(module: nn.Module, name: str) -> int:
    weight = module.get_submodule(name).weight
    assert isinstance(weight, Tensor)
    return weight.numel()


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
        changes[name] = sum(float(rows_loss(r, run(student))) for r, run in pairs) / len(runs)
        _switch(layer, False)
    return changes


def _switch(layer: QuantLayer, on: bool) -> None:
    """A quantizer that is not initialised returns its input as it is."""
    for quantizer in (layer.weight_quantizer, layer.input_quantizer):
        if quantizer is not None:
            quantizer.initialised = on  # type: ignore[assignment]
