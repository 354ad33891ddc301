"""Images while they are optimized: what the optimizer updates, how it becomes an image, and its augmentation.

A batch is flipped, shifted and erased at random before the loss; the labels follow.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from common.detection.types import Targets

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # mean and standard deviation, of torchvision and mmdet
LEVELS = 5  # of the pyramid: 1, 1/2, 1/4, 1/8, 1/16 of the resolution
SMOOTH_CONTRAST = 0.4  # amplitude of `smooth_noise`; full contrast ends in oversaturated colours

ERASED_AREA = (0.02, 0.2)  # fraction of the image area
ERASED_ASPECT = (0.3, 3.3)  # width over height


class Parameterization(Protocol):
    """A batch of images as the parameters of an optimizer."""

    parameters: list[Tensor]

    def render(self) -> Tensor:
        """The images [B, 3, S, S], in [0, 1] where they are clipped, differentiable with respect to `parameters`."""

    def project(self) -> None:
        """Called after each optimizer step: projects the parameters back onto the valid range, in place."""


class Pixels:
    """One parameter per pixel, clipped to [0, 1] after each step unless `clip` is False (arXiv 2507.16782)."""

    def __init__(self, start: Tensor, clip: bool = True) -> None:
        self.clip = clip
        self.parameters = [start.contiguous(memory_format=torch.channels_last).requires_grad_()]

    def render(self) -> Tensor:
        return self.parameters[0]

    @torch.no_grad()
    def project(self) -> None:
        if self.clip:
            self.parameters[0].clamp_(0, 1)


class Pyramid:
    """Laplacian-pyramid parameterization: `clamp(start + sum of upsampled levels, 0, 1)`, five resolutions.

    As in feature visualization (Olah et al. 2017, doi 10.23915/distill.00007). Coarse levels move whole regions in one
    step, so that tens of iterations are enough instead of thousands.
    """

    def __init__(self, start: Tensor) -> None:
        self.start = start.contiguous(memory_format=torch.channels_last)
        batch, _, height, width = start.shape
        sizes = [(max(height >> k, 1), max(width >> k, 1)) for k in range(LEVELS)]
        zeros = [start.new_zeros(batch, 3, *size).contiguous(memory_format=torch.channels_last) for size in sizes]
        self.parameters = [z.requires_grad_() for z in zeros]

    def render(self) -> Tensor:
        x = self.parameters[-1]
        for level in reversed(self.parameters[:-1]):
            x = level + resize(x, *level.shape[2:])
        return (self.start + x).clamp(0, 1)

    def project(self) -> None:
        pass


def resize(images: Tensor, height: int, width: int) -> Tensor:
    """Images [B, C, height, width], bilinear."""
    return F.interpolate(images, size=(height, width), mode="bilinear", align_corners=False)


def noise(count: int, size: int, generator: torch.Generator, kind: str = "uniform") -> Tensor:
    """Noise [count, 3, size, size] on the CPU: uniform in [0, 1], or normal, or with `imagenet` normal with the
    mean and standard deviation of each channel there."""
    if kind == "uniform":
        return torch.rand(count, 3, size, size, generator=generator)
    drawn = torch.randn(count, 3, size, size, generator=generator)
    if kind == "normal":
        return drawn
    mean, deviation = (torch.tensor(values).view(3, 1, 1) for values in IMAGENET)
    return mean + deviation * drawn


def smooth_noise(count: int, size: int, generator: torch.Generator) -> Tensor:
    """Low-contrast, low-frequency noise around grey: drawn at size/8 and upsampled to [count, 3, size, size]."""
    coarse = 0.5 + SMOOTH_CONTRAST * (noise(count, max(size // 8, 1), generator) - 0.5)
    return resize(coarse, size, size)


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
