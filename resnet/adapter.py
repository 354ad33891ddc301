"""Mask R-CNN and Faster R-CNN: torchvision's detection models behind the Detector protocol."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import get_model_weights
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import concat_box_prediction_layers

from common.checkpoints.description import checked
from common.checkpoints.download import fetch
from common.checkpoints.rcnn_architecture import MODELS, TorchvisionArchitecture
from common.checkpoints.read import load_own, read_state
from common.checkpoints.state import load_state
from common.detection.roi_losses import BETA
from common.detection.roi_outputs import two_stage_output
from common.detection.types import Detections, HeadOutput, LayerPolicy, Role, StatisticsLayer, Targets
from common.runtime.errors import UserError
from resnet.export import MASKS, OUTPUTS, TwoStage, detections_of
from resnet.models import build_module, class_indices, recognise

FAMILY = "resnet"


@dataclass
class ResNetDetector:
    """A torchvision two-stage checkpoint. Modules are torchvision's own classes."""

    class_names: tuple[str, ...]
    architecture: Mapping[str, Any]
    state: Mapping[str, Tensor] | None = None
    stride: int = 32

    @property
    def has_masks(self) -> bool:
        """Whether detections have masks: Mask R-CNN has them, Faster R-CNN does not."""
        return self.architecture["model"].startswith("maskrcnn")

    def build(self) -> nn.Module:
        """A new module in eval mode, float32 on the CPU.

        Raises:
            UserError: the weights do not fit the architecture.
        """
        module = build_module(self.architecture)
        if self.state is not None:
            what = f"torchvision's {self.architecture['model']}, and other backbones and anchors cannot be rebuilt"
            load_state(module, self.state, "weights", what)
        return module

    def head_output(
        self, module: nn.Module, images: Tensor, targets: Sequence[Targets] | None = None, proposals: object = None
    ) -> HeadOutput:
        """As `common.detection.roi_outputs.two_stage_output` says."""
        model: Any = module
        with _own_flags(model):
            batch = torch.stack([model.transform.normalize(image) for image in images])
            wanted = None if targets is None else self._outputs(targets, images.device)
            return two_stage_output(_Parts(model, batch, model.backbone(batch)), wanted, proposals)

    @torch.no_grad()
    def detect(
        self, module: nn.Module, images: Tensor, confidence: float, iou: float, max_detections: int
    ) -> list[Detections]:
        """torchvision's own inference on images of the size they have, at these thresholds."""
        model: Any = module
        heads = model.roi_heads
        before = heads.score_thresh, heads.nms_thresh, heads.detections_per_img
        heads.score_thresh, heads.nms_thresh, heads.detections_per_img = confidence, iou, max_detections
        try:
            with _own_flags(model):
                rows = model(list(images))
        finally:
            heads.score_thresh, heads.nms_thresh, heads.detections_per_img = before
        classes = self._classes(images.device)
        found = []
        for row in rows:
            labels = classes[row["labels"]]
            kept = labels >= 0  # COCO's unused ids are no classes
            masks = row["masks"][kept, 0].float() if "masks" in row else None
            found.append(Detections(row["boxes"][kept].float(), row["scores"][kept].float(), labels[kept], masks))
        return found

    @property
    def export_outputs(self) -> Mapping[str, Mapping[int, str]]:
        return OUTPUTS | (MASKS if self.architecture["model"].startswith("mask") else {})

    def export_module(self, module: nn.Module) -> nn.Module:
        """torchvision's own inference on one image, with torchvision's default limits."""
        return TwoStage(module)

    def detections(
        self, outputs: Sequence[Tensor], confidence: float, iou: float, max_detections: int
    ) -> list[Detections]:
        return detections_of(outputs, self._classes(outputs[0].device), confidence, iou, max_detections)

    def statistics_layers(self, module: nn.Module) -> list[StatisticsLayer]:
        """Every BatchNorm of backbone and FPN, frozen in training or not, with the convolution before it."""
        layers, convolution = [], ("", 0)
        for name, part in module.named_modules():
            if isinstance(part, nn.Conv2d):
                convolution = name, part.out_channels
            elif (
                isinstance(part, nn.BatchNorm2d)
                and name.startswith("backbone.")
                and part.num_features == convolution[1]
            ):
                layers.append(StatisticsLayer(convolution[0], name, overwritten=True))
        return layers

    def feature_layers(self, module: Any) -> list[str]:
        """The convolutions that give the FPN's levels."""
        return [f"backbone.fpn.layer_blocks.{i}" for i in range(len(module.backbone.fpn.layer_blocks))]

    def quantization_policy(self, module: nn.Module) -> list[LayerPolicy]:
        layers = [n for n, m in module.named_modules() if isinstance(m, nn.Conv2d | nn.ConvTranspose2d | nn.Linear)]
        blocks = [n.split(".")[3] for n in layers if n.startswith("backbone.body.layer4.")]
        last = f"backbone.body.layer4.{blocks[-1]}." if blocks else "none"
        return [LayerPolicy(name, *_role(name, last, first=i == 0)) for i, name in enumerate(layers)]

    def _classes(self, device: torch.device) -> Tensor:
        """The class of each output, -1 for none."""
        classes = torch.full((self.architecture["outputs"],), -1, device=device)
        classes[self._heads(device)] = torch.arange(len(self.class_names), device=device)
        return classes

    def _heads(self, device: torch.device) -> Tensor:
        """The output of each class."""
        return torch.tensor(class_indices(self.architecture["outputs"])[1], device=device)

    def _outputs(self, targets: Sequence[Targets], device: torch.device) -> list[Targets]:
        """Targets with outputs of the head as labels."""
        heads = self._heads(device)
        return [Targets(t.boxes.to(device), heads[t.labels.to(device)], t.masks) for t in targets]


def load(weights: Path) -> ResNetDetector:
    """Loads a state_dict of one of torchvision's models (.pth), or safetensors with its architecture.

    An official file that is missing is fetched when online, and its SHA-256 compared with the part in its name.

    Raises:
        UserError: missing, damaged or unsafe file, or another model.
    """
    if not weights.exists():
        addresses = [get_model_weights(name).COCO_V1.url for name in MODELS]  # type: ignore[attr-defined]
        sums = {url.rpartition("/")[2]: url.rpartition("-")[2].removesuffix(".pth") for url in addresses}
        fetch(weights, addresses[0].rpartition("/")[0], sums)
    if weights.suffix == ".safetensors":
        state, architecture = load_own(weights, FAMILY)
    else:
        state = read_state(weights)
        architecture = recognise(state) or {}
        if not architecture:
            raise UserError(f"{weights}: none of torchvision's {', '.join(MODELS)}; {FAMILY} needs a state_dict of one")
    detector = from_architecture(architecture)
    detector.state = state
    detector.build()  # a state that does not fit is found before any work
    return detector


def from_architecture(architecture: Mapping[str, Any]) -> ResNetDetector:
    """The detector that `ResNetDetector.architecture` describes, without weights.

    Raises:
        UserError: an architecture that is not allowed.
    """
    where = f"weights: the architecture of this {FAMILY}"
    found = checked(TorchvisionArchitecture, architecture, where).model_dump(exclude_unset=True)
    names = found.get("names") or class_indices(found["outputs"])[0]
    if len(names) != len(class_indices(found["outputs"])[1]):
        raise UserError(
            f"{where}: has {len(names)} names of classes and {found['outputs']} outputs with the background"
        )
    return ResNetDetector(tuple(names), found)


@contextlib.contextmanager
def _own_flags(model: Any) -> Iterator[None]:
    """Inside, torchvision proposes and detects as at inference, whatever mode the BatchNorms are in."""
    parts = (model, model.transform, model.rpn, model.roi_heads)
    before = [part.training for part in parts]
    for part in parts:
        part.training = False
    try:
        yield
    finally:
        for part, flag in zip(parts, before, strict=True):
            part.training = flag


class _Parts:
    """torchvision's detector at work on a normalised batch."""

    beta = BETA
    aligned = False

    def __init__(self, model: Any, batch: Tensor, features: Mapping[str, Tensor]) -> None:
        self.rpn, self.roi_heads = model.rpn, model.roi_heads
        self.size = batch.shape[-2], batch.shape[-1]
        self.has_masks = model.roi_heads.has_mask()
        self._batch, self._features = batch, features

    def propose(self) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, ...]]:
        levels, count = list(self._features.values()), len(self._batch)
        scores, deltas = self.rpn.head(levels)
        anchors = torch.stack(self.rpn.anchor_generator(ImageList(self._batch, [self.size] * count), levels))
        maps = tuple(torch.cat(pair, 1) for pair in zip(scores, deltas, strict=True))
        flat_scores, flat_deltas = concat_box_prediction_layers(scores, deltas)
        return anchors, flat_scores.reshape(count, -1), flat_deltas.reshape(count, -1, 4), maps

    @torch.no_grad()
    def filter_proposals(
        self, anchors: Tensor, objectness: Tensor, deltas: Tensor, maps: Sequence[Tensor]
    ) -> list[Tensor]:
        count = len(anchors)
        boxes = self.rpn.box_coder.decode(deltas.float().flatten(0, 1), list(anchors)).view(count, -1, 4)
        per_level = [m[0].numel() // 5 for m in maps]  # a score and four deltas for each anchor
        return self.rpn.filter_proposals(boxes, objectness.float(), [self.size] * count, per_level)[0]

    def box_head(self, boxes: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        pooled = self.roi_heads.box_roi_pool(self._features, boxes, [self.size] * len(boxes))
        logits, deltas = self.roi_heads.box_predictor(self.roi_heads.box_head(pooled))
        counts = [len(b) for b in boxes]
        return list(logits.split(counts)), list(deltas.unflatten(1, (-1, 4)).split(counts))

    def mask_head(self, boxes: list[Tensor]) -> Tensor:
        pooled = self.roi_heads.mask_roi_pool(self._features, boxes, [self.size] * len(boxes))
        return self.roi_heads.mask_predictor(self.roi_heads.mask_head(pooled))


def _role(name: str, last_block: str, *, first: bool) -> tuple[Role, str]:
    if first:
        return "first", "sees the image"
    if name.endswith((".cls_logits", ".bbox_pred", ".cls_score", ".mask_fcn_logits")):
        return "output", "final predictions"
    if name.startswith(("rpn.", "roi_heads.")):
        return "head", "RPN, box head or mask head"
    if name.startswith((last_block, "backbone.fpn.inner_blocks.0.", "backbone.fpn.layer_blocks.0.")):
        return "late", "last block of the backbone, or finest level of the FPN"
    if name.startswith("backbone.body.layer1."):
        return "early", "stride 4: few weights, largest maps"
    return "body", "backbone or FPN"
