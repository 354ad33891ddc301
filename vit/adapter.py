"""Mask R-CNN with a Swin Transformer: mmdet's detector behind the Detector protocol."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork, concat_box_prediction_layers

from common.checkpoints.download import fetch
from common.checkpoints.rcnn_architecture import MmdetArchitecture
from common.checkpoints.read import load_own, read_published
from common.checkpoints.state_dict import load_state
from common.checkpoints.strict_json import checked, published_names
from common.detection.attention import AttentionInput
from common.detection.roi_losses import matching_rules
from common.detection.roi_outputs import two_stage_output
from common.detection.torchvision_parts import MASKS, OUTPUTS, detections_of
from common.detection.types import (
    AttentionLayer,
    Detections,
    HeadOutput,
    LayerPolicy,
    NormedLayer,
    Role,
    StatisticsLayer,
    Targets,
)
from common.runtime.environment import temporarily
from common.runtime.errors import UserError
from vit.export import TwoStage
from vit.models import OFFICIAL, RELEASE, build_module, check_published, normalised, recognise

from mmdet.datasets import CocoDataset  # isort: skip  (after vit.models, which puts mmcv's operators in place)
from mmdet.models.backbones.swin import ShiftWindowMSA, SwinBlock  # isort: skip
from mmdet.structures import DetDataSample  # isort: skip
from mmdet.structures.bbox import bbox2roi  # isort: skip

FAMILY = "vit"


@dataclass
class SwinDetector:
    """A Mask R-CNN of mmdet with a Swin. Modules are mmdet's own classes."""

    class_names: tuple[str, ...]
    architecture: Mapping[str, Any]  # {"config": mmdet's file, "overrides": {...}, "names": [...]}
    state: Mapping[str, Tensor] | None = None
    stride: int = 32
    has_masks: ClassVar[bool] = True
    has_fixed_size: ClassVar[bool] = True  # which of a Swin's windows are padded stands in the graph

    def build(self) -> nn.Module:
        """A new module in eval mode, float32 on the CPU.

        Raises:
            UserError: the weights do not fit the architecture.
        """
        module = build_module(self.architecture)
        if self.state is not None:
            load_state(module, self.state, "weights", f"mmdet's {self.architecture['config']}")
        return module

    def head_output(
        self, module: nn.Module, images: Tensor, targets: Sequence[Targets] | None = None, proposals: object = None
    ) -> HeadOutput:
        """As `common.detection.roi_outputs.two_stage_output` says."""
        wanted = None if targets is None else as_outputs(targets, images.device)
        return two_stage_output(SwinParts(module, images), wanted, proposals)

    @torch.no_grad()
    def detect(
        self, module: nn.Module, images: Tensor, confidence: float, iou: float, max_detections: int
    ) -> list[Detections]:
        """mmdet's own inference on images of the size they have, at these thresholds."""
        model: Any = module
        meta = dict.fromkeys(("img_shape", "ori_shape", "pad_shape"), images.shape[-2:]) | {"scale_factor": (1.0, 1.0)}
        samples = [DetDataSample(metainfo=meta) for _ in images]
        parts, settings = SwinParts(module, images), model.roi_head.test_cfg
        limits = temporarily(settings, score_thr=confidence, max_per_img=max_detections)
        with limits, temporarily(settings.nms, iou_threshold=iou):
            proposals = model.rpn_head.predict(parts.features, samples, rescale=False)
            found = model.roi_head.predict_bbox(parts.features, [meta] * len(images), proposals, settings)
        labels = torch.cat([f.labels for f in found])
        logits = parts.mask_head([f.bboxes for f in found])
        masks = logits[torch.arange(len(labels), device=labels.device), labels + 1].float().sigmoid()
        pairs = zip(found, masks.split([len(f.labels) for f in found]), strict=True)
        return [Detections(f.bboxes.float(), f.scores.float(), f.labels.long(), grid) for f, grid in pairs]

    export_outputs: ClassVar[Mapping[str, Mapping[int, str]]] = OUTPUTS | MASKS

    def export_module(self, module: nn.Module) -> nn.Module:
        """mmdet's inference on one image, with the limits of its configuration."""
        return TwoStage(module)

    def detections(
        self, outputs: Sequence[Tensor], confidence: float, iou: float, max_detections: int
    ) -> list[Detections]:
        classes = torch.arange(len(self.class_names), device=outputs[0].device)
        return detections_of(outputs, classes, confidence, iou, max_detections)

    def statistics_layers(self, module: nn.Module) -> list[StatisticsLayer]:
        return []  # a Swin has no BatchNorm

    def attention_layers(self, module: nn.Module) -> list[AttentionLayer]:
        """The windowed attention of every block."""
        parts = [(name, part) for name, part in module.named_modules() if isinstance(part, ShiftWindowMSA)]
        return [AttentionLayer(name, f"{name}.w_msa.proj", part.w_msa.num_heads) for name, part in parts]

    def normed_layers(self, module: Any) -> list[NormedLayer]:
        """Of every block, patch merging (no bias) and level of the FPN; attention pads its windows with zeros."""
        blocks = [name for name, part in module.named_modules() if isinstance(part, SwinBlock)]
        layers = [(f"{name}.norm1", f"{name}.attn.w_msa.qkv", False) for name in blocks]
        layers += [(f"{name}.norm2", f"{name}.ffn.layers.0.0", True) for name in blocks]
        merges = [f"backbone.stages.{i}.downsample" for i in range(3)]
        layers += [(f"{name}.norm", f"{name}.reduction", False) for name in merges]
        layers += [(f"backbone.norm{i}", f"neck.lateral_convs.{i}.conv", True) for i in range(4)]
        return [NormedLayer(*layer) for layer in layers]

    def feature_layers(self, module: Any) -> list[str]:
        """Every block of the Swin, and the convolutions that give the FPN's levels."""
        blocks = [name for name, part in module.named_modules() if isinstance(part, SwinBlock)]
        return blocks + [f"neck.fpn_convs.{i}.conv" for i in range(len(module.neck.fpn_convs))]

    def quantization_policy(self, module: nn.Module) -> list[LayerPolicy]:
        kinds = nn.Conv2d | nn.ConvTranspose2d | nn.Linear | AttentionInput
        return [LayerPolicy(n, *_role(n)) for n, m in module.named_modules() if isinstance(m, kinds)]


def load(weights: Path) -> SwinDetector:
    """Loads a checkpoint of OpenMMLab (.pth), or safetensors with its architecture.

    An official file that is missing is fetched when online.

    Raises:
        UserError: missing, damaged or unsafe file, or another model.
    """
    if not weights.is_file():
        fetch(weights, f"{RELEASE}/{weights.stem.rpartition('_')[0].rpartition('_')[0]}", OFFICIAL)
    if weights.suffix == ".safetensors":
        state, architecture = load_own(weights, FAMILY)
    else:
        state, meta = read_published(weights)
        architecture = recognise(state) or {}
        if not architecture:
            raise UserError(f"{weights}: no Mask R-CNN of mmdet with a Swin; {FAMILY} needs a state_dict of one")
        check_published(meta, architecture, str(weights))
        if names := published_names(meta, str(weights)):
            architecture["names"] = names
    detector = from_architecture(architecture)
    detector.state = state
    detector.build()  # a state that does not fit is found before any work
    return detector


def from_architecture(architecture: Mapping[str, Any]) -> SwinDetector:
    """The detector that `SwinDetector.architecture` describes; without `names` 80 classes are COCO's.

    Raises:
        UserError: an architecture that is not allowed.
    """
    where = f"weights: the architecture of this {FAMILY}"
    found = checked(MmdetArchitecture, architecture, where).model_dump(exclude_unset=True)
    count, coco = found["overrides"].get("roi_head.bbox_head.num_classes", 80), CocoDataset.METAINFO["classes"]
    names = found.get("names") or (coco if count == len(coco) else [f"class {i}" for i in range(1, count + 1)])
    if len(names) != count:
        raise UserError(f"{where}: has {len(names)} names for {count} classes")
    return SwinDetector(tuple(names), found)


def as_outputs(targets: Sequence[Targets], device: torch.device) -> list[Targets]:
    """Targets on a device, with outputs of the head as labels; output 0 is the background."""
    return [Targets(t.boxes.to(device), t.labels.to(device) + 1, t.masks) for t in targets]


class SwinParts:
    """mmdet's detector at work on images; it has the background last, and none in masks and boxes."""

    beta = 0.0  # the configurations have plain L1 distances
    aligned = True
    has_masks = True

    def __init__(self, model: Any, images: Tensor) -> None:
        self.size = images.shape[-2], images.shape[-1]
        self._model = model
        self.features = model.extract_feat(normalised(model, images))
        self.rpn, self.roi_heads = _rules(model)

    def propose(self) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, ...]]:
        head, features = self._model.rpn_head, self.features
        scores, deltas = head(features)
        sizes = [tuple(s.shape[-2:]) for s in scores]
        anchors = torch.cat(head.prior_generator.grid_priors(sizes, device=features[0].device))
        maps = tuple(torch.cat(pair, 1) for pair in zip(scores, deltas, strict=True))
        count = len(features[0])
        flat_scores, flat_deltas = concat_box_prediction_layers(list(scores), list(deltas))
        flat_deltas = flat_deltas.reshape(count, -1, 4)
        return anchors.expand(count, -1, 4), flat_scores.reshape(count, -1), flat_deltas, maps

    @torch.no_grad()
    def filter_proposals(
        self, anchors: Tensor, objectness: Tensor, deltas: Tensor, maps: Sequence[Tensor]
    ) -> list[Tensor]:
        scores, boxes = zip(*(m.float().split([m.shape[1] // 5, m.shape[1] // 5 * 4], 1) for m in maps), strict=True)
        metas = [{"img_shape": self.size}] * len(anchors)
        found = self._model.rpn_head.predict_by_feat(list(scores), list(boxes), batch_img_metas=metas)
        return [f.bboxes for f in found]

    def box_head(self, boxes: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        found = self._model.roi_head._bbox_forward(self.features, bbox2roi(boxes))
        scores, deltas = found["cls_score"], found["bbox_pred"].unflatten(1, (-1, 4))
        scores = torch.cat([scores[:, -1:], scores[:, :-1]], 1)
        deltas = F.pad(deltas, (0, 0, 1, 0))
        counts = [len(b) for b in boxes]
        return list(scores.split(counts)), list(deltas.split(counts))

    def mask_head(self, boxes: list[Tensor]) -> Tensor:
        logits = self._model.roi_head._mask_forward(self.features, bbox2roi(boxes))["mask_preds"]
        return F.pad(logits, (0, 0, 0, 0, 1, 0))


def _rules(model: Any) -> tuple[RegionProposalNetwork, RoIHeads]:
    """How the module was trained to match, sample and code boxes, as torchvision's objects; only, a label whose best
    anchor has an IoU below .3 claims it as well."""
    stages = model.train_cfg.rpn, model.train_cfg.rcnn
    numbers = [(s.assigner.pos_iou_thr, s.assigner.neg_iou_thr, s.sampler.num, s.sampler.pos_fraction) for s in stages]
    return matching_rules(numbers[0], numbers[1], tuple(1 / s for s in model.roi_head.bbox_head.bbox_coder.stds))


def _role(name: str) -> tuple[Role, str]:
    if ".matmuls." in name:
        return "attention_input", "query, key, value or attention"
    if name == "backbone.patch_embed.projection":
        return "first", "sees the image"
    if name.endswith((".rpn_cls", ".rpn_reg", ".fc_cls", ".fc_reg", ".conv_logits")):
        return "output", "final predictions"
    if name.startswith(("rpn_head.", "roi_head.")):
        return "head", "RPN, box head or mask head"
    if name.startswith("neck."):
        return "late", "FPN"
    if name.startswith("backbone.stages.0."):
        return "early", "stride 4: few weights, largest maps"
    return "body", "attention, MLP or patch merging"
