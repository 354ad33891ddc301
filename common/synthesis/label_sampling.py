"""Adaptive label sampling: the detector edits the labels of the images that are being made from them."""

import torch
from torchvision.ops import box_iou, nms

from common.config.schema import LabelSamplingConfig
from common.detection.masks import paste
from common.detection.roi_losses import ellipses
from common.detection.types import Detections, Targets


def relabel(targets: Targets, found: Detections, size: int, config: LabelSamplingConfig) -> Targets:
    """The labels of one image after one edit (arXiv 2507.16782, adaptive label sampling).

    With IoU taken between any two boxes, whatever their classes, a detection above `config.confidence` becomes a new
    label when it overlaps no label by `config.overlap` or more and its area lies strictly between the two limits. A
    label goes when no such detection overlaps it, except that an image keeps its only label, and the best supported
    one where none is supported. Without detections or labels nothing changes. Kept labels keep their box and class.

    Beyond the published rule, new labels must not overlap each other either (the best score wins), so that one object
    does not get two classes, and boxes are cut at all four borders.

    Args:
        targets: labels, boxes in pixels of the image.
        found: detections in the same image.
        size: side of the square image in pixels.
        config: thresholds.
    """
    sure = found.scores > config.confidence
    if not sure.any() or not len(targets.labels):
        return targets
    boxes, scores, labels = found.boxes[sure].clamp(0, size), found.scores[sure], found.labels[sure]
    overlap = box_iou(boxes, targets.boxes)  # [detections, labels]
    area = (boxes[:, 2:] - boxes[:, :2]).prod(1) / size**2
    new = (overlap.amax(1) < config.overlap) & (area > config.min_area) & (area < config.max_area)
    added = new.nonzero().flatten()
    added = added[nms(boxes[added], scores[added], config.overlap)]
    kept = _supported(overlap.amax(0), config.overlap)
    new_boxes = boxes[added].to(targets.boxes.dtype)
    masks = None
    if targets.masks is not None:
        masks = torch.cat([targets.masks[kept], ellipses(new_boxes, size, size)])
    edited = Targets(
        torch.cat([targets.boxes[kept], new_boxes]), torch.cat([targets.labels[kept], labels[added]]), masks
    )  # fmt: skip
    return take_masks(edited, found, size, config)


def take_masks(targets: Targets, found: Detections, size: int, config: LabelSamplingConfig) -> Targets:
    """The same labels with the detector's own masks.

    A label takes the mask of the detection above `config.confidence` that overlaps it best, if by `config.overlap` or
    more, stretched over the label's box. The others keep the mask they have, at first the ellipse in their box. Without
    masks among the detections nothing changes.
    """
    if found.masks is None or not len(targets.labels):
        return targets
    masks = ellipses(targets.boxes, size, size) if targets.masks is None else targets.masks
    sure = found.scores > config.confidence
    if sure.any():
        overlap, best = box_iou(found.boxes[sure], targets.boxes).max(0)
        own = paste(found.masks[sure][best], targets.boxes, size, size)
        seen = (overlap >= config.overlap) & own.flatten(1).any(1)
        masks = torch.where(seen[:, None, None], own, masks)
    return Targets(targets.boxes, targets.labels, masks)


def _supported(best: torch.Tensor, threshold: float) -> torch.Tensor:
    """Which labels stay [n], from each one's best IoU with a detection."""
    if len(best) == 1:
        return torch.ones_like(best, dtype=torch.bool)
    kept = best >= threshold
    if not kept.any():
        kept[best.argmax()] = True
    return kept
