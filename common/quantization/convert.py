"""A float detector becomes a quantized one, and a quantized one a folder and back.

The folder's quantization.json is read against a schema before anything is built from it. What a quantized detector is
called (bits, levels) is here as well.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field
from torch import nn

from common.checkpoints.read import load_tensors, save_tensors
from common.checkpoints.state_dict import load_state
from common.checkpoints.strict_json import Strict, checked, read_strictly
from common.config.schema import QuantizationConfig
from common.detection.attention import AttentionInput
from common.detection.detector import Detector, build_detector
from common.detection.types import LayerPolicy, Role
from common.quantization.full_placement import TensorQuantizers, with_tensors
from common.quantization.layers import (
    output_axis,
    quantized_layer,
    quantized_layers,
    rounded_attention_input,
    rounded_attention_inputs,
    softmax_kind,
)
from common.quantization.placement import OWN_INPUTS, TENSOR_BITS, Placement
from common.quantization.policy import FLOAT, UNIFORM_BITS, LayerPlan
from common.quantization.quantizers import input_quantizer, weight_quantizer
from common.runtime.errors import UserError
from common.runtime.files import is_same, is_unchanged, sha256, write_checked_json

TENSORS = "model.safetensors"

Row = Mapping[str, Any]
UNIFORM = "uniform"
DESCRIPTION = "quantization.json"
Bits = Annotated[int, Field(ge=2, le=FLOAT)]
Name = Annotated[str, Field(min_length=1, max_length=300)]


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
        "tensors_sha256": sha256(directory / TENSORS),
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
    if not is_same(directory / TENSORS, description.tensors_sha256):
        raise UserError(f"{directory / TENSORS}: not of the quantization.json beside it; take both from one run")
    return with_tensors(detector), module.eval()


class _Layer(Strict):
    name: Name
    role: Role
    weight_bits: Bits
    activation_bits: Bits
    reason: Annotated[str, Field(max_length=2000)]


class _Placement(Strict):
    """Of quantizers, as `placement.Placement` has it."""

    shared: dict[Name, Name] = Field(max_length=20_000)
    tensors: dict[Name, Literal["plain", "silu", "sigmoid"]] = Field(max_length=20_000)
    covered: list[Name] = Field(max_length=20_000)


class Description(Strict):
    """What a quantized detector is; `architecture` is checked by the adapter of the family."""

    model_config = ConfigDict(extra="ignore")

    family: Annotated[str, Field(min_length=1, max_length=80)]
    architecture: dict[str, Any]
    quantization: dict[str, Any]
    layers: Annotated[list[_Layer], Field(max_length=20_000)]
    placement: _Placement
    tensors_sha256: str | None = None  # of model.safetensors; older versions did not note it

    @property
    def placed(self) -> Placement:
        """Which quantizers are shared, and which stand between layers."""
        return Placement(**self.placement.model_dump())

    @property
    def plan(self) -> list[LayerPlan]:
        """What became of each layer."""
        return [LayerPlan(**entry.model_dump()) for entry in self.layers]


def read_description(directory: Path) -> Description:
    """What quantization.json in a folder of `save_quantized` says.

    Raises:
        UserError: missing or damaged.
    """
    path = directory / DESCRIPTION
    content = read_strictly(path)
    if isinstance(content, dict) and not is_unchanged(content):
        raise UserError(f"{path}: damaged quantized checkpoint (its SHA-256 is not the recorded one); make it again")
    return checked(Description, content, f"{path}: damaged quantized checkpoint")


def read_config(description: Description, directory: Path) -> QuantizationConfig:
    """Its settings.

    Raises:
        UserError: settings that there are not.
    """
    where = f"{directory / DESCRIPTION}: damaged quantized checkpoint"
    return checked(QuantizationConfig, description.quantization, where)


def check_plan(description: Description, policy: list[LayerPolicy]) -> None:
    """Compares the layers with those of the rebuilt detector.

    Raises:
        UserError: others, in another order, or with another role.
    """
    found, wanted = ([(entry.name, entry.role) for entry in rows] for rows in (description.layers, policy))
    if found != wanted:
        pairs = zip([*found, *wanted[len(found) :]], [*wanted, *found[len(wanted) :]], strict=True)
        name = next((f[0] for f, w in pairs if f != w), wanted[-1][0])
        raise UserError(f"its layers are not those of the detector, the first one at {name[:80]}")


def bits_label(quantization: Row, layers: Sequence[Row] = ()) -> str:
    """Bits and kind of levels, as "W4A8", "W4A8, codebook weights" or "W4A4, codebook weights, minifloat activations".

    Uniform levels go without saying. Others are named where some layer has less than 8 bits and so has them.

    Args:
        quantization: the section of a configuration; a key that is missing, as in older runs, counts as uniform.
        layers: rows with `role`, `weight_bits` and `activation_bits`, as in results.json; without them the bits of the
            section and of its `layers` count.
    """
    label = f"W{quantization.get('weight_bits')}A{quantization.get('activation_bits')}"
    for levels, noun in zip(levels_in_use(quantization, layers), ("weights", "activations"), strict=True):
        fp8 = "fp8 " if levels == "codebook" and quantization.get("codebook") == "fp8" else ""
        label += f", {fp8}{levels} {noun}" if levels != UNIFORM else ""
    keys = {"softmax_quantizer": "same", "activation_levels": "uniform", "scale_init": "mse"}
    settings = {key: str(quantization.get(key, default)) for key, default in keys.items()}
    attention = [row for row in layers if row.get("role") == "attention_input" and row["activation_bits"] < FLOAT]
    if any(softmax_kind(row["activation_bits"], **settings) != "same" for row in attention):
        label += ", logarithmic attention"
    return label


def levels_in_use(quantization: Row, layers: Sequence[Row] = ()) -> tuple[str, str]:
    """The kinds of levels of weights and inputs that some layer has; arguments as those of `bits_label`."""
    exceptions = quantization.get("layers") or {}
    rows = layers or [quantization, *exceptions.values()]
    kinds = []
    for side in ("weight", "activation"):
        levels = str(quantization.get(f"{side}_levels", UNIFORM))
        bits = [row.get(f"{side}_bits") for row in rows]
        kinds.append(levels if any(number is not None and number < UNIFORM_BITS for number in bits) else UNIFORM)
    return kinds[0], kinds[1]


def mean_weight_bits(layers: Sequence[Row]) -> float | None:
    """The mean bits of all weights that are rounded, from the rows of results.json; None without any.

    A row has `weight_bits` and, where the layer has weights, `weights`, their number.
    """
    rounded = [row for row in layers if row.get("weights") and row["weight_bits"] < FLOAT]
    count = sum(row["weights"] for row in rounded)
    return sum(row["weights"] * row["weight_bits"] for row in rounded) / count if count else None
