"""Random flip, shift and erasing of the images before the loss; the labels follow."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from common.detection.types import Targets

ERASED_AREA = (0.02, 0.2)  # fraction of the image area
ERASED_ASPECT = (0.3, 3.3)  # width over height


@dataclass(frozen=True)
class Augmentation:
    """One augmentation for a whole batch; the default is the identity."""

    flip: bool = False  # horizontal
    shift_x: int = 0  # pixels, circular: what leaves on one side comes back on the other
    shift_y: int = 0
    erased: Tensor | None = None  # [B, 4] xyxy in pixels; an empty box erases nothing


def sample_augmentation(
    count: int, size: int, flip: bool, jitter: int, erase: bool, generator: torch.Generator
) -> Augmentation:
    """Flips with probability 1/2, shifts by up to `jitter` pixels per axis and erases a box in every second image."""
    number = torch.rand(3, generator=generator).tolist()
    shift_x, shift_y = (min(int(n * (2 * jitter + 1)), 2 * jitter) - jitter for n in number[1:])
    erased = _random_boxes(count, size, generator) if erase else None
    return Augmentation(flip and number[0] < 0.5, shift_x, shift_y, erased)


def _random_boxes(count: int, size: int, generator: torch.Generator) -> Tensor:
    """Random erasing (arXiv 1708.04896): boxes [count, 4] xyxy; half of them, on average, are empty."""
    number = torch.rand(count, 5, generator=generator)
    area = ERASED_AREA[0] + (ERASED_AREA[1] - ERASED_AREA[0]) * number[:, 0]
    low, high = (math.log(r) for r in ERASED_ASPECT)
    aspect = (low + (high - low) * number[:, 1]).exp()
    sides = torch.stack([(area * aspect).sqrt(), (area / aspect).sqrt()], 1).clamp(max=1) * (number[:, 2:3] < 0.5)
    corner = (1 - sides) * number[:, 3:]
    return (torch.cat([corner, corner + sides], 1) * size).round()


def augment_images(images: Tensor, augmentation: Augmentation) -> Tensor:
    """Augmented images [B, 3, H, W], differentiable; erased boxes are black."""
    if augmentation.flip:
        images = images.flip(3)
    if augmentation.shift_x or augmentation.shift_y:
        images = images.roll((augmentation.shift_y, augmentation.shift_x), (2, 3))
    if augmentation.erased is not None:
        erased = augmentation.erased.to(images.device, non_blocking=True)
        x1, y1, x2, y2 = erased[:, :, None].unbind(1)  # [B, 1] each
        columns, rows = (torch.arange(n, device=images.device) for n in (images.shape[3], images.shape[2]))
        inside = ((rows >= y1) & (rows < y2))[:, :, None] & ((columns >= x1) & (columns < x2))[:, None, :]
        images = images.masked_fill(inside[:, None], 0.0)
    return images


def augment_targets(targets: Sequence[Targets], augmentation: Augmentation, size: int) -> list[Targets]:
    """Labels of square images of `size` pixels after flip and shift.

    Boxes are clipped to the image, and dropped if thinner than a pixel. Nothing wraps around.
    """
    augmented = []
    for target in targets:
        boxes = target.boxes
        if augmentation.flip:
            boxes = torch.stack([size - boxes[:, 2], boxes[:, 1], size - boxes[:, 0], boxes[:, 3]], 1)
        boxes = (boxes + boxes.new_tensor([augmentation.shift_x, augmentation.shift_y] * 2)).clamp(0, size)
        visible = (boxes[:, 2:] - boxes[:, :2]).amin(1) >= 1
        masks = None if target.masks is None else _augment_masks(target.masks[visible], augmentation)
        augmented.append(Targets(boxes[visible], target.labels[visible], masks))
    return augmented


def _augment_masks(masks: Tensor, augmentation: Augmentation) -> Tensor:
    """Masks [n, H, W] bool after flip and shift; what leaves the image is lost, as for boxes."""
    if augmentation.flip:
        masks = masks.flip(2)
    height, width = masks.shape[1:]
    shift_x, shift_y = augmentation.shift_x, augmentation.shift_y
    top, left = max(shift_y, 0), max(shift_x, 0)
    shifted = torch.zeros_like(masks)
    shifted[:, top : height + shift_y, left : width + shift_x] = masks[
        :, top - shift_y : height - top, left - shift_x : width - left
    ]
    return shifted
