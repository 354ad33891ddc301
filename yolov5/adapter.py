"""YOLOv5: official checkpoints behind the Detector protocol."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from ultralytics.nn.modules import Concat, Conv

from common.checkpoints.download import fetch
from common.checkpoints.pickled_network import check_rebuilt, described
from common.checkpoints.read import Checkpoint, load_own, read_checkpoint
from common.checkpoints.state_dict import building, load_state
from common.checkpoints.yolo_architecture import yolo_architecture
from common.detection.types import Detections, HeadOutput, HeadTerm, LayerPolicy, Role, StatisticsLayer, Targets
from common.runtime.errors import UserError
from yolo11.export import OUTPUTS, as_detections, suppressed
from yolov5 import CLASSES
from yolov5.loss import losses
from yolov5.model import BLOCKS, AnchorHead, Decoded, YoloV5, predictions

FAMILY = "yolov5"
WHERE = "weights: the architecture of this yolov5"
RELEASE = "https://github.com/ultralytics/yolov5/releases/download/v7.0"
SHA256 = {
    "yolov5n.pt": "4f180cf23ba0717ada0badd6c685026d73d48f184d00fc159c2641284b2ac0a3",
    "yolov5s.pt": "8b3b748c1e592ddd8868022e8732fde20025197328490623cc16c6f24d0782ee",
    "yolov5m.pt": None,  # no record that could be confirmed
    "yolov5l.pt": "c2323a42865bdc3d8e41795548d695b18593b3c99e9a1a8ee59b37fb46041af2",
    "yolov5x.pt": None,
}
DESCRIPTION = ("backbone", "head", "anchors", "depth_multiple", "width_multiple")  # what counts of their YAML
EARLY_BLOCKS = range(1, 5)  # strides 4 and 8 of the backbone


@dataclass
class YoloV5Detector:
    """A YOLOv5 checkpoint."""

    class_names: tuple[str, ...]
    architecture: Mapping[str, Any]  # {"yaml": YOLOv5's dict, "names": [...]}, as `yolo_architecture` allows it
    stride: int
    state: Mapping[str, Tensor] | None = None
    export_outputs: Mapping[str, Mapping[int, str]] = field(default_factory=lambda: OUTPUTS)

    def build(self) -> nn.Module:
        """A new YoloV5 in eval mode, float32 on the CPU.

        Raises:
            UserError: the weights do not fit the architecture.
        """
        module = _untrained(self.architecture)
        if self.state is not None:
            load_state(module, self.state, "weights", "this YOLOv5")
            if not bool((module.head.anchors > 0).all()):
                raise UserError("weights: anchors with sides of 0 or less; give the file that training wrote")
        return module

    def head_output(
        self, module: nn.Module, images: Tensor, targets: Sequence[Targets] | None = None, proposals: object = None
    ) -> HeadOutput:
        """Terms: `classes` [B, N, nc], `objectness` [B, N, 1] and `boxes` [B, N, 4] as logits of YOLOv5's decoding.

        Losses: box, objectness and class, gains included.
        """
        network = cast(YoloV5, module)
        maps = network(images)
        rows = torch.cat([level.flatten(1, 3) for level in network.head.levels(maps)], 1)  # [B, N, 5 + nc]
        objectness = rows[..., 4:5]
        confidence = (rows[..., 5:].detach().sigmoid().amax(-1) * objectness.detach().sigmoid()[..., 0]).float()
        terms = {
            "classes": HeadTerm(rows[..., 5:], "sigmoid", confidence),
            "objectness": HeadTerm(objectness, "sigmoid", confidence),
            "boxes": HeadTerm(rows[..., :4], "sigmoid", confidence),
        }
        wanted = {} if targets is None else losses(network.head, maps, network.strides, targets)
        return HeadOutput(terms, tuple(maps), wanted)

    @torch.no_grad()
    def detect(
        self, module: nn.Module, images: Tensor, confidence: float, iou: float, max_detections: int
    ) -> list[Detections]:
        """Suppression by class, several labels to a box, scores = objectness x class, as YOLOv5's val.py has it."""
        return as_detections(suppressed(predictions(cast(YoloV5, module), images), confidence, iou, max_detections))

    def export_module(self, module: nn.Module) -> nn.Module:
        """One output in the layout of Ultralytics' exports, scores = objectness x class."""
        return Decoded(cast(YoloV5, module))

    def detections(
        self, outputs: Sequence[Tensor], confidence: float, iou: float, max_detections: int
    ) -> list[Detections]:
        return as_detections(suppressed(outputs[0], confidence, iou, max_detections))

    def statistics_layers(self, module: nn.Module) -> list[StatisticsLayer]:
        return [
            StatisticsLayer(f"{name}.conv", f"{name}.bn") for name, m in module.named_modules() if isinstance(m, Conv)
        ]

    def feature_layers(self, module: nn.Module) -> list[str]:
        """The outputs of the top-level blocks, without the head and without what only copies."""
        blocks = cast(YoloV5, module).model
        return [f"model.{i}" for i, b in enumerate(blocks) if not isinstance(b, AnchorHead | Concat | nn.Upsample)]

    def quantization_policy(self, module: nn.Module) -> list[LayerPolicy]:
        layers = [n for n, m in module.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
        return [LayerPolicy(name, *_role(name, len(cast(YoloV5, module).model) - 1)) for name in layers]


def load(weights: Path) -> YoloV5Detector:
    """Loads a float YOLOv5: a .pt file of YOLOv5 v6.0 to v7.0, or safetensors with its architecture.

    An official file that is missing is fetched when online.

    Raises:
        UserError: missing, damaged or unsafe file, or not a YOLOv5 detector.
    """
    if not weights.is_file():
        fetch(weights, RELEASE, SHA256)
    if weights.suffix != ".safetensors":
        return _from_checkpoint(read_checkpoint(weights))
    state, architecture = load_own(weights, FAMILY)
    detector = from_architecture(architecture)
    detector.state = state
    detector.build()  # a state that does not fit is found before any work
    return detector


def from_architecture(architecture: Mapping[str, Any]) -> YoloV5Detector:
    """The detector that `YoloV5Detector.architecture` describes, without weights.

    Raises:
        UserError: an architecture that is not allowed, or cannot be built.
    """
    checked = yolo_architecture(architecture, {*BLOCKS, "Concat", "nn.Upsample", "Detect"}, WHERE)
    return YoloV5Detector(tuple(checked["names"]), checked, max(_untrained(checked).strides))


def _untrained(architecture: Mapping[str, Any]) -> YoloV5:
    with building(WHERE):
        return YoloV5(architecture["yaml"], len(architecture["names"])).float().eval()


def _from_checkpoint(checkpoint: Checkpoint) -> YoloV5Detector:
    found, head = checkpoint.model_class, checkpoint.head.pickled_class if checkpoint.head else "no head"
    if found not in CLASSES or head != "models.yolo.Detect":
        raise UserError(f"{checkpoint.path}: a {found} with {head}; {FAMILY} needs {' or '.join(CLASSES)} with Detect")
    detector = from_architecture(described(checkpoint, DESCRIPTION))
    detector.state = {n: t for n, t in checkpoint.state.items() if not n.endswith(".anchor_grid")}  # of v6.0, in pixels
    module = cast(YoloV5, detector.build())
    check_rebuilt(checkpoint, module, module.strides, checkpoint.modules)
    return detector


def _role(name: str, head: int) -> tuple[Role, str]:
    block = int(name.split(".")[1])
    if block == head:
        return "output", "final predictions"
    if block == 0:
        return "first", "sees the image"
    if block in EARLY_BLOCKS:
        return "early", "strides 4 and 8: few weights, largest maps"
    return "body", "backbone or neck"
