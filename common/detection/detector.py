"""What zsqdet asks of a detector, and how one is loaded."""

import importlib
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

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
    """The adapter of one detector family. It holds a checkpoint; the modules it works on are passed in.

    A quantized copy keeps the module names of the original, so every method takes teachers and students alike.
    """

    class_names: tuple[str, ...]
    stride: int  # sides of an image batch must be multiples of it
    architecture: Mapping[str, Any]  # JSON-able: all that `from_architecture` needs to build the module without weights

    def build(self) -> nn.Module:
        """Returns a new module in eval mode, float32 on the CPU, with the checkpoint's weights."""

    def head_output(
        self, module: nn.Module, images: Tensor, targets: Sequence[Targets] | None = None, proposals: object = None
    ) -> HeadOutput:
        """Runs `module` on images [B, 3, H, W] in the module's own train/eval mode.

        With targets, `losses` holds the detector's training losses for each image by itself ([B], gains included), so
        that the batch size never changes a loss. `proposals` are the teacher's, for a two-stage student.
        """

    def detect(
        self, module: nn.Module, images: Tensor, confidence: float, iou: float, max_detections: int
    ) -> list[Detections]:
        """Detections of each image above `confidence`, after class-wise suppression at `iou`."""

    def statistics_layers(self, module: nn.Module) -> list[StatisticsLayer]:
        """Where stage one matches statistics, in execution order; the first one sees the image. Empty for a
        detector without BatchNorm, which is then a `TransformerDetector`."""

    def feature_layers(self, module: nn.Module) -> list[str]:
        """Names of the modules whose outputs ([B, ...]) distillation compares."""

    def quantization_policy(self, module: nn.Module) -> list[LayerPolicy]:
        """Every Conv2d, ConvTranspose2d, Linear and AttentionInput with its role, in the module's order."""


@runtime_checkable
class TransformerDetector(Protocol):
    """What a detector offers besides, where stage one is to look at its attention."""

    def attention_layers(self, module: nn.Module) -> list[AttentionLayer]:
        """The attention of every block, in execution order."""

    def normed_layers(self, module: nn.Module) -> list[NormedLayer]:
        """Each LayerNorm whose output one layer alone reads, in any order."""


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


def load_detector(family: str, weights: Path) -> Detector:
    """Loads a float checkpoint with the adapter of `family` (a folder beside common/ with an adapter.py).

    Raises:
        UserError: unknown family; missing, damaged or unsafe checkpoint.
    """
    return _adapter(family).load(weights)


def build_detector(family: str, architecture: Mapping[str, Any]) -> Detector:
    """The detector of `family` with untrained weights, for a state that is loaded afterwards."""
    return _adapter(family).from_architecture(architecture)


def _adapter(family: str) -> Any:
    if not family.isidentifier() or not find_spec(family) or not find_spec(f"{family}.adapter"):
        root = Path(__file__).parents[2]
        known = ", ".join(sorted(p.parent.name for p in root.glob("*/adapter.py")))
        raise UserError(f"family: unknown detector {family!r}; known ones are {known}")
    return importlib.import_module(f"{family}.adapter")
