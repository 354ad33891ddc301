"""Which tensors have a quantizer: the profile of the device, found by following one run of the detector.

`inputs`: each quantized layer rounds its input, and layers that read the same tensor share one quantizer. OpenVINO and
TensorRT fuse the rest by themselves. `full`: the tensors between layers have quantizers too, by the rules of
`full_placement.py`, as ONNX Runtime and OpenCV need it.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from common.detection.detector import Detector
from common.quantization.full_placement import SIGMOID, Tensors, followed
from common.quantization.hooks import watching
from common.quantization.policy import FLOAT, LayerPlan
from common.quantization.ranges import Kind, Range
from common.quantization.ranges import activation_range as search_range
from common.runtime.errors import UserError

TENSOR_BITS = 8
EXAMPLE_SIDE = 4  # of the image that is followed, in strides
PLAIN, GATED = "plain", "silu"  # kinds of tensors besides SIGMOID


@dataclass(frozen=True)
class Placement:
    """Names of layers and tensors."""

    # A layer and the first one that reads the same tensor; a tensor and the first one that has the same scale.
    shared: Mapping[str, str] = field(default_factory=dict)
    tensors: Mapping[str, str] = field(default_factory=dict)  # a tensor between layers, and its kind
    covered: Sequence[str] = field(default_factory=list)  # layers whose input one of these tensors is


OWN_INPUTS = Placement()  # a quantizer for the input of each layer


@torch.no_grad()
def find_placement(
    detector: Detector, teacher: nn.Module, plan: Sequence[LayerPlan], profile: str, concat_scales: str = "own"
) -> Placement:
    """Follows the float module on one random image.

    Args:
        detector: the adapter.
        teacher: in eval mode; it is not changed.
        plan: from `plan_layers`.
        profile: `inputs` or `full`.
        concat_scales: `shared` for one scale for all parts of a concatenation, or `own`.

    Raises:
        UserError: the plan has a layer that never runs here, or bits that the profile cannot express.
    """
    layers = [entry.name for entry in plan if entry.is_quantized and entry.role != "attention_input"]
    device = next(teacher.parameters()).device
    generator = torch.Generator().manual_seed(0)
    side = EXAMPLE_SIDE * detector.stride
    image = torch.rand(1, 3, side, side, generator=generator).to(device)
    read: dict[str, list[tuple[Tensor, int]]] = {name: [] for name in layers}
    with watching(teacher, layers, inputs=lambda name, x: read[name].append((x, x._version))):
        if profile == "inputs":
            detector.head_output(teacher, image)
            _check_all_ran(read)
            return Placement(shared=_groups(read))
        _check_eight_bits(plan)
        seen: dict[str, None] = {}

        def note(name: str, x: Tensor) -> Tensor:
            seen.setdefault(name)
            return x

        mode = Tensors(note)
        covered: dict[str, bool] = {}

        def look(name: str, x: Any) -> None:
            covered[name] = covered.get(name, True) and getattr(x, "_quantizer", None) is not None

        with watching(teacher, layers, inputs=look), followed(teacher, set(layers), mode):
            detector.head_output(teacher, image)
    _check_all_ran(read)
    shared = _joined(mode.joined, seen) if concat_scales == "shared" else {}
    tensors = {name: PLAIN if name in shared else _kind(name, mode) for name in seen}
    return Placement(shared, tensors, [n for n, on_grid in covered.items() if on_grid])


def tensor_range(sample: Tensor, kind: str, activation_range: Kind | Literal["auto"]) -> Range:
    """The range of a tensor between layers, from a sample [n] with its smallest and largest value."""
    if kind == SIGMOID:
        return Range(sample.new_full((1,), 2.0**-TENSOR_BITS), 0, 2**TENSOR_BITS - 1, sample.new_zeros(1))
    found: Kind = "unsigned" if sample.min() >= 0 else "asymmetric"
    found = found if activation_range == "auto" else activation_range
    return search_range(sample, TENSOR_BITS, found, "mse", True, functional.silu if kind == GATED else None)


def _kind(name: str, mode: Tensors) -> str:
    return SIGMOID if name.endswith(f"/{SIGMOID}") else GATED if name in mode.gated else PLAIN


def _groups(read: Mapping[str, list[tuple[Tensor, int]]]) -> dict[str, str]:
    """Layers by the first one that reads the same tensors in all of its calls."""
    first: dict[tuple[tuple[int, int], ...], str] = {}
    # The tensors are held until here, so that no two of them have one identity; a change in place counts as another.
    return {name: first.setdefault(tuple((id(x), v) for x, v in inputs), name) for name, inputs in read.items()}


def _joined(joins: Sequence[Sequence[str]], names: Iterable[str]) -> dict[str, str]:
    """Each tensor that a concatenation reads or makes, with the first one of all that so have one scale with it."""
    groups: list[set[str]] = []
    for join in joins:
        touched = [group for group in groups if not group.isdisjoint(join)]
        groups = [group for group in groups if group.isdisjoint(join)] + [set(join).union(*touched)]
    order = list(names)
    return {name: min(group, key=order.index) for group in groups for name in sorted(group, key=order.index)}


def _check_all_ran(read: Mapping[str, Sequence[object]]) -> None:
    idle = [name for name, inputs in read.items() if not inputs]
    if idle:
        raise UserError(
            f"quantization: {idle[0]} does not run in training, so that nothing can be calibrated for it; leave it in "
            "float (quantization.float_roles, quantization.layers)"
        )


def _check_eight_bits(plan: Sequence[LayerPlan]) -> None:
    for entry in plan:
        if entry.role != "attention_input" and entry.activation_bits not in (8, FLOAT):
            raise UserError(
                f"quantization.profile: full has activations of 8 bits, and {entry.name} has {entry.activation_bits}; "
                "set quantization.activation_bits=8; for less take quantization.profile=inputs, which "
                "OpenVINO runs (export=openvino)"
            )
