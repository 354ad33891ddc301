"""Head output of a two-stage detector: predictions on the teacher's proposals, and the training losses per image."""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from common.detection.roi_losses import (
    MASKS,
    Proposals,
    box_head_losses,
    ellipses,
    mask_loss,
    mask_proposals,
    rpn_losses,
)
from common.detection.types import HeadOutput, HeadTerm, Targets

PROPOSALS = 256  # proposals per image that are distilled and trained on, best objectness first
MASK_PROPOSALS = 32  # of these, the ones with the highest class score, whose masks are distilled


class Parts(Protocol):
    """The stages of a two-stage detector, bound to one batch. Class 0 is the background, as in torchvision.

    `rpn` and `roi_heads` are torchvision's, or have its matchers, samplers and box coders (see `matching_rules`).
    """

    rpn: Any
    roi_heads: Any
    size: tuple[int, int]  # height and width of the images
    has_masks: bool
    beta: float  # of the smooth L1 loss
    aligned: bool  # how target masks are cropped, see `mask_targets`

    def propose(self) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, ...]]:
        """Anchors [B, A, 4] xyxy, objectness logits [B, A], deltas [B, A, 4], and the raw RPN maps of each level."""

    def filter_proposals(
        self, anchors: Tensor, objectness: Tensor, deltas: Tensor, maps: Sequence[Tensor]
    ) -> list[Tensor]:
        """The proposals of each image [n, 4] xyxy after NMS, best first."""

    def box_head(self, boxes: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Class logits [R, outputs] and deltas [R, outputs, 4] of each image's proposals [R, 4]."""

    def mask_head(self, boxes: list[Tensor]) -> Tensor:
        """Mask logits [sum of R, outputs, m, m] of each image's boxes [R, 4]."""


def two_stage_output(
    parts: Parts, targets: Sequence[Targets] | None, proposals: object, count: int = PROPOSALS, masks: int = MASKS
) -> HeadOutput:
    """The head output of one batch.

    Terms: `objectness` [B, A, 1], `anchors` [B, A, 4], `classes` [B, R, 1, outputs], `boxes` [B, R, 4] (deltas of the
    teacher's class) and `masks` [B, M * m * m, 1]. `masks` is skipped if only losses can be wanted: targets, but no
    proposals. Losses, loss weights included: objectness, rpn_box, class, box and mask, [B] each.

    Args:
        parts: the detector, bound to the batch.
        targets: of each image, on its device; labels index the outputs of the head.
        proposals: the teacher's, or None.
        count: proposals per image, if they are not given.
        masks: most proposals per image in the mask loss.
    """
    anchors, objectness, deltas, maps = parts.propose()
    shared = proposals if isinstance(proposals, Proposals) else None
    if shared is None:
        found = _padded(parts.filter_proposals(anchors, objectness, deltas, maps), count, parts.size)
    else:
        found = shared.boxes, shared.valid
    extra = [t.boxes for t in targets] if targets else [anchors.new_zeros(0, 4)] * len(anchors)
    boxes = [torch.cat([own, more]) for own, more in zip(found[0], extra, strict=True)]
    logits, box_deltas = parts.box_head(boxes)
    count = found[0].shape[1]
    rows, row_deltas = (torch.stack([x[:count] for x in values]) for values in (logits, box_deltas))
    if shared is None:
        shared = _for_student(parts, *found, rows, row_deltas)
    terms = _terms(objectness, deltas, rows, row_deltas, shared)
    if parts.has_masks and (targets is None or proposals is not None):
        terms["masks"] = _mask_term(parts.mask_head(list(shared.mask_boxes)), shared)
    losses: dict[str, list[Tensor]] = {}
    for i, target in enumerate(targets or ()):
        one = rpn_losses(parts.rpn, anchors[i], objectness[i].float(), deltas[i].float(), target, parts.beta)
        one |= box_head_losses(
            parts.roi_heads, boxes[i], logits[i].float(), box_deltas[i].float(), target, parts.beta
        )  # fmt: skip
        for name, value in one.items():
            losses.setdefault(name, []).append(value)
    if parts.has_masks and targets:
        losses["mask"] = _mask_losses(parts, boxes, targets, masks)
    return HeadOutput(terms, maps, {name: torch.stack(values) for name, values in losses.items()}, shared)


def _padded(found: Sequence[Tensor], count: int, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The best proposals [B, count, 4] xyxy, padded with the whole image, and which are no padding [B, count]."""
    padded = found[0].new_tensor([0, 0, size[1], size[0]]).expand(len(found), count, 4).clone()
    valid = torch.zeros(len(found), count, dtype=torch.bool, device=padded.device)
    for i, own in enumerate(found):
        padded[i, : len(own)] = own[:count]
        valid[i, : len(own)] = True
    return padded, valid


@torch.no_grad()
def _for_student(parts: Parts, boxes: Tensor, valid: Tensor, logits: Tensor, deltas: Tensor) -> Proposals:
    """The proposals in the form that makes the rows of a student's output align with the teacher's."""
    probabilities = logits.float().softmax(-1)[..., 1:]
    scores, labels = probabilities.max(-1)
    labels = labels + 1
    scores = scores * valid
    order = scores.argsort(dim=1, descending=True, stable=True)[:, :MASK_PROPOSALS]
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
    foreground = (1 - logits.detach().float().softmax(-1)[..., 0]) * proposals.valid
    own = torch.gather(box_deltas, 2, proposals.labels[..., None, None].expand(-1, -1, 1, 4))[:, :, 0]
    return {
        "objectness": HeadTerm(objectness[..., None], "sigmoid", dense),
        "anchors": HeadTerm(deltas, "offset", dense),
        "classes": HeadTerm(logits, "softmax", foreground),
        "boxes": HeadTerm(own, "offset", foreground),
    }


def _mask_term(logits: Tensor, shared: Proposals) -> HeadTerm:
    """Mask logits of the teacher's class; each pixel is a row, so that the term averages over pixels."""
    labels = shared.mask_labels.flatten()
    own = logits[torch.arange(len(labels), device=labels.device), labels].flatten(1)  # [B M, m m]
    count = len(shared.mask_boxes)
    confidence = shared.mask_confidence.flatten()[:, None].expand_as(own)
    return HeadTerm(own.reshape(count, -1, 1), "sigmoid", confidence.reshape(count, -1))


def _mask_losses(parts: Parts, boxes: Sequence[Tensor], targets: Sequence[Targets], most: int) -> list[Tensor]:
    """The mask loss of each image, 0 without labels."""
    chosen = [mask_proposals(parts.roi_heads, own, target, most) for own, target in zip(boxes, targets, strict=True)]
    logits = parts.mask_head([own for own, _, _ in chosen]).float().split([len(own) for own, _, _ in chosen])
    losses = []
    for target, (own, labels, matched), values in zip(targets, chosen, logits, strict=True):
        masks = ellipses(target.boxes, *parts.size) if target.masks is None else target.masks.to(own.device)
        losses.append(mask_loss(values, own, labels, matched, masks, parts.aligned))
    return losses
