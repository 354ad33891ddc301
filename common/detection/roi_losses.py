"""Training losses of two-stage detectors per image and without random sampling, and the proposals a teacher hands over.

Faster R-CNN samples anchors and proposals at random and averages over the batch (arXiv 1506.01497, section 3.1.2; Mask
R-CNN, arXiv 1703.06870, section 3.1). Here every anchor and proposal is weighted by its probability of being sampled:
the expectation of that loss, deterministic and independent of the batch. Thresholds, sample sizes and box coders are
those of the model.
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

BETA = 1 / 9  # of the smooth L1 loss, as in torchvision
MASKS = 32  # positive proposals per image in the mask loss, highest IoU first


@dataclass(frozen=True)
class Proposals:
    """The teacher's proposals, on which the student's heads run too; padded with the whole image to R per image."""

    boxes: Tensor  # [B, R, 4] xyxy, pixels
    valid: Tensor  # [B, R] bool, False for padding
    labels: Tensor  # [B, R] int64, the teacher's best foreground class, an index into the head's outputs
    mask_boxes: Tensor  # [B, M, 4] the teacher's refined boxes, best score first
    mask_labels: Tensor  # [B, M]
    mask_confidence: Tensor  # [B, M] in [0, 1]


# Foreground IoU, background IoU, sample size per image, fraction of positives in it.
Sampling = tuple[float, float, int, float]


def matching_rules(
    rpn_sampling: Sampling, roi_sampling: Sampling, weights: tuple[float, ...]
) -> tuple[RegionProposalNetwork, RoIHeads]:
    """torchvision's matchers, samplers and box coders for the anchors and for the proposals, without any layers.

    `weights` are those of the RoI box coder (dx, dy, dw, dh).
    """
    nothing: Any = None
    unlimited = {"training": 0, "testing": 0}
    rpn = RegionProposalNetwork(nothing, nothing, *rpn_sampling, unlimited, unlimited, 0.0)
    return rpn, RoIHeads(nothing, nothing, nothing, *roi_sampling, weights, 0.0, 0.0, 0)


def expected_weights(positive: Tensor, negative: Tensor, sample: int, fraction: float) -> Tensor:
    """Weights [N] that sum to 1: the probability of each row to be sampled, over the expected sample size.

    Args:
        positive: [N] bool.
        negative: [N] bool; rows that are neither are ignored.
        sample: sample size.
        fraction: largest fraction of positives in the sample.
    """
    positives, negatives = positive.sum(), negative.sum()
    p = positives.clamp(max=int(sample * fraction))
    n = torch.minimum(negatives, sample - p)
    weights = positive * (p / positives.clamp(min=1)) + negative * (n / negatives.clamp(min=1))
    return weights / (p + n).clamp(min=1)


def rpn_losses(
    rpn: Any, anchors: Tensor, objectness: Tensor, deltas: Tensor, target: Targets, beta: float = BETA
) -> dict[str, Tensor]:
    """RPN losses of one image: scalars `objectness` and `rpn_box`.

    Args:
        rpn: torchvision's RegionProposalNetwork.
        anchors: [A, 4] xyxy, pixels.
        objectness: [A] logits.
        deltas: encoded boxes [A, 4].
        target: boxes xyxy in pixels.
        beta: of the smooth L1 loss; 0 is plain L1.
    """
    (labels,), (matched,) = rpn.assign_targets_to_anchors([anchors], [{"boxes": target.boxes}])
    sampler = rpn.fg_bg_sampler
    weights = expected_weights(labels >= 1, labels == 0, sampler.batch_size_per_image, sampler.positive_fraction)
    binary = F.binary_cross_entropy_with_logits(objectness, labels.clamp(min=0), reduction="none")
    rows = (labels >= 1).nonzero().flatten()
    wanted = rpn.box_coder.encode([matched[rows]], [anchors[rows]])[0] if len(rows) else deltas[rows]
    distance = F.smooth_l1_loss(deltas[rows], wanted, beta=beta, reduction="none").sum(1)
    return {"objectness": (binary * weights).sum(), "rpn_box": (distance * weights[rows]).sum()}


def match_proposals(roi_heads: Any, boxes: Tensor, target: Targets) -> tuple[Tensor, Tensor, Tensor]:
    """For each proposal [R, 4] its label (0: background), matched target index and best IoU; [R] each."""
    if not len(target.labels):
        zeros = torch.zeros(len(boxes), dtype=torch.long, device=boxes.device)
        return zeros, zeros, boxes.new_zeros(len(boxes))
    overlap = box_iou(target.boxes, boxes)
    found = roi_heads.proposal_matcher(overlap)
    labels = target.labels[found.clamp(min=0)] * (found >= 0)
    return labels, found.clamp(min=0), overlap.amax(0)


def box_head_losses(
    roi_heads: Any, boxes: Tensor, logits: Tensor, deltas: Tensor, target: Targets, beta: float = BETA
) -> dict[str, Tensor]:
    """RoI box head losses of one image: scalars `class` and `box`.

    Args:
        roi_heads: torchvision's RoIHeads.
        boxes: proposals [R, 4] xyxy, pixels.
        logits: [R, outputs].
        deltas: [R, outputs, 4].
        target: boxes xyxy in pixels; labels index the outputs of the head.
        beta: of the smooth L1 loss; 0 is plain L1.
    """
    labels, matched, _ = match_proposals(roi_heads, boxes, target)
    sampler = roi_heads.fg_bg_sampler
    weights = expected_weights(labels > 0, labels == 0, sampler.batch_size_per_image, sampler.positive_fraction)
    cross = F.cross_entropy(logits, labels, reduction="none")
    rows = (labels > 0).nonzero().flatten()
    chosen = deltas[rows, labels[rows]]
    wanted = roi_heads.box_coder.encode([target.boxes[matched[rows]]], [boxes[rows]])[0] if len(rows) else chosen
    distance = F.smooth_l1_loss(chosen, wanted, beta=beta, reduction="none").sum(1)
    return {"class": (cross * weights).sum(), "box": (distance * weights[rows]).sum()}


def mask_proposals(
    roi_heads: Any, boxes: Tensor, target: Targets, most: int = MASKS
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The positive proposals [M, 4] with the highest IoU, their labels [M] and target indices [M]; M <= `most`."""
    labels, matched, overlap = match_proposals(roi_heads, boxes, target)
    rows = (labels > 0).nonzero().flatten()
    rows = rows[overlap[rows].argsort(descending=True, stable=True)[:most]]
    return boxes[rows], labels[rows], matched[rows]


def mask_loss(
    logits: Tensor, boxes: Tensor, labels: Tensor, matched: Tensor, masks: Tensor, aligned: bool = False
) -> Tensor:
    """Mask loss: mean binary cross entropy over the pixels of all proposals, a scalar; 0 without proposals.

    Args:
        logits: [M, outputs, m, m].
        boxes: [M, 4] xyxy, pixels.
        labels: [M], indices into the outputs.
        matched: [M], target index of each proposal.
        masks: of the targets, [n, H, W].
        aligned: as in `mask_targets`.
    """
    if not len(labels):
        return logits.sum() * 0
    wanted = mask_targets(boxes, matched, masks, logits.shape[-1], aligned)
    return F.binary_cross_entropy_with_logits(logits[torch.arange(len(labels)), labels], wanted)


def mask_targets(boxes: Tensor, matched: Tensor, masks: Tensor, side: int, aligned: bool) -> Tensor:
    """Target masks cropped to the proposals and resized, [M, side, side] in [0, 1].

    Args:
        boxes: [M, 4] xyxy, pixels.
        matched: [M], target index of each proposal.
        masks: of the targets, [n, H, W].
        side: resolution of the mask head.
        aligned: RoIAlign with `aligned=True`, then thresholded at 0.5, as in mmdet; otherwise as in torchvision.
    """
    if not aligned:
        return project_masks_on_boxes(masks, boxes, matched, side)
    rows = torch.cat([matched[:, None].to(boxes), boxes], 1)
    return (roi_align(masks[:, None].to(boxes), rows, (side, side), 1.0, 0, True)[:, 0] >= 0.5).to(boxes)


def ellipses(boxes: Tensor, height: int, width: int) -> Tensor:
    """The ellipse inscribed in each box [n, 4] xyxy, as masks [n, height, width] bool: the initial mask of an object of
    which only the box is known."""
    y = torch.arange(height, device=boxes.device).view(1, -1, 1) + 0.5
    x = torch.arange(width, device=boxes.device).view(1, 1, -1) + 0.5
    left, top, right, bottom = boxes.view(-1, 4, 1, 1).unbind(1)
    across = (2 * x - left - right) / (right - left).clamp(min=1e-6)
    down = (2 * y - top - bottom) / (bottom - top).clamp(min=1e-6)
    return across.square() + down.square() <= 1
