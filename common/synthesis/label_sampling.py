"""Adaptive label sampling (arXiv 2507.16782): the detector's detections update the labels during synthesis."""

import torch
from torchvision.ops import box_iou, nms

from common.config.schema import LabelSamplingConfig
from common.detection.masks import paste
from common.detection.roi_losses import ellipses
from common.detection.types import Detections, Targets


def relabel(targets: Targets, found: Detections, size: int, config: LabelSamplingConfig) -> Targets:
    """The labels of one image after one update.

    With class-agnostic IoU, a detection above `config.confidence` becomes a new label if its IoU with every label is
    below `config.overlap` and its area is within the limits. A label without such a detection at `config.overlap` or
    more is removed; if none would stay, the one with the highest IoU stays, and a single label always stays. Labels
    that stay keep box and class. Without detections or labels nothing changes.

    Beyond the paper: new labels are NMS-filtered among themselves, so that one object does not get two classes, and
    boxes are clipped at all four borders.

    Args:
        targets: labels, boxes in pixels of the image.
        found: detections in the same image.
        size: side of the square image in pixels.
        config: thresholds.
    """
    confident = found.scores > config.confidence
    if not confident.any() or not len(targets.labels):
        return targets
    boxes, scores, labels = found.boxes[confident].clamp(0, size), found.scores[confident], found.labels[confident]
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
    updated = Targets(
        torch.cat([targets.boxes[kept], new_boxes]), torch.cat([targets.labels[kept], labels[added]]), masks
    )  # fmt: skip
    return update_masks(updated, found, size, config)


def update_masks(targets: Targets, found: Detections, size: int, config: LabelSamplingConfig) -> Targets:
    """The same labels with masks predicted by the detector.

    A label gets the mask of the detection above `config.confidence` with the highest IoU, if that is `config.overlap`
    or more, resized to the label's box. The others keep their mask, initially the ellipse inscribed in the box. Without
    masks among the detections nothing changes.
    """
    if found.masks is None or not len(targets.labels):
        return targets
    masks = ellipses(targets.boxes, size, size) if targets.masks is None else targets.masks
    confident = found.scores > config.confidence
    if confident.any():
        overlap, best = box_iou(found.boxes[confident], targets.boxes).max(0)
        predicted = paste(found.masks[confident][best], targets.boxes, size, size)
        seen = (overlap >= config.overlap) & predicted.flatten(1).any(1)
        masks = torch.where(seen[:, None, None], predicted, masks)
    return Targets(targets.boxes, targets.labels, masks)


def _supported(best: torch.Tensor, threshold: float) -> torch.Tensor:
    """Which labels stay [n] bool, from the best IoU of each with a detection."""
    if len(best) == 1:
        return torch.ones_like(best, dtype=torch.bool)
    kept = best >= threshold
    if not kept.any():
        kept[best.argmax()] = True
    return kept
