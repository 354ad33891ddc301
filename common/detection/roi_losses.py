"""Two-stage detectors: what a teacher hands to its student, and the training losses of one image without sampling.

torchvision draws a balanced sample of anchors and of proposals and takes means over it. Here every anchor and every
proposal counts with the probability that it would have been drawn, which is the expectation of that loss: the same for
the same image whatever its batch, and without noise. (Ren et al., arXiv 1506.01497, section 3.1.2; He et al., arXiv
1703.06870, section 3.1; the numbers are those of the module itself.)
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.models.detection.roi_heads import RoIHeads, project_masks_on_boxes
from torchvision.models.detection.rpn import RegionProposalNetwork
from torchvision.ops import box_iou, roi_align

from common.detection.types import Targets

BETA = 1 / 9  # of the smooth L1 distance
MASKS = 32  # best matching proposals of an image whose masks are compared


@dataclass(frozen=True)
class Proposals:
    """The teacher's regions, on which a student's heads are run; short lists are filled up with the whole image."""

    boxes: Tensor  # [B, R, 4] xyxy, pixels
    valid: Tensor  # [B, R] bool
    labels: Tensor  # [B, R], the surest output of the teacher, never the background
    mask_boxes: Tensor  # [B, M, 4] the teacher's boxes after regression
    mask_labels: Tensor  # [B, M]
    mask_confidence: Tensor  # [B, M]


# IoU above which a box matches, IoU below which none does, size of the sample, share of matches in it.
Numbers = tuple[float, float, int, float]


def matching_rules(
    first: Numbers, second: Numbers, weights: tuple[float, ...]
) -> tuple[RegionProposalNetwork, RoIHeads]:
    """torchvision's objects for how anchors (`first`) and proposals (`second`) are matched, sampled and coded.

    They hold no layers. `weights` are those of the four differences between a proposal and its box.
    """
    nothing: Any = None
    unlimited = {"training": 0, "testing": 0}
    rpn = RegionProposalNetwork(nothing, nothing, *first, unlimited, unlimited, 0.0)
    return rpn, RoIHeads(nothing, nothing, nothing, *second, weights, 0.0, 0.0, 0)


def expected_weights(positive: Tensor, negative: Tensor, sample: int, fraction: float) -> Tensor:
    """How likely each row is drawn [N], and how many are drawn in all, in one: weights that sum to 1.

    Args:
        positive: [N] bool.
        negative: [N] bool; rows that are neither are never drawn.
        sample: most rows that are drawn.
        fraction: most positives, as a part of `sample`.
    """
    positives, negatives = positive.sum(), negative.sum()
    p = positives.clamp(max=int(sample * fraction))
    n = torch.minimum(negatives, sample - p)
    weights = positive * (p / positives.clamp(min=1)) + negative * (n / negatives.clamp(min=1))
    return weights / (p + n).clamp(min=1)


def proposal_losses(
    rpn: Any, anchors: Tensor, objectness: Tensor, deltas: Tensor, target: Targets, beta: float = BETA
) -> dict[str, Tensor]:
    """Losses of the region proposal network: scalars `objectness` and `rpn_box`.

    Args:
        rpn: torchvision's.
        anchors: [A, 4] xyxy, pixels.
        objectness: [A] logits.
        deltas: [A, 4].
        target: boxes xyxy in pixels.
        beta: of the smooth L1 distance; 0 is plain L1.
    """
    (labels,), (matched,) = rpn.assign_targets_to_anchors([anchors], [{"boxes": target.boxes}])
    sampler = rpn.fg_bg_sampler
    weights = expected_weights(labels >= 1, labels == 0, sampler.batch_size_per_image, sampler.positive_fraction)
    binary = F.binary_cross_entropy_with_logits(objectness, labels.clamp(min=0), reduction="none")
    rows = (labels >= 1).nonzero().flatten()
    wanted = rpn.box_coder.encode([matched[rows]], [anchors[rows]])[0] if len(rows) else deltas[rows]
    distance = F.smooth_l1_loss(deltas[rows], wanted, beta=beta, reduction="none").sum(1)
    return {"objectness": (binary * weights).sum(), "rpn_box": (distance * weights[rows]).sum()}


def match_regions(roi_heads: Any, boxes: Tensor, target: Targets) -> tuple[Tensor, Tensor, Tensor]:
    """The label of each region (0: background) [R], which target it belongs to [R], and their IoU [R]."""
    if not len(target.labels):
        zeros = torch.zeros(len(boxes), dtype=torch.long, device=boxes.device)
        return zeros, zeros, boxes.new_zeros(len(boxes))
    overlap = box_iou(target.boxes, boxes)
    found = roi_heads.proposal_matcher(overlap)
    labels = target.labels[found.clamp(min=0)] * (found >= 0)
    return labels, found.clamp(min=0), overlap.amax(0)


def region_losses(
    roi_heads: Any, boxes: Tensor, logits: Tensor, deltas: Tensor, target: Targets, beta: float = BETA
) -> dict[str, Tensor]:
    """Losses of the box head: scalars `class` and `box`.

    Args:
        roi_heads: torchvision's.
        boxes: regions [R, 4] xyxy, pixels.
        logits: [R, outputs].
        deltas: [R, outputs, 4].
        target: boxes xyxy in pixels; labels are outputs of the head.
        beta: of the smooth L1 distance; 0 is plain L1.
    """
    labels, matched, _ = match_regions(roi_heads, boxes, target)
    sampler = roi_heads.fg_bg_sampler
    weights = expected_weights(labels > 0, labels == 0, sampler.batch_size_per_image, sampler.positive_fraction)
    cross = F.cross_entropy(logits, labels, reduction="none")
    rows = (labels > 0).nonzero().flatten()
    chosen = deltas[rows, labels[rows]]
    wanted = roi_heads.box_coder.encode([target.boxes[matched[rows]]], [boxes[rows]])[0] if len(rows) else chosen
    distance = F.smooth_l1_loss(chosen, wanted, beta=beta, reduction="none").sum(1)
    return {"class": (cross * weights).sum(), "box": (distance * weights[rows]).sum()}


def mask_regions(
    roi_heads: Any, boxes: Tensor, target: Targets, most: int = MASKS
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The best matching regions [M, 4], their labels [M] and targets [M]; M is at most `most`."""
    labels, matched, overlap = match_regions(roi_heads, boxes, target)
    rows = (labels > 0).nonzero().flatten()
    rows = rows[overlap[rows].argsort(descending=True, stable=True)[:most]]
    return boxes[rows], labels[rows], matched[rows]


def mask_loss(
    logits: Tensor, boxes: Tensor, labels: Tensor, matched: Tensor, masks: Tensor, aligned: bool = False
) -> Tensor:
    """Mean binary cross entropy of the masks of regions, a scalar; 0 without regions.

    Args:
        logits: [M, outputs, m, m].
        boxes: [M, 4] xyxy, pixels.
        labels: [M], outputs of the head.
        matched: [M], the target of each region.
        masks: of the targets, [n, H, W].
        aligned: as in `mask_targets`.
    """
    if not len(labels):
        return logits.sum() * 0
    wanted = mask_targets(boxes, matched, masks, logits.shape[-1], aligned)
    return F.binary_cross_entropy_with_logits(logits[torch.arange(len(labels)), labels], wanted)


def mask_targets(boxes: Tensor, matched: Tensor, masks: Tensor, side: int, aligned: bool) -> Tensor:
    """The masks of the targets inside regions [M, side, side] in [0, 1].

    Args:
        boxes: [M, 4] xyxy, pixels.
        matched: [M], the target of each region.
        masks: of the targets, [n, H, W].
        side: of the result, pixels.
        aligned: as mmdet cuts them out, pixels at their centres and 0 or 1; otherwise as torchvision does.
    """
    if not aligned:
        return project_masks_on_boxes(masks, boxes, matched, side)
    rows = torch.cat([matched[:, None].to(boxes), boxes], 1)
    return (roi_align(masks[:, None].to(boxes), rows, (side, side), 1.0, 0, True)[:, 0] >= 0.5).to(boxes)


def ellipses(boxes: Tensor, height: int, width: int) -> Tensor:
    """The ellipse inscribed in each box [n, 4] xyxy, as masks [n, height, width] bool: what stands for the shape of an
    object that nothing is known of but its box."""
    y = torch.arange(height, device=boxes.device).view(1, -1, 1) + 0.5
    x = torch.arange(width, device=boxes.device).view(1, 1, -1) + 0.5
    left, top, right, bottom = boxes.view(-1, 4, 1, 1).unbind(1)
    across = (2 * x - left - right) / (right - left).clamp(min=1e-6)
    down = (2 * y - top - bottom) / (bottom - top).clamp(min=1e-6)
    return across.square() + down.square() <= 1
