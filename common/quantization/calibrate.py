"""Calibration: the ranges of all quantizers, the rounding of the weights, the statistics, and a report of it."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from common.config.schema import QuantizationConfig
from common.detection.detector import Detector
from common.quantization.coordinate_descent import coordinate_descent
from common.quantization.full_placement import with_tensors
from common.quantization.gptq import compensate, groups_of_layers, input_hessians
from common.quantization.hooks import Feed, Sampler, feeds, relative_errors, sample_inputs, watching
from common.quantization.layers import QuantLayer, output_axis, quantized_layers, rounded_attention_inputs, weight_count
from common.quantization.norms import correct_batch_norm
from common.quantization.placement import tensor_range
from common.quantization.policy import LayerPlan
from common.runtime.environment import temporarily

REPORTED_BATCHES = 1  # on which the errors of the report are measured


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
    runs = feeds(with_tensors(detector), teacher, batches)
    read = start_tensors(student, runs, config)
    statistics_layers = detector.statistics_layers(teacher)
    parts: dict[str, Any] = {**layers, **rounded_attention_inputs(student)}
    kinds = start_inputs(teacher, parts, entries, runs, config)
    _round_weights(student, layers, entries, runs, config)
    if config.batch_norm_correction and statistics_layers:
        correct_batch_norm(teacher, student, statistics_layers, runs)
    errors = relative_errors(teacher, student, list(parts), runs[:REPORTED_BATCHES])
    rows = [_row(teacher, entry, parts, original, kinds, errors, config) for entry in plan]
    return Report([row | _tensor_of(student, read.get(row["name"]), config) for row in rows])


def start_inputs(
    teacher: nn.Module,
    parts: Mapping[str, Any],
    entries: dict[str, LayerPlan],
    batches: Sequence[Feed],
    config: QuantizationConfig,
) -> dict[str, str]:
    """Starts the input quantizers of layers and of attention inputs, in place; returns the kind of each range:
    symmetric, unsigned, asymmetric, logarithmic or minifloat."""
    names = [name for name, part in parts.items() if part.input_quantizer is not None]
    seen = batches[:1] if config.scale_init == "lsq" else batches
    samples = sample_inputs(teacher, names, seen)
    kinds: dict[str, str] = {}
    started: dict[int, str] = {}  # layers that read the same tensor share a quantizer
    for name in tqdm(names, desc="activation ranges", leave=False, disable=None):
        quantizer = parts[name].input_quantizer
        if id(quantizer) not in started:
            started[id(quantizer)] = quantizer.start_input(samples[name], entries[name].activation_bits, config)
        kinds[name] = started[id(quantizer)]
    return kinds


def start_tensors(student: nn.Module, batches: Sequence[Feed], config: QuantizationConfig) -> dict[str, str]:
    """Starts the quantizers of the tensors between layers, if there are any, in place, before all other quantizers.

    Returns:
        Layers without a quantizer of their own, and the tensor that each of them reads, if it is always the same one.
    """
    tensors: Any = getattr(student, "tensor_quantizers", None)
    if tensors is None:
        return {}
    sampler = Sampler(len(batches))
    read: dict[str, set[str]] = {}

    def take(name: str, x: Tensor) -> Tensor:
        sampler.take(name, x)
        return x

    def note(name: str, x: Any) -> None:
        read.setdefault(name, set()).add(x._quantizer)

    placement: Any = student.placement
    with temporarily(tensors, observe=take), watching(student, placement.covered, inputs=note):
        for run in batches:
            run(student)
    samples: dict[str, list[Tensor]] = {}
    for name, sample in sampler.values().items():
        samples.setdefault(placement.shared.get(name, name), []).append(sample)
    for name, parts in tqdm(samples.items(), desc="tensor ranges", leave=False, disable=None):
        sample = torch.cat(parts)
        tensors.of(name).start(tensor_range(sample, placement.tensors[name], config.activation_range))
    return {layer: next(iter(names)) for layer, names in read.items() if len(names) == 1}


def _round_weights(
    student: nn.Module,
    layers: dict[str, QuantLayer],
    entries: dict[str, LayerPlan],
    batches: Sequence[Feed],
    config: QuantizationConfig,
) -> None:
    rounded = {name: layer for name, layer in layers.items() if layer.weight_quantizer is not None}
    nearest = config.rounding == "nearest"
    groups = [list(rounded)] if nearest else groups_of_layers(rounded)
    unrounded = copy.deepcopy(student) if len(groups) > 1 else student  # all Hessians are those of float weights
    with tqdm(total=len(rounded), desc="weights", leave=False, disable=None) as bar:
        for group in groups:
            hessians = {} if nearest else input_hessians(unrounded, rounded, batches, group)
            for name in group:
                start_weight(rounded[name], entries[name].weight_bits, config)
                if not nearest:
                    round_weight(rounded[name], hessians.pop(name), descend=config.rounding == "coordinate_descent")
                bar.update()


@torch.no_grad()
def round_weight(layer: QuantLayer, hessian: Tensor, descend: bool) -> None:
    """Moves the weight of a started quantizer, in place, so that its nearest levels are those of GPTQ or, with
    `descend`, of GPTQ and coordinate descent, which moves the scale as well.

    A transposed convolution counts as a linear layer from the channels of a pixel to the patch it paints; that patches
    overlap is left out of account.
    """
    quantizer: Any = layer.weight_quantizer
    weight, scale = layer.weight, quantizer.scale
    painted = isinstance(layer, nn.ConvTranspose2d)
    if painted:  # [out, kh, kw, in]
        weight, scale = weight.permute(1, 2, 3, 0), scale.permute(1, 2, 3, 0) if scale.ndim > 1 else scale
    if descend:
        weight, scale = coordinate_descent(weight, scale, quantizer.levels(), hessian)
        quantizer.scale.copy_(scale.permute(3, 0, 1, 2) if painted and scale.ndim > 1 else scale)
    else:
        weight = compensate(weight, scale, quantizer.levels(), hessian)
    layer.weight.copy_(weight.permute(3, 0, 1, 2) if painted else weight)


def start_weight(layer: QuantLayer, bits: int, config: QuantizationConfig) -> None:
    """Gives the weight's quantizer, if there is one, its range for so many bits, in place."""
    quantizer: Any = layer.weight_quantizer
    if quantizer is not None:
        quantizer.start_weight(layer.weight, bits, output_axis(layer), config)


def _row(
    teacher: nn.Module,
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
    if entry.role != "attention_input":
        row["weights"] = weight_count(teacher, entry.name)
    if entry.name not in layers:
        return row
    layer = layers[entry.name]
    if layer.weight_quantizer is not None:
        weight = original[entry.name]
        difference = layer.weight_quantizer(layer.weight) - weight
        power = float(weight.square().sum())  # 0 where training or pruning left nothing
        row["weight_error"] = float(difference.square().sum()) / power if power else 0.0
        row["weight_granularity"] = config.weight_granularity
        row["weight_scale"] = float(layer.weight_quantizer.scale.mean())
    if layer.input_quantizer is not None:
        row["activation_range"] = kinds[entry.name]
        row["activation_scale"] = float(layer.input_quantizer.scale.mean())
    return row | {"output_error": errors[entry.name]}


def _tensor_of(student: Any, name: str | None, config: QuantizationConfig) -> dict[str, Any]:
    """What a row says of the tensor between layers that its layer reads; nothing for a layer that rounds by itself."""
    if name is None:
        return {}
    quantizer = student.tensor_quantizers.of(name)
    kind = "unsigned" if quantizer.low == 0 else "asymmetric"
    kind = kind if config.activation_range == "auto" else config.activation_range
    return {"input_tensor": name, "activation_range": kind, "activation_scale": float(quantizer.scale.mean())}
