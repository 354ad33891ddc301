"""YOLO11 and its relatives: Ultralytics' DetectionModel behind the Detector protocol.

YOLO26 and YOLOv10 have two heads, and detect with the one that gives each object one box. The other one serves their
own training alone and is dropped when the detector is loaded, so that what is left is an ordinary `Detect`.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from ultralytics.nn.modules import Concat, Conv, Detect
from ultralytics.nn.tasks import DetectionModel, SegmentationModel

from common.checkpoints.pickled_network import check_rebuilt, described
from common.checkpoints.read import Checkpoint, load_own, read_checkpoint
from common.checkpoints.state_dict import building, load_state
from common.checkpoints.yolo_architecture import HEADS, SEGMENT, set_activation, yolo_architecture
from common.detection.types import Detections, HeadOutput, HeadTerm, LayerPolicy, Role, StatisticsLayer, Targets
from common.runtime.environment import temporarily
from common.runtime.errors import UserError
from yolo11 import WANTED
from yolo11.export import MASKS, ONE_TO_ONE, OUTPUTS, Decoded, as_detections, best, decoded, suppressed
from yolo11.loss import losses, segmentation_losses

Part = TypeVar("Part")
FAMILY = "yolo11"
ONE_TO_ONE_PREFIX = "one2one_"
BLOCKS = {  # of the models that Ultralytics publishes with this head
    *("A2C2f", "ADown", "AConv", "Bottleneck", "C2", "C2PSA", "C2f", "C2fCIB", "C3", "C3Ghost", "C3k2", "CBFuse"),
    *("CBLinear", "Concat", "Conv", "Detect", "ELAN1", "GhostConv", "PSA", "RepNCSPELAN4", "SCDown", "SPP", "SPPELAN"),
    *("SPPF", "Segment", "Segment26", "v10Detect"),
    *("nn.ConvTranspose2d", "nn.Identity", "nn.MaxPool2d", "nn.Upsample", "nn.ZeroPad2d"),
}
EARLY_BLOCKS = range(1, 5)  # strides 4 and 8 of the backbone


@dataclass
class Yolo11Detector:
    """A YOLO11 checkpoint. Modules are Ultralytics' own classes, so every tool that knows them still does."""

    class_names: tuple[str, ...]
    architecture: Mapping[str, Any]  # {"yaml": Ultralytics' dict, "names": [...]}, as `yolo_architecture` allows it
    stride: int
    state: Mapping[str, Tensor] | None = None
    mask_stride: float = 4.0  # of the prototypes of masks, pixels

    @property
    def has_masks(self) -> bool:
        """Whether detections have masks: Ultralytics' segmentation models have them."""
        return self.architecture["yaml"]["head"][-1][2] in SEGMENT

    @property
    def one_to_one(self) -> bool:
        """Whether the head gives each object one box, so that nothing is suppressed."""
        return _is_one_to_one(self.architecture["yaml"])

    @property
    def export_outputs(self) -> Mapping[str, Mapping[int, str]]:
        return (ONE_TO_ONE if self.one_to_one else OUTPUTS) | (MASKS if self.has_masks else {})

    def build(self) -> nn.Module:
        """A new DetectionModel in eval mode, float32 on the CPU.

        Raises:
            UserError: the weights do not fit the architecture.
        """
        module = _untrained(self.architecture)
        if self.state is not None:
            load_state(module, self.state, "weights", "this YOLO11")
        return module

    def head_output(
        self, module: nn.Module, images: Tensor, targets: Sequence[Targets] | None = None, proposals: object = None
    ) -> HeadOutput:
        """Terms: `classes` [B, N, nc] and `boxes` [B, N, 4, bins], without bins [B, N, 4]; with masks `coefficients`
        [B, N, n] and `prototypes` [B, h * w, n]; losses, gains included."""
        # The head returns raw maps only: its own flag, not that of its BatchNorms, decides on decoding.
        model: Any = module
        head = model.model[-1]
        with temporarily(head, training=True), temporarily(getattr(head, "proto", head.cv2), training=False):
            raw = module(images)
        scores = raw["scores"].transpose(1, 2)  # [B, N, nc]
        batch, anchors, _ = scores.shape
        boxes = raw["boxes"].transpose(1, 2).reshape(batch, anchors, 4, -1)
        confidence = scores.detach().sigmoid().amax(-1)
        terms = {
            "classes": HeadTerm(scores, "sigmoid", confidence),
            "boxes": HeadTerm(boxes, "softmax", confidence),
        }
        if boxes.shape[-1] == 1:  # the distances themselves
            terms["boxes"] = HeadTerm(boxes.squeeze(-1), "offset", confidence)
        if self.has_masks:
            terms |= _mask_terms(raw, confidence)
            given = {} if targets is None else segmentation_losses(head, raw, targets, self.one_to_one)
            return HeadOutput(terms, _maps(raw), given)
        size = images.shape[2:]
        given = {} if targets is None else losses(raw["feats"], scores, boxes, size, targets, self.one_to_one)
        return HeadOutput(terms, _maps(raw), given)

    @torch.no_grad()
    def detect(
        self, module: nn.Module, images: Tensor, confidence: float, iou: float, max_detections: int
    ) -> list[Detections]:
        """Ultralytics' own suppression, several labels to a box, as its validator calls it; none if one-to-one."""
        return self.detections(decoded(module, images, self.one_to_one), confidence, iou, max_detections)

    def export_module(self, module: nn.Module) -> nn.Module:
        """Ultralytics' own decoding, as its exports have it."""
        return Decoded(module, self.one_to_one)

    def detections(
        self, outputs: Sequence[Tensor], confidence: float, iou: float, max_detections: int
    ) -> list[Detections]:
        rows, *prototypes = outputs
        if self.one_to_one:
            found = best(rows, confidence, max_detections)
        else:
            found = suppressed(rows, confidence, iou, max_detections, len(self.class_names) if prototypes else 0)
        return as_detections(found, prototypes[0] if prototypes else None, self.mask_stride)

    def statistics_layers(self, module: nn.Module) -> list[StatisticsLayer]:
        return [
            StatisticsLayer(f"{name}.conv", f"{name}.bn") for name, m in module.named_modules() if isinstance(m, Conv)
        ]

    def feature_layers(self, module: Any) -> list[str]:
        """The outputs of the top-level blocks, without the head and without what only copies."""
        skipped = (Detect, Concat, nn.Upsample)
        return [f"model.{i}" for i, block in enumerate(module.model) if not isinstance(block, skipped)]

    def quantization_policy(self, module: Any) -> list[LayerPolicy]:
        layers = [n for n, m in module.named_modules() if isinstance(m, nn.Conv2d | nn.ConvTranspose2d | nn.Linear)]
        head = len(module.model) - 1
        return [LayerPolicy(name, *_role(name, head), always_float=_is_integral(name, head)) for name in layers]


def load(weights: Path) -> Yolo11Detector:
    """Loads a float YOLO11: an Ultralytics .pt file, or safetensors with its architecture.

    An official file that is missing is fetched by Ultralytics' downloader when online.

    Raises:
        UserError: missing, damaged or unsafe file, or not a YOLO11 detector.
    """
    if not weights.is_file():
        _fetch(weights)
    if weights.suffix != ".safetensors":
        return _from_checkpoint(read_checkpoint(weights))
    state, architecture = load_own(weights, FAMILY)
    detector = from_architecture(architecture)
    detector.state = state
    detector.build()  # a state that does not fit is found before any work
    return detector


def from_architecture(architecture: Mapping[str, Any]) -> Yolo11Detector:
    """The detector that `Yolo11Detector.architecture` describes, without weights.

    Raises:
        UserError: an architecture that is not allowed, or cannot be built.
    """
    checked = yolo_architecture(architecture, BLOCKS, f"weights: the architecture of this {FAMILY}")
    module: Any = _untrained(checked)
    return Yolo11Detector(
        tuple(checked["names"]), checked, int(max(module.stride)), mask_stride=float(min(module.stride)) / 2
    )


def _untrained(architecture: Mapping[str, Any]) -> nn.Module:
    # Through Ultralytics' parser, never block by block: it restores what changed since the file was written, such as
    # the activation of SPPF's first convolution. The activation itself is set here, by name.
    yaml = copy.deepcopy({key: value for key, value in architecture["yaml"].items() if key != "activation"})
    where = f"weights: the architecture of this {FAMILY}"
    with building(where):
        kind = SegmentationModel if yaml["head"][-1][2] in SEGMENT else DetectionModel
        module: Any = kind(yaml, nc=len(architecture["names"]), verbose=False)
    if not all(stride in (2, 4, 8, 16, 32, 64, 128) for stride in module.stride.tolist()):
        raise UserError(f"{where}: has strides {module.stride.tolist()}; allowed are powers of two up to 128")
    set_activation(module, architecture["yaml"].get("activation"))
    if _is_one_to_one(architecture["yaml"]):
        _drop_training_head(module.model[-1])
    if hasattr(module.model[-1], "proto") and hasattr(module.model[-1].proto, "semseg"):
        module.model[-1].proto.semseg = None  # of training alone, as Ultralytics' fuse() has it
    module.names = dict(enumerate(architecture["names"]))
    return module.float().eval()


def _is_one_to_one(yaml: Mapping[str, Any]) -> bool:
    return bool(yaml.get("end2end")) or yaml["head"][-1][2] == "v10Detect"


def _drop_training_head(head: Any) -> None:
    """Leaves the one-to-one head alone, in the place of the other one, with boxes xyxy."""
    for name in ("cv2", "cv3", *(["cv4"] if hasattr(head, "cv4") else [])):
        setattr(head, name, getattr(head, f"{ONE_TO_ONE_PREFIX}{name}"))
        delattr(head, f"{ONE_TO_ONE_PREFIX}{name}")
    head.end2end, head.xyxy = False, True


def _of_used_head(parts: Mapping[str, Part], one_to_one: bool) -> dict[str, Part]:
    """Tensors or modules with one head alone, the one that detects, under the names of an ordinary one."""
    apart = f".{ONE_TO_ONE_PREFIX}"
    kept = {name: t for name, t in parts.items() if apart not in name and ".proto.semseg." not in f"{name}."}
    own = {name.replace(apart, "."): part for name, part in parts.items() if apart in name}
    return kept | own if one_to_one else kept


def _from_checkpoint(checkpoint: Checkpoint) -> Yolo11Detector:
    path, head = checkpoint.path, checkpoint.head
    found = head.pickled_class.rpartition(".")[2] if head else checkpoint.model_class
    if checkpoint.model_class not in WANTED or found not in HEADS:
        raise UserError(
            f"{path}: a {checkpoint.model_class} with head {found}; "
            f"{FAMILY} needs {' or '.join(sorted(WANTED))} with head {' or '.join(sorted(HEADS))}; leave family= out"
        )
    detector = from_architecture(_as_used(described(checkpoint), checkpoint))
    detector.state = _of_used_head(checkpoint.state, detector.one_to_one)
    module: Any = detector.build()
    used = _of_used_head(checkpoint.modules, detector.one_to_one)
    check_rebuilt(checkpoint, module, tuple(int(stride) for stride in module.stride), used)
    return detector


def _as_used(architecture: dict[str, Any], checkpoint: Checkpoint) -> dict[str, Any]:
    """With the head that the checkpoint detects with: Ultralytics keeps a switch in it, else its YAML says which."""
    head, yaml = checkpoint.head, architecture["yaml"]
    if head is None or "_end2end" not in head.attributes:
        return architecture
    always = head.pickled_class.endswith(".v10Detect")
    branches = any(name.endswith(".one2one_cv2") for name in checkpoint.modules)  # without them the switch does nothing
    used = branches and bool(head.attributes["_end2end"])
    if used == (always or bool(yaml.get("end2end"))):
        return architecture
    if always:
        raise UserError(f"{checkpoint.path}: a YOLOv10 with end2end off; it is quantized one-to-one: set it to True")
    return architecture | {"yaml": yaml | {"end2end": used}}


def _fetch(weights: Path) -> None:
    from ultralytics.utils import ONLINE
    from ultralytics.utils.downloads import GITHUB_ASSETS_NAMES, attempt_download_asset

    official = weights.name in GITHUB_ASSETS_NAMES
    if official and ONLINE:
        attempt_download_asset(weights)
    if not weights.is_file():
        advice = (
            "it can be downloaded when online" if official else "give the path of a YOLO11 .pt or .safetensors file"
        )
        raise UserError(f"weights: {weights.absolute()} does not exist; {advice}")


def _maps(raw: Mapping[str, Any]) -> tuple[Tensor, ...]:
    rows = torch.cat([raw["boxes"], raw["scores"]], 1)  # [B, 4 * bins + nc, N]
    shapes = [f.shape[2:] for f in raw["feats"]]
    parts = rows.split([h * w for h, w in shapes], dim=2)
    return tuple(p.unflatten(2, shape) for p, shape in zip(parts, shapes, strict=True))


def _mask_terms(raw: Mapping[str, Any], confidence: Tensor) -> dict[str, HeadTerm]:
    """Coefficients of each place, and prototypes of each pixel, which counts as much as the surest place over it."""
    sizes = [level.shape[2:] for level in raw["feats"]]
    levels = confidence[:, None].split([h * w for h, w in sizes], 2)
    shape = raw["proto"].shape[2:]
    over = [F.interpolate(c.unflatten(2, size), shape) for c, size in zip(levels, sizes, strict=True)]
    return {
        "coefficients": HeadTerm(raw["mask_coefficient"].transpose(1, 2), "offset", confidence),
        "prototypes": HeadTerm(
            raw["proto"].flatten(2).transpose(1, 2), "offset", torch.cat(over, 1).amax(1).flatten(1)
        ),
    }


def _is_integral(name: str, head: int) -> bool:
    """Whether it is the convolution with fixed weights that turns a box distribution into a distance."""
    return name.startswith(f"model.{head}.dfl.")


def _role(name: str, head: int) -> tuple[Role, str]:
    parts = name.split(".")
    block = int(parts[1])
    if _is_integral(name, head):
        return "output", "integral over a box distribution, fixed weights"
    if block == head:
        # model.23.cv2.0.2: the third layer of a branch, a plain convolution; proto.cv3.conv gives the prototypes
        last = len(parts) == 5 and (parts[2] != "proto" or parts[3] == "cv3")
        return ("output", "final predictions") if last else ("head", "head, before its last convolution")
    if block == 0:
        return "first", "sees the image"
    return (
        ("early", "strides 4 and 8: few weights, largest maps")
        if block in EARLY_BLOCKS
        else ("body", "backbone or neck")
    )
