"""The output of a two-stage detector for one batch: rows about the teacher's regions, and the losses of each image."""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from common.detection.roi_losses import (
    MASKS,
    Proposals,
    ellipses,
    mask_loss,
    mask_regions,
    proposal_losses,
    region_losses,
)
from common.detection.types import HeadOutput, HeadTerm, Targets

REGIONS = 256  # best proposals of an image whose predictions are compared and trained
MASK_REGIONS = 32  # surest of them, whose masks are compared


class Parts(Protocol):
    """The parts of a two-stage detector at work on one batch. Outputs are in torchvision's order: the background first.

    `rpn` and `roi_heads` are torchvision's, or hold its matchers, samplers and box coders for another detector.
    """

    rpn: Any
    roi_heads: Any
    size: tuple[int, int]  # height and width of the images
    has_masks: bool
    beta: float  # of the smooth L1 distance
    aligned: bool  # how masks of targets are cut out, see `mask_targets`

    def propose(self) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, ...]]:
        """Anchors [B, A, 4] xyxy, objectness [B, A], deltas [B, A, 4], and both as raw maps of each level."""

    def regions(self, anchors: Tensor, objectness: Tensor, deltas: Tensor, maps: Sequence[Tensor]) -> list[Tensor]:
        """The proposals of each image [n, 4] xyxy after suppression, best first."""

    def box_head(self, boxes: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """For each image the logits [R, outputs] and deltas [R, outputs, 4] of its regions [R, 4]."""

    def mask_head(self, boxes: list[Tensor]) -> Tensor:
        """Mask logits [all regions, outputs, m, m] of the regions [R, 4] of each image."""


def two_stage_output(
    parts: Parts, targets: Sequence[Targets] | None, proposals: object, regions: int = REGIONS, masks: int = MASKS
) -> HeadOutput:
    """Terms: `objectness` [B, A, 1], `anchors` [B, A, 4], `classes` [B, R, 1, outputs], `boxes` [B, R, 4] of the
    teacher's class, and `masks` [B, M m m, 1], which are left out where only the losses can be wanted: with targets and
    no proposals. Losses: objectness, rpn_box, class, box and mask, gains included.

    Args:
        parts: of the detector, at work on the batch.
        targets: of each image, on its device, with outputs of the head as labels.
        proposals: the teacher's, or None.
        regions: how many of its own proposals are taken for each image.
        masks: of how many regions of an image the mask loss is a mean, at most.
    """
    anchors, objectness, deltas, maps = parts.propose()
    first = proposals if isinstance(proposals, Proposals) else None
    if first is None:
        found = _filled(parts.regions(anchors, objectness, deltas, maps), regions, parts.size)
    else:
        found = first.boxes, first.valid
    extra = [t.boxes for t in targets] if targets else [anchors.new_zeros(0, 4)] * len(anchors)
    boxes = [torch.cat([own, more]) for own, more in zip(found[0], extra, strict=True)]
    logits, box_deltas = parts.box_head(boxes)
    count = found[0].shape[1]
    rows, row_deltas = (torch.stack([x[:count] for x in values]) for values in (logits, box_deltas))
    if first is None:
        first = _chosen(parts, *found, rows, row_deltas)
    terms = _terms(objectness, deltas, rows, row_deltas, first)
    if parts.has_masks and (targets is None or proposals is not None):
        terms["masks"] = _mask_term(parts.mask_head(list(first.mask_boxes)), first)
    losses: dict[str, list[Tensor]] = {}
    for i, target in enumerate(targets or ()):
        one = proposal_losses(parts.rpn, anchors[i], objectness[i].float(), deltas[i].float(), target, parts.beta)
        one |= region_losses(
            parts.roi_heads, boxes[i], logits[i].float(), box_deltas[i].float(), target, parts.beta
        )  # fmt: skip
        for name, value in one.items():
            losses.setdefault(name, []).append(value)
    if parts.has_masks and targets:
        losses["mask"] = _mask_losses(parts, boxes, targets, masks)
    return HeadOutput(terms, maps, {name: torch.stack(values) for name, values in losses.items()}, first)


def _filled(found: Sequence[Tensor], count: int, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The best proposals [B, count, 4] xyxy, and which of them are no filling [B, count]."""
    filled = found[0].new_tensor([0, 0, size[1], size[0]]).expand(len(found), count, 4).clone()
    valid = torch.zeros(len(found), count, dtype=torch.bool, device=filled.device)
    for i, own in enumerate(found):
        filled[i, : len(own)] = own[:count]
        valid[i, : len(own)] = True
    return filled, valid


@torch.no_grad()
def _chosen(parts: Parts, boxes: Tensor, valid: Tensor, logits: Tensor, deltas: Tensor) -> Proposals:
    """What a student needs to make rows that align with these."""
    probabilities = logits.float().softmax(-1)[..., 1:]
    scores, labels = probabilities.max(-1)
    labels = labels + 1
    scores = scores * valid
    order = scores.argsort(dim=1, descending=True, stable=True)[:, :MASK_REGIONS]
    own = torch.gather(deltas, 2, labels[..., None, None].expand(-1, -1, 1, 4))[:, :, 0]
    height, width = parts.size
    refined = []
    for image_boxes, image_deltas, rows in zip(boxes, own.float(), order, strict=True):
        decoded = parts.roi_heads.box_coder.decode(image_deltas[rows], [image_boxes[rows]])[:, 0]
        limit = decoded.new_tensor([width, height, width, height])
        refined.append(torch.minimum(decoded.clamp(min=0), limit))
    return Proposals(boxes, valid, labels, torch.stack(refined), labels.gather(1, order), scores.gather(1, order))


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


def _mask_term(logits: Tensor, first: Proposals) -> HeadTerm:
    """The mask of the teacher's class, each pixel a row, so that the term is a mean over pixels."""
    labels = first.mask_labels.flatten()
    own = logits[torch.arange(len(labels), device=labels.device), labels].flatten(1)  # [B M, m m]
    count = len(first.mask_boxes)
    confidence = first.mask_confidence.flatten()[:, None].expand_as(own)
    return HeadTerm(own.reshape(count, -1, 1), "sigmoid", confidence.reshape(count, -1))


def _mask_losses(parts: Parts, boxes: Sequence[Tensor], targets: Sequence[Targets], most: int) -> list[Tensor]:
    """The mask loss of each image; zero for one without labels."""
    chosen = [mask_regions(parts.roi_heads, own, target, most) for own, target in zip(boxes, targets, strict=True)]
    logits = parts.mask_head([own for own, _, _ in chosen]).float().split([len(own) for own, _, _ in chosen])
    losses = []
    for target, (own, labels, matched), values in zip(targets, chosen, logits, strict=True):
        masks = ellipses(target.boxes, *parts.size) if target.masks is None else target.masks.to(own.device)
        losses.append(mask_loss(values, own, labels, matched, masks, parts.aligned))
    return losses
