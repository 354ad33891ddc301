"""How much the rounding of each layer alone changes what a detector predicts, and mixed precision by it.

The change is estimated to second order and from one gradient; the limit is on the average bits of the weights.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from common.config.schema import QuantizationConfig
from common.detection.detector import Detector
from common.detection.prediction_distance import random_predictions
from common.quantization.calibrate import start_inputs, start_weight
from common.quantization.convert import quantize
from common.quantization.hooks import Feed, feeds, watching
from common.quantization.layers import QuantLayer, quantized_layers, weight_count
from common.quantization.policy import LayerPlan, with_weights
from common.runtime.errors import UserError

AT_A_TIME = 4  # images whose inputs and outputs of all layers are in memory


@dataclass(frozen=True)
class Sensitivity:
    """A layer, and the estimated mean `prediction_distance` over the images when it alone is quantized."""

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
    """Estimates what each layer alone does, rounded at its planned bits and at more to the nearest code.

    The change is half the sum of (g e)^2 over a layer's output, mean over images: e is the error of the output, g the
    gradient of random predictions (`random_predictions`), whose squares are the diagonal of the Gauss-Newton matrix of
    `prediction_distance`, as in BRECQ (Li et al. 2021, arXiv 2102.05426, eq. 10). Where BatchNorm is corrected, the
    means of the error's channels are left out. No label and no score is used; one gradient serves all layers and bits.

    Args:
        detector: the adapter.
        teacher: the float module, in eval mode on the images' device; it is not changed.
        plan: from `plan_layers`; what it leaves in float is not scanned.
        batches: of images [B, 3, H, W] in [0, 1].
        config: settings; `mixed_precision_bits` are those that are tried besides the planned ones.

    Returns:
        One entry for each quantized layer, in the plan's order, without attention inputs, which have no weights.
    """
    widths = sorted(set(config.mixed_precision_bits))
    runs = feeds(detector, teacher, batches)
    students = {0: _started(teacher, plan, runs, config)}
    students |= {bits: _started(teacher, [entry.widened(bits) for entry in plan], runs, config) for bits in widths}
    followed = detector.statistics_layers(teacher) if config.batch_norm_correction else ()
    corrected = {layer.convolution for layer in followed}
    changes = {bits: dict.fromkeys(layers, 0.0) for bits, layers in students.items()}
    generator = torch.Generator().manual_seed(0)
    parts = [part for images in batches for part in images.split(AT_A_TIME)]
    for images in tqdm(parts, desc="sensitivity", leave=False, disable=None):
        for name, x, output, gradient in _gradients(detector, teacher, list(students[0]), images, generator):
            for bits, layers in students.items():
                error = layers[name](x) - output
                if name in corrected:
                    error -= error.mean((0, 2, 3), keepdim=True)
                changes[bits][name] += float((error * gradient).square().sum()) / 2
    count = sum(len(images) for images in batches)
    return [
        Sensitivity(
            entry.name,
            entry.role,
            weight_count(teacher, entry.name),
            (entry.weight_bits, entry.activation_bits),
            changes[0][entry.name] / count,
            {bits: changes[bits][entry.name] / count for bits in widths},
        )
        for entry in with_weights(plan)
    ]


def _started(
    teacher: nn.Module, plan: Sequence[LayerPlan], runs: Sequence[Feed], config: QuantizationConfig
) -> Mapping[str, QuantLayer]:
    """The layers quantized by a plan, with the ranges that calibration starts from."""
    layers = quantized_layers(quantize(teacher, plan, config))
    entries = {entry.name: entry for entry in plan}
    start_inputs(teacher, layers, entries, runs, config)
    for name, layer in layers.items():
        start_weight(layer, entries[name].weight_bits, config)
    return layers


def _gradients(
    detector: Detector, teacher: nn.Module, names: Sequence[str], images: Tensor, generator: torch.Generator
) -> list[tuple[str, Tensor, Tensor, Tensor]]:
    """Of each call of a named layer its name, input, output and the gradient of random predictions by its output."""
    images = images.detach().requires_grad_()  # so that parameters, frozen or not, are left alone
    (run,) = feeds(detector, teacher, [images])
    calls: list[list[Any]] = []

    def keep(name: str, x: Tensor) -> None:
        calls.append([name, x.detach().clone(), None, None])

    def follow(name: str, output: Tensor) -> None:
        call = next(call for call in reversed(calls) if call[0] == name)
        call[2] = output.detach().clone()  # what follows may overwrite it
        output.register_hook(lambda gradient: call.__setitem__(3, gradient))

    with torch.enable_grad(), watching(teacher, names, inputs=keep, outputs=follow):
        torch.autograd.grad(random_predictions(run(teacher), generator), images)
    return [(name, x, output, gradient) for name, x, output, gradient in calls if gradient is not None]


def allocate_bits(plan: Sequence[LayerPlan], found: Sequence[Sensitivity], limit: float) -> list[LayerPlan]:
    """Gives more bits to the layers whose predictions gain most for each bit, until the weights have `limit` bits.

    Bits are counted as the mean over the weights of all quantized layers. An upgrade takes a layer from its bits to
    any of those that were scanned; one that no longer fits is passed over for a smaller one.

    Raises:
        UserError: the limit is below what the plan needs already.
    """
    count, used = _used([(entry.weights, entry.planned_bits[0]) for entry in found], limit)
    chosen: dict[str, int] = {}
    while upgrades := [
        upgrade
        for entry in found
        for upgrade in _upgrades(entry, chosen.get(entry.name, 0))
        if used + upgrade.cost <= limit * count
    ]:
        best = max(upgrades)
        used += best.cost
        chosen[best.name] = best.bits
    reasons = {name: f"; {bits} bits by the average of {limit}" for name, bits in chosen.items()}
    return [entry.widened(chosen[entry.name], reasons[entry.name]) if entry.name in chosen else entry for entry in plan]


def check_average_bits(plan: Sequence[LayerPlan], module: nn.Module, limit: float, widths: Sequence[int]) -> None:
    """Whether `allocate_bits` can meet it by giving layers one of `widths`, before anything is scanned.

    Raises:
        UserError: the limit is below what the plan needs already, or no layer would get more bits than it has.
    """
    layers = with_weights(plan)
    _used([(weight_count(module, entry.name), entry.weight_bits) for entry in layers], limit)
    if all(max(widths) <= min(entry.weight_bits, entry.activation_bits) for entry in layers):
        raise UserError(
            f"quantization.mixed_precision_bits: found {list(widths)}, but all layers have as many bits; give more, "
            "lower quantization.weight_bits, or leave out quantization.average_bits"
        )


def _used(layers: Sequence[tuple[int, int]], limit: float) -> tuple[int, int]:
    """The number of weights of layers (weights, planned bits), and of their bits; those in float count as 8."""
    count = sum(weights for weights, _ in layers)
    used = sum(weights * min(bits, 8) for weights, bits in layers)
    if used > limit * count + 1e-6:
        raise UserError(
            f"quantization.average_bits: {limit} bits, but the layers have {used / count:.2f} on average; raise it, "
            "lower quantization.weight_bits, or leave out some of quantization.eight_bit_roles"
        )
    return count, used


class _Upgrade(NamedTuple):
    """More bits for one layer; the largest is the best."""

    gain: float  # fall of its change for each bit of `cost`
    cost: int  # bits that its weights take besides those they have
    name: str
    bits: int


def _upgrades(entry: Sensitivity, now: int) -> Iterator[_Upgrade]:
    """All ways on from `now` bits (0: the planned ones) that lower the change."""
    changes = {0: entry.planned} | entry.wider
    planned = entry.planned_bits[0]
    for bits, change in entry.wider.items():
        if bits > max(now, min(entry.planned_bits)) and change < changes[now]:
            cost = entry.weights * (max(bits, planned) - max(now, planned))
            yield _Upgrade((changes[now] - change) / max(cost, 1), cost, entry.name, bits)
