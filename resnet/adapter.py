"""Mask R-CNN and Faster R-CNN: torchvision's detection models behind the Detector protocol."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import concat_box_prediction_layers

from common.errors import UserError
from common.two_stage import Proposals, ellipses, mask_loss, mask_regions, proposal_losses, region_losses
from common.types import Detections, HeadOutput, HeadTerm, LayerPolicy, Role, StatisticsLayer, Targets
from common.weights import load_own, read_state
from resnet.models import MODELS, build_module, class_indices, recognise

FAMILY = "resnet"
REGIONS = 256  # best proposals of an image whose predictions are compared and trained
MASK_REGIONS = 32  # surest of them, whose masks are compared


@dataclass
class ResNetDetector:
    """A torchvision two-stage checkpoint. Modules are torchvision's own classes."""

    class_names: tuple[str, ...]
    architecture: Mapping[str, Any]
    state: Mapping[str, Tensor] | None = None
    stride: int = 32

    def build(self) -> nn.Module:
        """A new module in eval mode, float32 on the CPU.

        Raises:
            UserError: the weights do not fit the architecture.
        """
        module = build_module(self.architecture)
        if self.state is not None:
            found = module.load_state_dict(self.state, strict=False)
            missing = [k for k in found.missing_keys if not k.endswith("num_batches_tracked")]
            if wrong := [*missing, *found.unexpected_keys]:
                raise UserError(f"weights: they do not fit {self.architecture['model']} ({wrong[0]})")
        return module

    def head_output(
        self, module: nn.Module, images: Tensor, targets: Sequence[Targets] | None = None, proposals: object = None
    ) -> HeadOutput:
        """Terms: `objectness` [B, A, 1], `anchors` [B, A, 4], `classes` [B, R, 1, outputs], `boxes` [B, R, 4] of the
        teacher's class, and `masks` [B, M m m, 1], which are left out where only the losses can be wanted: with targets
        and no proposals. Losses: objectness, rpn_box, class, box and mask, gains included."""
        model: Any = module
        size = images.shape[-2], images.shape[-1]
        with _own_flags(model):
            batch = torch.stack([model.transform.normalize(image) for image in images])
            features = model.backbone(batch)
            anchors, objectness, deltas, maps = _propose(model, batch, features)
            first = proposals if isinstance(proposals, Proposals) else None
            regions = (
                _regions(model, anchors, objectness, deltas, maps, size)
                if first is None
                else (first.boxes, first.valid)
            )
            wanted = None if targets is None else self._outputs(targets, images.device)
            extra = [t.boxes for t in wanted] if wanted else [images.new_zeros(0, 4)] * len(images)
            boxes = [torch.cat([own, more]) for own, more in zip(regions[0], extra, strict=True)]
            logits, box_deltas = _box_head(model, features, boxes, size)
            rows = torch.stack([x[:REGIONS] for x in logits])
            row_deltas = torch.stack([x[:REGIONS] for x in box_deltas])
            if first is None:
                first = _chosen(model, *regions, rows, row_deltas, size)
            terms = _terms(objectness, deltas, rows, row_deltas, first)
            if model.roi_heads.has_mask() and (wanted is None or proposals is not None):
                terms["masks"] = _mask_term(model, features, first, size)
            losses: dict[str, list[Tensor]] = {}
            for i, target in enumerate(wanted or ()):
                one = proposal_losses(model.rpn, anchors[i], objectness[i].float(), deltas[i].float(), target)
                one |= region_losses(model.roi_heads, boxes[i], logits[i].float(), box_deltas[i].float(), target)
                if model.roi_heads.has_mask():
                    one["mask"] = _mask_loss(model, features, boxes[i], target, i, size)
                for name, value in one.items():
                    losses.setdefault(name, []).append(value)
        return HeadOutput(terms, maps, {name: torch.stack(values) for name, values in losses.items()}, first)

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
        classes = torch.full((self.architecture["outputs"],), -1, device=images.device)
        classes[self._heads(images.device)] = torch.arange(len(self.class_names), device=images.device)
        found = []
        for row in rows:
            labels = classes[row["labels"]]
            kept = labels >= 0  # COCO's unused ids are no classes
            masks = row["masks"][kept, 0] > 0.5 if "masks" in row else None
            found.append(Detections(row["boxes"][kept].float(), row["scores"][kept].float(), labels[kept], masks))
        return found

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
        layers = [n for n, m in module.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
        return [LayerPolicy(name, *_role(name, first=i == 0)) for i, name in enumerate(layers)]

    def _heads(self, device: torch.device) -> Tensor:
        """The output of each class."""
        return torch.tensor(class_indices(self.architecture["outputs"])[1], device=device)

    def _outputs(self, targets: Sequence[Targets], device: torch.device) -> list[Targets]:
        """Targets with outputs of the head as labels."""
        heads = self._heads(device)
        return [Targets(t.boxes.to(device), heads[t.labels.to(device)], t.masks) for t in targets]


def load(weights: Path) -> ResNetDetector:
    """Loads a state_dict of one of torchvision's models (.pth), or safetensors with its architecture.

    Raises:
        UserError: missing, damaged or unsafe file, or another model.
    """
    if weights.suffix == ".safetensors":
        state, architecture = load_own(weights, FAMILY)
        detector = from_architecture(architecture)
    else:
        state = read_state(weights)
        found = recognise(state)
        if found is None:
            raise UserError(f"{weights}: none of torchvision's {', '.join(MODELS)}; {FAMILY} needs a state_dict of one")
        detector = from_architecture(found)
    detector.state = {name: t.float() if t.is_floating_point() else t for name, t in state.items()}
    detector.build()  # a state that does not fit is found before any work
    return detector


def from_architecture(architecture: Mapping[str, Any]) -> ResNetDetector:
    """The detector that `ResNetDetector.architecture` describes."""
    names = architecture.get("names") or class_indices(architecture["outputs"])[0]
    return ResNetDetector(tuple(names), architecture)


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


def _propose(
    model: Any, batch: Tensor, features: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, ...]]:
    """Anchors [B, A, 4], objectness [B, A], deltas [B, A, 4], and both as raw maps of each level."""
    scores, deltas = model.rpn.head(list(features.values()))
    sizes = [(batch.shape[-2], batch.shape[-1])] * len(batch)
    anchors = torch.stack(model.rpn.anchor_generator(ImageList(batch, sizes), list(features.values())))
    maps = tuple(torch.cat(pair, 1) for pair in zip(scores, deltas, strict=True))
    flat_scores, flat_deltas = concat_box_prediction_layers(scores, deltas)
    count = len(batch)
    return anchors, flat_scores.reshape(count, -1), flat_deltas.reshape(count, -1, 4), maps


@torch.no_grad()
def _regions(
    model: Any, anchors: Tensor, objectness: Tensor, deltas: Tensor, maps: Sequence[Tensor], size: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """The best proposals [B, REGIONS, 4] xyxy, and which of them are no filling [B, REGIONS]."""
    count = len(anchors)
    boxes = model.rpn.box_coder.decode(deltas.float().flatten(0, 1), list(anchors)).view(count, -1, 4)
    per_level = [m[0].numel() // 5 for m in maps]  # a score and four deltas for each anchor
    found, _ = model.rpn.filter_proposals(boxes, objectness.float(), [size] * count, per_level)
    filled = anchors.new_tensor([0, 0, size[1], size[0]]).expand(count, REGIONS, 4).clone()
    valid = torch.zeros(count, REGIONS, dtype=torch.bool, device=anchors.device)
    for i, own in enumerate(found):
        filled[i, : len(own)] = own[:REGIONS]
        valid[i, : len(own)] = True
    return filled, valid


def _box_head(
    model: Any, features: Mapping[str, Tensor], boxes: list[Tensor], size: tuple[int, int]
) -> tuple[list[Tensor], list[Tensor]]:
    """For each image the logits [R, outputs] and deltas [R, outputs, 4] of its regions."""
    heads = model.roi_heads
    pooled = heads.box_roi_pool(features, boxes, [size] * len(boxes))
    logits, deltas = heads.box_predictor(heads.box_head(pooled))
    counts = [len(b) for b in boxes]
    return list(logits.split(counts)), list(deltas.unflatten(1, (-1, 4)).split(counts))


@torch.no_grad()
def _chosen(
    model: Any, boxes: Tensor, valid: Tensor, logits: Tensor, deltas: Tensor, size: tuple[int, int]
) -> Proposals:
    """What a student needs to make rows that align with these."""
    probabilities = logits.float().softmax(-1)[..., 1:]
    scores, labels = probabilities.max(-1)
    labels = labels + 1
    scores = scores * valid
    order = scores.argsort(dim=1, descending=True, stable=True)[:, :MASK_REGIONS]
    own = torch.gather(deltas, 2, labels[..., None, None].expand(-1, -1, 1, 4))[:, :, 0]
    height, width = size
    refined = []
    for image_boxes, image_deltas, rows in zip(boxes, own.float(), order, strict=True):
        decoded = model.roi_heads.box_coder.decode(image_deltas[rows], [image_boxes[rows]])[:, 0]
        limit = decoded.new_tensor([width, height, width, height])
        refined.append(torch.minimum(decoded.clamp(min=0), limit))
    return Proposals(
        boxes, valid, labels, torch.stack(refined), labels.gather(1, order), scores.gather(1, order)
    )  # fmt: skip


def _terms(
    objectness: Tensor, deltas: Tensor, logits: Tensor, box_deltas: Tensor, proposals: Proposals
) -> dict[str, HeadTerm]:
    dense = objectness.detach().float().sigmoid()
    sure = (1 - logits.detach().float().softmax(-1)[..., 0]) * proposals.valid
    own = torch.gather(box_deltas, 2, proposals.labels[..., None, None].expand(-1, -1, 1, 4))[:, :, 0]
    return {
        "objectness": HeadTerm(objectness[..., None], "sigmoid", dense),
        "anchors": HeadTerm(deltas, "offset", dense),
        "classes": HeadTerm(logits, "softmax", sure),
        "boxes": HeadTerm(own, "offset", sure),
    }


def _mask_head(
    model: Any, features: Mapping[str, Tensor], boxes: list[Tensor], size: tuple[int, int]
) -> Tensor:  # fmt: skip
    """Mask logits [all regions, outputs, m, m]."""
    heads = model.roi_heads
    return heads.mask_predictor(heads.mask_head(heads.mask_roi_pool(features, boxes, [size] * len(boxes))))


def _mask_term(model: Any, features: Mapping[str, Tensor], first: Proposals, size: tuple[int, int]) -> HeadTerm:
    """The mask of the teacher's class, each pixel a row, so that the term is a mean over pixels."""
    logits = _mask_head(model, features, list(first.mask_boxes), size)
    labels = first.mask_labels.flatten()
    own = logits[torch.arange(len(labels), device=labels.device), labels].flatten(1)  # [B M, m m]
    count = len(first.mask_boxes)
    confidence = first.mask_confidence.flatten()[:, None].expand_as(own)
    return HeadTerm(own.reshape(count, -1, 1), "sigmoid", confidence.reshape(count, -1))


def _mask_loss(
    model: Any, features: Mapping[str, Tensor], boxes: Tensor, target: Targets, index: int, size: tuple[int, int]
) -> Tensor:
    chosen, labels, matched = mask_regions(model.roi_heads, boxes, target)
    if not len(labels):
        return boxes.new_zeros(())
    one = {name: level[index : index + 1] for name, level in features.items()}
    logits = _mask_head(model, one, [chosen], size).float()
    masks = ellipses(target.boxes, *size) if target.masks is None else target.masks.to(boxes.device)
    return mask_loss(logits, chosen, labels, matched, masks)


def _role(name: str, *, first: bool) -> tuple[Role, str]:
    if first:
        return "first", "sees the image"
    if name.endswith((".cls_logits", ".bbox_pred", ".cls_score", ".mask_fcn_logits")):
        return "output", "final predictions"
    if name.startswith(("rpn.", "roi_heads.")):
        return "head", "RPN, box head or mask head"
    if name.startswith("backbone.body.layer1."):
        return "early", "stride 4: few weights, largest maps"
    return "body", "backbone or FPN"
