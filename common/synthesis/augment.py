"""Random changes to images before the loss; the labels follow."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from common.detection.types import Targets

ERASED_AREA = (0.02, 0.2)  # of the image
ERASED_RATIO = (0.3, 3.3)  # of the sides


@dataclass(frozen=True)
class Change:
    """One draw for a whole batch; the default changes nothing."""

    mirror: bool = False
    right: int = 0  # pixels; what leaves on one side comes back on the other
    down: int = 0
    holes: Tensor | None = None  # [B, 4] xyxy in pixels; empty ones erase nothing


def draw_change(count: int, size: int, flip: bool, jitter: int, erase: bool, generator: torch.Generator) -> Change:
    """Mirrors with probability 1/2, rolls by up to `jitter` pixels and erases a patch of every second image."""
    number = torch.rand(3, generator=generator).tolist()
    right, down = (min(int(n * (2 * jitter + 1)), 2 * jitter) - jitter for n in number[1:])
    holes = _holes(count, size, generator) if erase else None
    return Change(flip and number[0] < 0.5, right, down, holes)


def _holes(count: int, size: int, generator: torch.Generator) -> Tensor:
    """Patches of 2 to 20 % of the area with sides in ratio .3 to 3.3, one for every second image on average."""
    number = torch.rand(count, 5, generator=generator)
    area = ERASED_AREA[0] + (ERASED_AREA[1] - ERASED_AREA[0]) * number[:, 0]
    low, high = (math.log(r) for r in ERASED_RATIO)
    ratio = (low + (high - low) * number[:, 1]).exp()
    sides = torch.stack([(area * ratio).sqrt(), (area / ratio).sqrt()], 1).clamp(max=1) * (number[:, 2:3] < 0.5)
    corner = (1 - sides) * number[:, 3:]
    return (torch.cat([corner, corner + sides], 1) * size).round()


def change_images(images: Tensor, change: Change) -> Tensor:
    """Images [B, 3, H, W] after `change`, differentiable; erased patches are black."""
    if change.mirror:
        images = images.flip(3)
    if change.right or change.down:
        images = images.roll((change.down, change.right), (2, 3))
    if change.holes is not None:
        x1, y1, x2, y2 = change.holes.to(images.device, non_blocking=True)[:, :, None].unbind(1)  # [B, 1] each
        columns, rows = (torch.arange(n, device=images.device) for n in (images.shape[3], images.shape[2]))
        hole = ((rows >= y1) & (rows < y2))[:, :, None] & ((columns >= x1) & (columns < x2))[:, None, :]
        images = images.masked_fill(hole[:, None], 0.0)
    return images


def change_targets(targets: Sequence[Targets], change: Change, size: int) -> list[Targets]:
    """Labels of square images after `change`: boxes are cut at the border, and dropped when thinner than a pixel."""
    changed = []
    for target in targets:
        boxes = target.boxes
        if change.mirror:
            boxes = torch.stack([size - boxes[:, 2], boxes[:, 1], size - boxes[:, 0], boxes[:, 3]], 1)
        boxes = (boxes + boxes.new_tensor([change.right, change.down] * 2)).clamp(0, size)
        visible = (boxes[:, 2:] - boxes[:, :2]).amin(1) >= 1
        masks = None if target.masks is None else _change_masks(target.masks[visible], change)
        changed.append(Targets(boxes[visible], target.labels[visible], masks))
    return changed


def _change_masks(masks: Tensor, change: Change) -> Tensor:
    """Masks [n, H, W] bool after `change`; what leaves the image is gone, as it is from the boxes."""
    if change.mirror:
        masks = masks.flip(2)
    height, width = masks.shape[1:]
    top, left = max(change.down, 0), max(change.right, 0)
    moved = torch.zeros_like(masks)
    moved[:, top : height + change.down, left : width + change.right] = masks[
        :, top - change.down : height - top, left - change.right : width - left
    ]
    return moved
