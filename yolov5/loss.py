"""The training loss of YOLOv5 for each image by itself. Formulas: utils/loss.py of YOLOv5 (v6.0 to v7.0)."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from ultralytics.utils.metrics import bbox_iou

from common.detection.types import Targets
from yolov5.model import AnchorHead

BOX_GAIN, CLASS_GAIN, OBJECT_GAIN = 0.05, 0.5, 1.0  # of three levels, 80 classes and 640 pixels
BALANCE = {3: (4.0, 1.0, 0.4)}  # of objectness, finest level first
BALANCE_OF_MORE = (4.0, 1.0, 0.25, 0.06, 0.02)
ANCHOR_RATIO = 4.0  # a box belongs to the anchors that it is at most so many times larger or smaller than
NEIGHBOURS = ((0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (-1.0, 0.0), (0.0, -1.0))  # its own cell; left, up, right, down of it


def losses(
    head: AnchorHead, maps: Sequence[Tensor], strides: Sequence[int], targets: Sequence[Targets]
) -> Mapping[str, Tensor]:
    """Losses `box`, `objectness`, `class`, [B] each, gains included: YOLOv5's ComputeLoss on a batch of that one image.

    Shapes are fixed and nothing is selected, so a GPU never waits: what does not match weighs nothing.

    Args:
        head: the anchors.
        maps: raw map of each level [B, A * (5 + nc), h, w].
        strides: pixels to a cell, of each level.
        targets: of each image; boxes xyxy, pixels.
    """
    levels = [level.float() for level in head.levels(maps)]
    balance = BALANCE.get(len(levels), BALANCE_OF_MORE)
    image, labels, boxes = _flat(targets, levels[0].device)
    total = {name: levels[0].new_zeros(len(targets)) for name in ("box", "objectness", "class")}
    for index, raw in enumerate(levels):
        anchors = head.anchors[index].float()
        wanted = raw.new_zeros(raw.shape[:-1])
        if len(labels):
            matched, a, gj, gi, box = _match(boxes / strides[index], anchors, raw.shape[2:4])
            count = raw.new_zeros(len(targets)).index_add(0, image.expand_as(matched).flatten(), matched.flatten())
            rows = raw[image.expand_as(a), a, gj, gi]  # [5, A, T, 5 + nc]
            y = rows[..., :4].sigmoid()
            predicted = torch.cat([y[..., :2] * 2 - 0.5, (y[..., 2:] * 2) ** 2 * anchors[:, None]], -1)
            iou = bbox_iou(predicted.flatten(0, 2), box.flatten(0, 2), xywh=True, CIoU=True).view(matched.shape)
            total["box"] = total["box"] + _mean(matched * (1 - iou), image, count)
            if head.nc > 1:
                hot = F.one_hot(labels, head.nc).to(raw).expand_as(rows[..., 5:])
                distance = F.binary_cross_entropy_with_logits(rows[..., 5:], hot, reduction="none").mean(-1)
                total["class"] = total["class"] + _mean(matched * distance, image, count)
            wanted = _objectness(wanted, iou.detach().clamp(0), matched, (image.expand_as(a), a, gj, gi))
        distance = F.binary_cross_entropy_with_logits(raw[..., 4], wanted, reduction="none")
        total["objectness"] = total["objectness"] + balance[index] * distance.mean((1, 2, 3))
    share = 3 / len(levels)
    pixels = maps[0].shape[2] * maps[0].shape[3] * strides[0] ** 2
    return {
        "box": BOX_GAIN * share * total["box"],
        "objectness": OBJECT_GAIN * share * pixels / 640**2 * total["objectness"],
        "class": CLASS_GAIN * share * head.nc / 80 * total["class"],
    }


def _flat(targets: Sequence[Targets], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """All boxes of the batch: image [T], label [T], box [T, 4] as centre, width and height in pixels."""
    image = torch.tensor([i for i, t in enumerate(targets) for _ in range(len(t.labels))], dtype=torch.int64)
    labels = torch.cat([t.labels.to(device) for t in targets])
    corners = torch.cat([t.boxes.to(device).float() for t in targets])
    sides = (corners[:, 2:] - corners[:, :2]).clamp(min=1e-3)  # a box without extent has no shape, and matches nothing
    return image.to(device, non_blocking=True), labels, torch.cat([(corners[:, :2] + corners[:, 2:]) / 2, sides], 1)


def _match(boxes: Tensor, anchors: Tensor, size: torch.Size) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Which cell (own or neighbour, 5) and anchor (A) answers for which box (T), in the units of one level.

    Returns:
        matched [5, A, T], 1 or 0; anchor, row and column [5, A, T]; box relative to its cell [5, A, T, 4] (xywh).
    """
    ratio = boxes[None, :, 2:] / anchors[:, None]  # [A, T, 2]
    fits = torch.maximum(ratio, 1 / ratio).amax(2) < ANCHOR_RATIO  # [A, T]
    constants = torch.tensor([*NEIGHBOURS, (size[1], size[0])]).to(boxes, non_blocking=True)
    neighbours, limit = constants[:-1], constants[-1]
    centre = boxes[:, :2]
    near = (centre % 1 < 0.5) & (centre > 1)  # the left, the upper neighbour is closer than the other
    far = ((limit - centre) % 1 < 0.5) & (limit - centre > 1)
    side = torch.stack([torch.ones_like(near[:, 0]), near[:, 0], near[:, 1], far[:, 0], far[:, 1]])  # [5, T]
    cell = (centre[None] - 0.5 * neighbours[:, None]).long()  # [5, T, 2]
    cell = torch.minimum(cell.clamp(min=0), limit.long() - 1)
    matched = (fits[None] & side[:, None]).float()
    box = torch.cat([centre[None] - cell, boxes[None, :, 2:].expand(5, -1, -1)], 2)
    anchor = torch.arange(len(anchors), device=boxes.device)[None, :, None].expand_as(matched)
    gi, gj = (cell[..., k][:, None].expand_as(matched) for k in (0, 1))
    return matched, anchor, gj, gi, box[:, None].expand(-1, len(anchors), -1, -1)


def _mean(values: Tensor, image: Tensor, count: Tensor) -> Tensor:
    """Means over the matches of each image, [B]; 0 where it has none."""
    total = count.new_zeros(count.shape).index_add(0, image.expand_as(values).flatten(), values.flatten())
    return total / count.clamp(min=1)


def _objectness(wanted: Tensor, iou: Tensor, matched: Tensor, place: tuple[Tensor, ...]) -> Tensor:
    """The wanted objectness [B, A, h, w]: the overlap of the box that is matched; of several, of the last one."""
    _, anchors, height, width = wanted.shape
    image, a, gj, gi = place
    flat = (((image * anchors + a) * height + gj) * width + gi).flatten()
    order = torch.arange(1, len(flat) + 1, device=flat.device) * matched.flatten().long()
    last = torch.zeros(wanted.numel(), dtype=torch.long, device=flat.device).scatter_reduce(0, flat, order, "amax")
    padded = torch.cat([iou.new_zeros(1), iou.flatten()])
    return padded[last].view_as(wanted)
