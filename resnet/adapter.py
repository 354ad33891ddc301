"""Mask R-CNN and Faster R-CNN: torchvision's detection models behind the Detector protocol."""

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import get_model_weights
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import concat_box_prediction_layers

from common.checkpoints.download import fetch
from common.checkpoints.rcnn_architecture import MOBILE, MODELS, TorchvisionArchitecture
from common.checkpoints.read import load_own, read_published
from common.checkpoints.state_dict import load_state
from common.checkpoints.strict_json import checked
from common.detection.roi_losses import BETA
from common.detection.roi_outputs import two_stage_output
from common.detection.torchvision_parts import (
    MASKS,
    OLD_NAMES,
    OUTPUTS,
    OneImage,
    Outputs,
    batch_norms,
    class_names,
    detections_of,
    official_files,
    own_flags,
    renamed,
    with_epsilon,
)
from common.detection.types import Detections, HeadOutput, LayerPolicy, Role, StatisticsLayer, Targets
from common.runtime.environment import temporarily
from common.runtime.errors import UserError
from resnet.backbones import normed, separated, stages, timm_body
from resnet.models import build_module, given_backbone, recognise, which_mobile

FAMILY = "resnet"
RESNET50 = "backbone.body.layer4.2.conv3.weight"  # a ResNet-50 of torchvision, or of timm, which names it alike


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
            named = self.architecture.get("backbone") or self.architecture["model"]
            what = f"torchvision's {named}; for other backbones and anchors give detector.backbone or .anchor_sizes"
            load_state(module, self.state, "weights", what)
        return module

    def head_output(
        self, module: nn.Module, images: Tensor, targets: Sequence[Targets] | None = None, proposals: object = None
    ) -> HeadOutput:
        """As `common.detection.roi_outputs.two_stage_output` says."""
        model: Any = module
        with own_flags(model):
            batch = torch.stack([model.transform.normalize(image) for image in images])
            wanted = None if targets is None else Outputs(self.architecture["outputs"], images.device).targets(targets)
            return two_stage_output(_Parts(model, batch, model.backbone(batch)), wanted, proposals)

    @torch.no_grad()
    def detect(
        self, module: nn.Module, images: Tensor, confidence: float, iou: float, max_detections: int
    ) -> list[Detections]:
        """torchvision's own inference on images of the size they have, at these thresholds."""
        model: Any = module
        limits = {"score_thresh": confidence, "nms_thresh": iou, "detections_per_img": max_detections}
        with own_flags(model), temporarily(model.roi_heads, **limits):
            rows = model(list(images))
        return Outputs(self.architecture["outputs"], images.device).detections(rows)

    @property
    def export_outputs(self) -> Mapping[str, Mapping[int, str]]:
        return OUTPUTS | (MASKS if self.architecture["model"].startswith("mask") else {})

    def export_module(self, module: nn.Module) -> nn.Module:
        """torchvision's own inference on one image, with torchvision's default limits."""
        return OneImage(module)

    def detections(
        self, outputs: Sequence[Tensor], confidence: float, iou: float, max_detections: int
    ) -> list[Detections]:
        classes = Outputs(self.architecture["outputs"], outputs[0].device).classes
        return detections_of(outputs, classes, confidence, iou, max_detections)

    def statistics_layers(self, module: nn.Module) -> list[StatisticsLayer]:
        """Every BatchNorm of backbone and FPN, frozen in training or not, with the convolution before it."""
        if self._timm is not None:
            return list(self._timm[0])
        return batch_norms(module, "backbone.")

    def feature_layers(self, module: Any) -> list[str]:
        """The convolutions that give the FPN's levels."""
        return [f"backbone.fpn.layer_blocks.{i}" for i in range(len(module.backbone.fpn.layer_blocks))]

    def quantization_policy(self, module: nn.Module) -> list[LayerPolicy]:
        layers = [n for n, m in module.named_modules() if isinstance(m, nn.Conv2d | nn.ConvTranspose2d | nn.Linear)]
        early = {n for n in layers if n.startswith("backbone.body.layer1.")}
        blocks = [n.split(".")[3] for n in layers if n.startswith("backbone.body.layer4.")]
        last = f"backbone.body.layer4.{blocks[-1]}." if blocks else "none"
        if self._timm is not None:
            _, early, last = self._timm
        return [LayerPolicy(name, *_role(name, last, early, first=i == 0)) for i, name in enumerate(layers)]

    @functools.cached_property
    def _timm(self) -> tuple[list[StatisticsLayer], set[str], str] | None:
        """Of a backbone of timm: its BatchNorms, the convolutions of its first stages, and its last block."""
        name = self.architecture.get("backbone")
        if name is None:
            return None
        body = separated(timm_body(name, self.architecture["levels"]))
        return normed(body, name), *stages(body)


def load(weights: Path, given: Mapping[str, Any] | None = None) -> ResNetDetector:
    """Loads a state_dict of one of torchvision's models (.pth), or safetensors with its architecture.

    An official file that is missing is fetched when online, and its SHA-256 compared with the part in its name.

    Args:
        weights: the file.
        given: what the configuration says of it, as `common.config.schema.DetectorConfig`; not for safetensors.

    Raises:
        UserError: missing, damaged or unsafe file, or another model.
    """
    if not weights.exists():
        fetch(weights, *official_files([get_model_weights(name) for name in MODELS]))
    arguments: Mapping[str, Any] = {}
    if weights.suffix == ".safetensors":
        state, architecture = load_own(weights, FAMILY)
    elif given and "backbone" in given:
        if "model" in given:
            raise UserError("detector.model: found beside detector.backbone; give one of the two")
        found, arguments = read_published(weights)
        found = renamed(found, OLD_NAMES, weights)
        name = (recognise(found) or {}).get("model") if RESNET50 in found else None
        state, architecture = given_backbone(found, given)
    else:
        state, arguments = read_published(weights)
        state = renamed(state, OLD_NAMES, weights)
        architecture = recognise(state) or {}
        if architecture.get("model") in MOBILE:
            architecture["model"] = which_mobile(weights, (given or {}).get("model"), arguments.get("model"))
        if given and "levels" in given:
            raise UserError("detector.levels: found without detector.backbone; give both, or neither")
        name = architecture.get("model")
        if not architecture:
            raise UserError(f"{weights}: none of torchvision's {', '.join(MODELS)}; {FAMILY} needs a state_dict of one")
    if given:
        if weights.suffix == ".safetensors":
            raise UserError(f"detector: found settings, but {weights} says itself what it is; leave them out")
        if given.get("model", architecture["model"]) != architecture["model"]:
            raise UserError(f"detector.model: found {given['model']}, but {weights} is another network; leave it out")
        architecture |= {k: given[k] for k in ("anchor_sizes", "aspect_ratios") if k in given}
    if weights.suffix != ".safetensors":
        architecture = with_epsilon(architecture, given, weights, state, arguments, name)
    detector = from_architecture(json.loads(json.dumps(architecture)))
    detector.state = state
    module: Any = detector.build()  # a state that does not fit is found before any work
    threshold = arguments.get("rpn_score_thresh")
    if isinstance(threshold, int | float) and threshold != module.rpn.score_thresh:
        raise UserError(
            f"{weights}: was trained with rpn_score_thresh {threshold:g}; {architecture['model']} is built with "
            f"{module.rpn.score_thresh:g}, and another one cannot be given"
        )
    return detector


def from_architecture(architecture: Mapping[str, Any]) -> ResNetDetector:
    """The detector that `ResNetDetector.architecture` describes, without weights.

    Raises:
        UserError: an architecture that is not allowed.
    """
    where = f"weights: the architecture of this {FAMILY}"
    found = checked(TorchvisionArchitecture, architecture, where).model_dump(exclude_unset=True)
    detector = ResNetDetector(class_names(found, where), found)
    assert detector._timm is None or detector._timm  # a backbone that will not do is found before any work
    return detector


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


def _role(name: str, last_block: str, early: set[str], *, first: bool) -> tuple[Role, str]:
    if first:
        return "first", "sees the image"
    if name.endswith((".cls_logits", ".bbox_pred", ".cls_score", ".mask_fcn_logits")):
        return "output", "final predictions"
    if name.startswith(("rpn.", "roi_heads.")):
        return "head", "RPN, box head or mask head"
    if name.startswith((last_block, "backbone.fpn.inner_blocks.0.", "backbone.fpn.layer_blocks.0.")):
        return "late", "last block of the backbone, or finest level of the FPN"
    if name in early:
        return "early", "stride 4: few weights, largest maps"
    return "body", "backbone or FPN"
