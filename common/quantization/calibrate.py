"""Calibration: the ranges of all quantizers, the rounding of the weights, the statistics, and a report of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from common.config.schema import QuantizationConfig
from common.detection.detector import Detector
from common.quantization.attention_inputs import rounded_inputs
from common.quantization.bn_correction import correct_batch_norm
from common.quantization.coordinate_descent import refine
from common.quantization.gptq import compensate, input_products
from common.quantization.layers import QuantLayer, output_axis, quantized_layers
from common.quantization.observers import Feed, feeds, relative_errors, sample_inputs
from common.quantization.policy import LayerPlan

REPORTED_BATCHES = 2  # on which the errors of the report are measured


@dataclass(frozen=True)
class Report:
    """`layers` has one JSON-able row for every layer of the plan, in the module's order."""

    layers: list[dict[str, Any]]


@torch.no_grad()
def calibrate(
    detector: Detector,
    teacher: nn.Module,
    student: nn.Module,
    plan: Sequence[LayerPlan],
    batches: Sequence[Tensor],
    config: QuantizationConfig,
) -> Report:
    """Starts all quantizers of `student` from images; both modules are in eval mode and on the images' device.

    Args:
        detector: the adapter of both modules.
        teacher: the float module; it is not changed.
        student: from `quantize`.
        plan: from `plan_layers`.
        batches: of images [B, 3, H, W] in [0, 1].
        config: settings.
    """
    layers = quantized_layers(student)
    entries = {entry.name: entry for entry in plan}
    original = {name: layer.weight.clone() for name, layer in layers.items()}
    runs = feeds(detector, teacher, batches)
    statistics_layers = detector.statistics_layers(teacher)
    parts: dict[str, Any] = {**layers, **rounded_inputs(student)}
    kinds = start_inputs(teacher, parts, entries, runs, config)
    _round_weights(student, layers, entries, runs, config)
    if config.batch_norm_correction and statistics_layers:
        correct_batch_norm(teacher, student, statistics_layers, runs)
    errors = relative_errors(teacher, student, list(parts), runs[:REPORTED_BATCHES])
    return Report([_row(entry, parts, original, kinds, errors, config) for entry in plan])


def start_inputs(
    teacher: nn.Module,
    parts: Mapping[str, Any],
    entries: dict[str, LayerPlan],
    batches: Sequence[Feed],
    config: QuantizationConfig,
) -> dict[str, str]:
    """Starts the input quantizers of layers and of products' inputs, in place; returns the kind of each range: signed,
    unsigned, affine, logarithmic or of few digits."""
    names = [name for name, part in parts.items() if part.input_quantizer is not None]
    seen = batches[:1] if config.scale_init == "lsq" else batches
    samples = sample_inputs(teacher, names, seen)
    kinds: dict[str, str] = {}
    for name in tqdm(names, desc="activation ranges", leave=False, disable=None):
        kinds[name] = parts[name].input_quantizer.start_input(samples[name], entries[name].activation_bits, config)
    return kinds


def _round_weights(
    student: nn.Module,
    layers: dict[str, QuantLayer],
    entries: dict[str, LayerPlan],
    batches: Sequence[Feed],
    config: QuantizationConfig,
) -> None:
    rounded = {name: layer for name, layer in layers.items() if layer.weight_quantizer is not None}
    nearest = config.rounding == "nearest"
    products = {} if nearest else input_products(student, rounded, batches)
    for name, layer in tqdm(rounded.items(), desc="weights", leave=False, disable=None):
        start_weight(layer, entries[name].weight_bits, config)
        if not nearest:
            round_weight(layer, products[name], refined=config.rounding == "coordinate_descent")


@torch.no_grad()
def round_weight(layer: QuantLayer, product: Tensor, refined: bool) -> None:
    """Moves the weight, whose range is started, to what its rounding shall give, by GPTQ or `refine`, in place.

    A transposed convolution is a linear layer from the channels of a pixel to the patch that it paints; where patches
    overlap, their sum is not seen as such.
    """
    quantizer: Any = layer.weight_quantizer
    weight, step = layer.weight, quantizer.step
    painted = isinstance(layer, nn.ConvTranspose2d)
    if painted:  # [out, kh, kw, in]
        weight, step = weight.permute(1, 2, 3, 0), step.permute(1, 2, 3, 0) if step.ndim > 1 else step
    if refined:
        weight, step = refine(weight, step, quantizer.levels(), product)
        quantizer.step.copy_(step.permute(3, 0, 1, 2) if painted and step.ndim > 1 else step)
    else:
        weight = compensate(weight, step, quantizer.levels(), product)
    layer.weight.copy_(weight.permute(3, 0, 1, 2) if painted else weight)


def start_weight(layer: QuantLayer, bits: int, config: QuantizationConfig) -> None:
    """Gives the weight's quantizer, if there is one, its range for so many bits, in place."""
    quantizer: Any = layer.weight_quantizer
    if quantizer is not None:
        quantizer.start_weight(layer.weight, bits, output_axis(layer), config)


def _row(
    entry: LayerPlan,
    layers: Mapping[str, Any],
    original: dict[str, Tensor],
    kinds: dict[str, str],
    errors: dict[str, float],
    config: QuantizationConfig,
) -> dict[str, Any]:
    row: dict[str, Any] = {
        "name": entry.name,
        "role": entry.role,
        "weight_bits": entry.weight_bits,
        "activation_bits": entry.activation_bits,
        "reason": entry.reason,
    }
    if entry.name not in layers:
        return row
    layer = layers[entry.name]
    if layer.weight_quantizer is not None:
        weight = original[entry.name]
        difference = layer.weight_quantizer(layer.weight) - weight
        row["weight_error"] = float(difference.square().sum() / weight.square().sum())
        row["weight_granularity"] = config.weight_granularity
        row["weight_step"] = float(layer.weight_quantizer.step.mean())
    if layer.input_quantizer is not None:
        row["activation_range"] = kinds[entry.name]
        row["activation_step"] = float(layer.input_quantizer.step.mean())
    return row | {"output_error": errors[entry.name]}
