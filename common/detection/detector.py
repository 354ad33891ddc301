"""The interface that every detector family implements, and how a detector is loaded."""

import importlib
import inspect
from collections.abc import Mapping, Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from common.detection.types import (
    AttentionLayer,
    Detections,
    HeadOutput,
    LayerPolicy,
    NormedLayer,
    StatisticsLayer,
    Targets,
)
from common.runtime.errors import UserError


class Detector(Protocol):
    """Adapter of one detector family. It holds a checkpoint; modules are passed to each method.

    A quantized copy has the module names of the original, so every method takes teacher and student alike.
    """

    class_names: tuple[str, ...]
    stride: int  # largest; height and width of a batch must be multiples of it
    architecture: Mapping[str, Any]  # JSON-serializable; `from_architecture` builds the module from it, without weights

    def build(self) -> nn.Module:
        """Returns a new module in eval mode, float32 on the CPU, with the checkpoint's weights."""

    def head_output(
        self, module: nn.Module, images: Tensor, targets: Sequence[Targets] | None = None, proposals: object = None
    ) -> HeadOutput:
        """Runs `module` on images [B, 3, H, W] in the module's current train/eval mode.

        With targets, `losses` holds the detector's training losses per image ([B], loss weights included), so that no
        loss depends on the batch size. `proposals` are the teacher's, for a two-stage student.
        """

    def detect(
        self, module: nn.Module, images: Tensor, confidence: float, iou: float, max_detections: int
    ) -> list[Detections]:
        """Detections of each image above `confidence`, after class-wise NMS at `iou`, at most `max_detections`."""

    def statistics_layers(self, module: nn.Module) -> list[StatisticsLayer]:
        """The BatchNorm layers whose statistics stage one matches, in execution order; the first one sees the image.
        Empty for a detector without BatchNorm, which is then a `TransformerDetector`."""

    def feature_layers(self, module: nn.Module) -> list[str]:
        """Names of the modules whose outputs ([B, ...]) distillation compares."""

    def quantization_policy(self, module: nn.Module) -> list[LayerPolicy]:
        """Every Conv2d, ConvTranspose2d, Linear and AttentionInput with its role, in the module's order."""


@runtime_checkable
class TransformerDetector(Protocol):
    """What a detector without BatchNorm offers besides: stage one uses its attention."""

    def attention_layers(self, module: nn.Module) -> list[AttentionLayer]:
        """The attention of every block, in execution order."""

    def normed_layers(self, module: nn.Module) -> list[NormedLayer]:
        """Every LayerNorm whose output goes into exactly one layer, in any order."""


def has_masks(detector: Detector) -> bool:
    """Whether its detections have masks; adapters of such detectors say so by an attribute `has_masks`."""
    return bool(getattr(detector, "has_masks", False))


def has_fixed_size(detector: object) -> bool:
    """Whether its graph takes one size of images only; adapters of such detectors say so by `has_fixed_size`."""
    return bool(getattr(detector, "has_fixed_size", False))


def is_one_to_one(detector: object) -> bool:
    """Whether its graph gives each object one box, [B, n, 6]: xyxy, score, class; adapters say so by `one_to_one`."""
    return bool(getattr(detector, "one_to_one", False))


@runtime_checkable
class ExportableDetector(Protocol):
    """What a detector offers besides, where it can become a graph of a runtime."""

    stride: int
    export_outputs: Mapping[str, Mapping[int, str]]  # the graph's outputs, and which of their axes may change

    def export_module(self, module: nn.Module) -> nn.Module:
        """A module from images [B, 3, H, W] in [0, 1] to `export_outputs` in their order. It runs `module` itself."""

    def detections(
        self, outputs: Sequence[Tensor], confidence: float, iou: float, max_detections: int
    ) -> list[Detections]:
        """The detections of each image out of the graph's outputs, as `detect` gives them."""


def takes_batches(detector: ExportableDetector) -> bool:
    """Whether the graph's outputs have an axis for the images of a batch; those of a two-stage detector have not."""
    return all("batch" in axes.values() for axes in detector.export_outputs.values())


def checked_images(images: object, stride: int) -> Tensor:
    """Images of a caller as `detect` takes them; those of uint8 are divided by 255.

    Args:
        images: a tensor [B, 3, H, W], RGB, uint8 or float in [0, 1].
        stride: of the detector.

    Raises:
        UserError: something else.
    """
    allowed = f"allowed are tensors [B, 3, H, W] whose height and width are multiples of {stride}, uint8 or in [0, 1]"
    if not isinstance(images, Tensor):
        raise UserError(f"images: found {type(images).__name__}; {allowed}")
    if images.layout != torch.strided or images.device.type == "meta":
        raise UserError(f"images: found a tensor without plain values ({images.layout}, {images.device}); {allowed}")
    shape = list(images.shape)
    if len(shape) != 4 or shape[1] != 3 or 0 in shape or shape[2] % stride or shape[3] % stride:
        raise UserError(f"images: found the shape {shape}; {allowed}")
    if images.dtype == torch.uint8:
        return images.float() / 255
    if not images.is_floating_point():
        raise UserError(f"images: found {images.dtype}; {allowed}")
    low, high = images.min().item(), images.max().item()
    if not (low >= 0 and high <= 1):  # NaN is neither
        raise UserError(f"images: found values from {low:.4g} to {high:.4g}; {allowed}")
    return images.float()


def check_limits(confidence: float, iou: float, max_detections: int) -> None:
    """Raises UserError where these are no limits of `detect`."""
    for name, value in (("confidence", confidence), ("iou", iou)):
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
            raise UserError(f"{name}: found {value!r}; allowed are numbers from 0 to 1")
    if isinstance(max_detections, bool) or not isinstance(max_detections, int) or max_detections < 1:
        raise UserError(f"max_detections: found {max_detections!r}; allowed are whole numbers from 1")


def load_detector(family: str, weights: Path, given: Mapping[str, Any] | None = None) -> Detector:
    """Loads a float checkpoint with the adapter of `family` (a folder beside common/ with an adapter.py).

    Args:
        family: its name.
        weights: the file.
        given: what the configuration says of the network where the file cannot (`detector:`); a family takes it as a
            second argument of `load`.

    Raises:
        UserError: unknown family; missing, damaged or unsafe checkpoint; settings that the family has no use for.
    """
    load = _adapter(family).load
    if not given:
        return load(weights)
    if "given" not in inspect.signature(load).parameters:
        raise UserError(f"detector: found {', '.join(given)}; a file of {family} says it all itself, leave them out")
    return load(weights, given)


def build_detector(family: str, architecture: Mapping[str, Any]) -> Detector:
    """The detector of `family` with untrained weights; a state dict is loaded afterwards."""
    return _adapter(family).from_architecture(architecture)


def families() -> dict[str, str]:
    """Module of the adapter of each known family: the folders beside common/, and what installed packages register.

    A package registers one as an entry point of the group `zsqdet.detectors`: its family's name, and its module.
    """
    root = Path(__file__).parents[2]
    own = {path.parent.name: f"{path.parent.name}.adapter" for path in sorted(root.glob("*/adapter.py"))}
    return {entry.name: entry.value for entry in entry_points(group="zsqdet.detectors")} | own


def _adapter(family: str) -> Any:
    known = families()
    if family not in known:  # nothing else is imported: this name may come from a file
        raise UserError(f"family: unknown detector {family[:80]!r}; known ones are {', '.join(sorted(known))}")
    return _imported(family, known[family])


def _imported(family: str, module: str) -> Any:
    """The module of an adapter.

    Raises:
        UserError: a package that it needs is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        missing = (error.name or "").partition(".")[0]
        if missing in ("", package, "common"):
            raise
        extra = getattr(importlib.import_module(package), "EXTRA", None)
        advice = f"run bash scripts/setup.sh {extra} or pip install -e .[{extra}]" if extra else "install it"
        raise UserError(f"family: {family} needs {missing}, which is not installed; {advice}") from error
