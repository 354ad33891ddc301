"""How much the rounding of each layer alone changes what a detector predicts, and bits that follow from it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from common.config.schema import QuantizationConfig
from common.detection.detector import Detector
from common.detection.prediction_distance import rows_loss
from common.quantization.calibrate import start_inputs, start_weight
from common.quantization.convert import quantize
from common.quantization.layers import QuantLayer, quantized_layers
from common.quantization.observers import feeds
from common.quantization.policy import FLOAT, LayerPlan
from common.runtime.errors import UserError


@dataclass(frozen=True)
class Sensitivity:
    """A layer, and the change of the predictions (`rows_loss`, a mean over images) when it alone is rounded."""

    name: str
    role: str
    weights: int  # their number
    planned_bits: tuple[int, int]  # of weights and activations
    planned: float  # change at those bits
    wider: dict[int, float]  # change at each of `budget_bits`, for weights and inputs


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
        config: settings; `budget_bits` are those that are tried besides the planned ones.

    Returns:
        One entry for each quantized layer, in the plan's order, without the inputs of products, which have no weights.
    """
    planned = _changes(detector, teacher, plan, batches, config)
    wider = {
        bits: _changes(detector, teacher, [_widened(entry, bits, "") for entry in plan], batches, config)
        for bits in sorted(set(config.budget_bits))
    }
    return [
        Sensitivity(
            entry.name,
            entry.role,
            _size(teacher, entry.name),
            (entry.weight_bits, entry.activation_bits),
            planned[entry.name],
            {bits: changes[entry.name] for bits, changes in wider.items()},
        )
        for entry in _with_weights(plan)
    ]


def meet_budget(plan: Sequence[LayerPlan], found: Sequence[Sensitivity], budget: float) -> list[LayerPlan]:
    """Gives more bits to the layers whose predictions gain most for each bit, until the weights have `budget` bits.

    Bits are counted as the mean over the weights of all quantized layers. A step takes a layer from the bits that it
    has to any of those that were scanned; one that no longer fits is passed over for a smaller one.

    Raises:
        UserError: the budget is below what the plan needs already.
    """
    count, spent = _spent([(entry.weights, entry.planned_bits[0]) for entry in found], budget)
    chosen: dict[str, int] = {}
    while steps := [
        step
        for entry in found
        for step in _steps(entry, chosen.get(entry.name, 0))
        if spent + step.cost <= budget * count
    ]:
        best = max(steps)
        spent += best.cost
        chosen[best.name] = best.bits
    reasons = {name: f"; {bits} bits by the budget of {budget}" for name, bits in chosen.items()}
    return [
        _widened(entry, chosen[entry.name], reasons[entry.name]) if entry.name in chosen else entry for entry in plan
    ]


def check_budget(plan: Sequence[LayerPlan], module: nn.Module, budget: float, widths: Sequence[int]) -> None:
    """Whether `meet_budget` can meet it by giving layers one of `widths`, before anything is scanned.

    Raises:
        UserError: the budget is below what the plan needs already, or no layer would get more bits than it has.
    """
    layers = _with_weights(plan)
    _spent([(_size(module, entry.name), entry.weight_bits) for entry in layers], budget)
    if all(max(widths) <= min(entry.weight_bits, entry.activation_bits) for entry in layers):
        raise UserError(
            f"quantization.budget_bits: found {list(widths)}, but all layers have as many bits; give more, lower "
            "quantization.weight_bits, or leave out quantization.budget"
        )


def _spent(layers: Sequence[tuple[int, int]], budget: float) -> tuple[int, int]:
    """The number of weights of layers (weights, planned bits), and of their bits; those in float count as 8."""
    count = sum(weights for weights, _ in layers)
    spent = sum(weights * min(bits, 8) for weights, bits in layers)
    if spent > budget * count + 1e-6:
        raise UserError(
            f"quantization.budget: {budget} bits, but the layers have {spent / count:.2f} on average; raise it, "
            "lower quantization.weight_bits, or leave out some of quantization.eight_bit_roles"
        )
    return count, spent


class _Step(NamedTuple):
    """More bits for one layer; the largest is the best."""

    gain: float  # fall of its change for each bit of `cost`
    cost: int  # bits that its weights take besides those they have
    name: str
    bits: int


def _steps(entry: Sensitivity, now: int) -> Iterator[_Step]:
    """All ways on from `now` bits (0: the planned ones) that lower the change."""
    changes = {0: entry.planned} | entry.wider
    planned = entry.planned_bits[0]
    for bits, change in entry.wider.items():
        if bits > max(now, min(entry.planned_bits)) and change < changes[now]:
            cost = entry.weights * (max(bits, planned) - max(now, planned))
            yield _Step((changes[now] - change) / max(cost, 1), cost, entry.name, bits)


def _widened(entry: LayerPlan, bits: int, reason: str) -> LayerPlan:
    if not _is_quantized(entry):
        return entry
    more = [max(planned, bits) for planned in (entry.weight_bits, entry.activation_bits)]
    return replace(entry, weight_bits=more[0], activation_bits=more[1], reason=entry.reason + reason)


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
