"""What torchvision's detectors share in every family: their classes, their transform, their modes and BatchNorms."""

import contextlib
import re
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import detection, get_model_weights
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.models.resnet import BasicBlock
from torchvision.ops import batched_nms

from common.detection.types import Detections, StatisticsLayer, Targets
from common.runtime.errors import SettingNeededError, UserError
from common.runtime.files import sha256

OUTPUTS = {"boxes": {0: "detections"}, "labels": {0: "detections"}, "scores": {0: "detections"}}
MASKS = {"masks": {0: "detections"}}
NEARLY_ZERO = 1e-12  # in the place of an epsilon of 0, which torch's batch_norm does not accept
# Where it loads their COCO weights, torchvision sets the epsilon of frozen BatchNorms to 0 (`overwrite_eps`).
WITHOUT_EPSILON = ("maskrcnn_resnet50_fpn", "fasterrcnn_resnet50_fpn", "retinanet_resnet50_fpn")
FROZEN_EPSILON = 1e-5  # of torchvision's FrozenBatchNorm2d otherwise
SMALL_VARIANCE = 0.1  # below it an epsilon of 1e-5 changes a scale by more than 5e-5 of it
OLD_NAMES = {  # of files from before torchvision 0.14, the official ones of ResNet-50 among them, and today's
    r"(backbone\.fpn\.(?:inner|layer)_blocks\.\d+)\.(weight|bias)": r"\1.0.\2",
    r"rpn\.head\.conv\.(weight|bias)": r"rpn.head.conv.0.0.\1",
    **{rf"roi_heads\.mask_head\.mask_fcn{i + 1}\.(weight|bias)": rf"roi_heads.mask_head.{i}.0.\1" for i in range(8)},
}
VOC = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog"),
    *("horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)


class FixedSize(GeneralizedRCNNTransform):
    """torchvision's normalisation, without its resizing: here a batch has the size it is to be detected at.

    Masks stay as grids over their boxes, to be pasted where the boxes are in the end.
    """

    def resize(
        self, image: Tensor, target: dict[str, Tensor] | None = None
    ) -> tuple[Tensor, dict[str, Tensor] | None]:  # fmt: skip
        """Returns both as they are."""
        return image, target

    def postprocess(self, result: list[dict[str, Tensor]], *sizes: object) -> list[dict[str, Tensor]]:
        """Returns the detections as they are."""
        return result


def fix_size(module: Any, architecture: Mapping[str, Any]) -> nn.Module:
    """The detector in eval mode, float32, without its resizing, with the epsilon that its frozen BatchNorms have."""
    old = module.transform
    module.transform = FixedSize(0, 0, old.image_mean, old.image_std)
    epsilon = architecture.get("frozen_epsilon", 0.0 if architecture["model"] in WITHOUT_EPSILON else None)
    for part in module.modules() if architecture["frozen_batch_norm"] and epsilon is not None else ():
        if isinstance(part, nn.BatchNorm2d):
            part.eps = max(epsilon, NEARLY_ZERO)
    return module.float().eval()


def renamed(state: Mapping[str, Tensor], names: Mapping[str, str], weights: object) -> dict[str, Tensor]:
    """The state under today's names, which torchvision's modules themselves give to tensors of older files on loading.

    Args:
        state: of a file.
        names: patterns of whole names, and what they are now.
        weights: the file, for a message.

    Raises:
        UserError: a tensor under its old and its new name.
    """
    found: dict[str, Tensor] = {}
    for old, tensor in state.items():
        name = next((re.sub(p, new, old) for p, new in names.items() if re.fullmatch(p, old)), old)
        if name in found or (name != old and name in state):
            raise UserError(f"{weights}: has {name} twice, under an older name as well; give the file as it was saved")
        found[name] = tensor
    return found


def with_epsilon(
    architecture: dict[str, Any],
    given: Mapping[str, Any] | None,
    weights: Path,
    state: Mapping[str, Tensor],
    arguments: Mapping[str, Any],
    name: str | None,
) -> dict[str, Any]:
    """The architecture with the epsilon of its frozen BatchNorms, which a state_dict does not show.

    It is taken from the configuration, else from the arguments of torchvision's reference training beside the state
    (`weights`, before 0.13 `pretrained`). Official files, known by their sum, have that of WITHOUT_EPSILON.

    Args:
        architecture: as recognised.
        given: `DetectorConfig.given`.
        weights: the file.
        state: its tensors.
        arguments: those of the training, unchecked.
        name: which of torchvision's models has such tensors, if one has; of a given backbone it is not what is built.

    Raises:
        UserError: given, and no BatchNorm is frozen, or its training says another; said nowhere, and of an effect; or
            trained as another model.
    """
    frozen = architecture["frozen_batch_norm"]
    if name and isinstance(said := arguments.get("model"), str) and said != name:
        raise UserError(f"{weights}: says that it was trained as {said[:80]!r}, but has the tensors of {name}")
    trained_from = [arguments[key] for key in ("weights", "pretrained") if key in arguments]
    known = None
    if arguments.get("model") == name and name in WITHOUT_EPSILON and trained_from:
        known = 0.0 if any(value not in (None, False, "") for value in map(_plain, trained_from)) else FROZEN_EPSILON
    if given and "frozen_epsilon" in given:
        if not frozen:
            raise UserError(f"detector.frozen_epsilon: found, but no BatchNorm of {weights} is frozen; leave it out")
        if known not in (None, given["frozen_epsilon"]):
            raise UserError(
                f"detector.frozen_epsilon: found {given['frozen_epsilon']}, but {weights} says {known:g}; leave it out"
            )
        return architecture | {"frozen_epsilon": given["frozen_epsilon"]}
    if not frozen or name not in WITHOUT_EPSILON:
        return architecture
    if known is not None:
        return architecture | {"frozen_epsilon": known}
    smallest = min((float(t.min()) for key, t in state.items() if key.endswith(".running_var")), default=1.0)
    if smallest < SMALL_VARIANCE and official_model(weights, [name]) is None:
        raise SettingNeededError(
            f"{weights}: does not say the epsilon of its frozen BatchNorms; set detector.frozen_epsilon: 0 for "
            "torchvision's COCO weights and what was trained from them, 1e-5 where only the backbone had weights"
        )
    return architecture


def _plain(value: object) -> object:
    """A value of a file as something that can be compared."""
    return value if value is None or isinstance(value, bool | int | float | str) else type(value).__name__


def class_indices(outputs: int) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Names of the classes of a head, and the output of each: COCO's 80 classes for 91 outputs, whose ids have holes,
    Pascal VOC's for 21, and otherwise numbered ones. Output 0 is the background."""
    if outputs == 91:
        names = detection.MaskRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
        kept = [i for i, name in enumerate(names) if i and name != "N/A"]
        return tuple(names[i] for i in kept), tuple(kept)
    names = VOC if outputs == 21 else [f"class {i}" for i in range(1, outputs)]
    return tuple(names), tuple(range(1, outputs))


def class_names(architecture: Mapping[str, Any], where: str) -> tuple[str, ...]:
    """The names that an architecture says, else those of `class_indices`.

    Raises:
        UserError: not as many as classes.
    """
    usual, count = class_indices(architecture["outputs"])[0], architecture["outputs"]
    names = architecture.get("names") or usual
    if len(names) != len(usual):
        raise UserError(f"{where}: has {len(names)} names of classes and {count} outputs with the background")
    return tuple(names)


def official_files(weights: Iterable[Any]) -> tuple[str, dict[str, str | None]]:
    """The address of torchvision's files trained on COCO, and the part of its SHA-256 that each has in its name."""
    addresses = [kind.COCO_V1.url for kind in weights]
    sums = {url.rpartition("/")[2]: url.rpartition("-")[2].removesuffix(".pth") for url in addresses}
    return addresses[0].rpartition("/")[0], dict(sums)


def official_model(weights: Path, models: Iterable[str]) -> str | None:
    """Of which of these models of torchvision a file is the official one, by the part of its SHA-256 in that name."""
    digest = sha256(weights)
    parts = {name: next(iter(official_files([get_model_weights(name)])[1].values())) for name in models}
    return next((name for name, part in parts.items() if digest.startswith(str(part))), None)


class Outputs:
    """Which output of a head is which class; output 0 is the background."""

    def __init__(self, outputs: int, device: torch.device) -> None:
        self.of_class = torch.tensor(class_indices(outputs)[1], device=device)  # [classes]
        self.classes = torch.full((outputs,), -1, device=device)  # [outputs], -1 for none
        self.classes[self.of_class] = torch.arange(len(self.of_class), device=device)

    def targets(self, targets: Sequence[Targets]) -> list[Targets]:
        """Targets on the device, with outputs of the head as labels."""
        device = self.classes.device
        return [Targets(t.boxes.to(device), self.of_class[t.labels.to(device)], t.masks) for t in targets]

    def detections(self, rows: Sequence[dict[str, Tensor]]) -> list[Detections]:
        """torchvision's detections without those of COCO's unused ids, which are no classes."""
        found = []
        for row in rows:
            labels = self.classes[row["labels"]]
            kept = labels >= 0
            masks = row["masks"][kept, 0].float() if "masks" in row else None
            found.append(Detections(row["boxes"][kept].float(), row["scores"][kept].float(), labels[kept], masks))
        return found


@contextlib.contextmanager
def own_flags(model: Any) -> Iterator[None]:
    """Inside, torchvision proposes and detects as at inference, whatever mode the BatchNorms are in."""
    names = ("transform", "rpn", "roi_heads")
    parts = [model, *(getattr(model, name) for name in names if hasattr(model, name))]
    before = [part.training for part in parts]
    for part in parts:
        part.training = False
    try:
        yield
    finally:
        for part, flag in zip(parts, before, strict=True):
            part.training = flag


def batch_norms(module: nn.Module, prefix: str = "") -> list[StatisticsLayer]:
    """Every BatchNorm, frozen in training or not, with the convolution that stands before it in the module."""
    layers, convolution = [], ("", 0)
    for name, part in module.named_modules():
        if isinstance(part, nn.Conv2d):
            convolution = name, part.out_channels
        elif isinstance(part, nn.BatchNorm2d) and name.startswith(prefix) and part.num_features == convolution[1]:
            layers.append(StatisticsLayer(convolution[0], name, overwritten=True))
    return layers


class OneImage(nn.Module):
    """An image [1, 3, H, W] in [0, 1] to boxes [n, 4], labels [n] (the head's outputs), scores [n], masks [n, 1, m, m].

    Suppression has the limits that the module has. Masks stay grids over their boxes: pasting takes seconds in a graph.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        found = self.model([images[0]])[0]
        return tuple(found[name] for name in (*OUTPUTS, *MASKS) if name in found)


def detections_of(
    outputs: Sequence[Tensor], classes: Tensor, confidence: float, iou: float, max_detections: int
) -> list[Detections]:
    """The one image's detections; `classes` [outputs] has the class of each output of the head, -1 for none.

    What the graph has suppressed already is gone: lower limits than its own change nothing.
    """
    boxes, heads, scores, *masks = outputs
    labels = classes[heads]
    kept = ((scores > confidence) & (labels >= 0)).nonzero()[:, 0]
    kept = kept[batched_nms(boxes[kept], scores[kept], labels[kept], iou)][:max_detections]
    grids = masks[0][kept, 0] if masks else None
    return [Detections(boxes[kept], scores[kept], labels[kept].long(), grids)]


def micro_backbone(width: int = 48, channels: Sequence[int] = (16, 32, 64, 128)) -> BackboneWithFPN:
    """A small ResNet under an FPN with maps of strides 4 to 32 and a pooled one, for drawn shapes and for tests."""
    parts: list[tuple[str, nn.Module]] = [
        ("conv1", nn.Conv2d(3, channels[0], 3, stride=2, padding=1, bias=False)),
        ("bn1", nn.BatchNorm2d(channels[0])),
        ("relu", nn.ReLU(inplace=True)),
    ]
    incoming = channels[0]
    for i, outgoing in enumerate(channels, 1):
        skip = nn.Sequential(nn.Conv2d(incoming, outgoing, 1, stride=2, bias=False), nn.BatchNorm2d(outgoing))
        blocks = [BasicBlock(incoming, outgoing, 2, skip), *[BasicBlock(outgoing, outgoing)] * (i > 2)]
        parts.append((f"layer{i}", nn.Sequential(*blocks)))
        incoming = outgoing
    body = nn.Sequential(OrderedDict(parts))
    levels = {f"layer{i}": str(i - 1) for i in range(1, 5)}
    return BackboneWithFPN(body, levels, list(channels), width)
