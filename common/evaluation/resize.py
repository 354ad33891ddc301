"""Images as Ultralytics' validator shows them to a detector, and boxes on the way back."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from common.config.schema import EvaluationConfig
from common.detection.masks import cut
from common.detection.types import Detections
from common.runtime.image_files import GREY

PADDING = 0.5  # strides around a rectangular batch


@dataclass(frozen=True)
class Batch:
    """Which images are detected on together, and the size they are padded to."""

    indices: tuple[int, ...]
    height: int
    width: int


@dataclass(frozen=True)
class Placement:
    """Where an image went: `x_new = x * scale_x + left`."""

    scale_x: float
    scale_y: float
    left: int
    top: int
    width: int  # of the original, pixels
    height: int

    def back(self, boxes: Tensor) -> Tensor:
        """Boxes [n, 4] xyxy in pixels of the batch -> pixels of the original, cut at its border."""
        limit = boxes.new_tensor([self.width, self.height] * 2)
        return torch.minimum(self._uncut(boxes).clamp(min=0), limit)

    def detections(self, found: Detections) -> Detections:
        """Detections in the batch -> in the original: boxes by `back`, each mask over what is left of its box."""
        boxes, masks = self.back(found.boxes), found.masks
        if masks is not None:
            masks = cut(masks, self._uncut(found.boxes), boxes)
        return Detections(boxes, found.scores, found.labels, masks)

    def _uncut(self, boxes: Tensor) -> Tensor:
        shift = boxes.new_tensor([self.left, self.top] * 2)
        return (boxes - shift) / boxes.new_tensor([self.scale_x, self.scale_y] * 2)


def make_batches(
    sizes: Sequence[tuple[int, int]], image_size: int, stride: int, batch_size: int, rectangular: bool
) -> list[Batch]:
    """Batches of images of the given (height, width).

    Rectangular ones take images in the order of their aspect ratio and are padded to what the widest or the tallest of
    them needs; the others are squares in the given order.
    """
    if not rectangular:
        side = math.ceil(image_size / stride) * stride
        return [Batch(tuple(part), side, side) for part in _split(range(len(sizes)), batch_size)]
    ratios = np.array([height / width for height, width in sizes])
    batches = []
    for part in _split(ratios.argsort().tolist(), batch_size):
        smallest, largest = ratios[part].min(), ratios[part].max()
        shape = (largest, 1.0) if largest < 1 else (1.0, 1 / smallest) if smallest > 1 else (1.0, 1.0)
        height, width = (math.ceil(side * image_size / stride + PADDING) * stride for side in shape)
        batches.append(Batch(tuple(part), height, width))
    return batches


def _split(indices: Sequence[int], size: int) -> list[list[int]]:
    return [list(indices[i : i + size]) for i in range(0, len(indices), size)]


def place(
    image: Tensor, image_size: int, height: int, width: int, interpolation: Literal["linear", "area"] = "linear"
) -> tuple[Tensor, Placement]:
    """Scales the longer side of a uint8 image [3, h, w] to `image_size` and centres it on a grey `height` x `width`.

    Ultralytics interpolates linearly; YOLOv5's val.py averages over areas where it shrinks (`interpolation`).

    Returns:
        uint8 [3, height, width], and where the image is in it.
    """
    original_height, original_width = image.shape[1:]
    ratio = image_size / max(original_height, original_width)
    new_width = min(math.ceil(original_width * ratio), image_size)
    new_height = min(math.ceil(original_height * ratio), image_size)
    pixels = image.permute(1, 2, 0).numpy()
    if ratio != 1:
        how = cv2.INTER_AREA if interpolation == "area" and ratio < 1 else cv2.INTER_LINEAR
        pixels = cv2.resize(np.ascontiguousarray(pixels), (new_width, new_height), interpolation=how)
    left, top = (round(gap / 2 - 0.1) for gap in (width - new_width, height - new_height))
    canvas = torch.full((3, height, width), GREY, dtype=torch.uint8)
    canvas[:, top : top + new_height, left : left + new_width] = torch.from_numpy(pixels).permute(2, 0, 1)
    scales = (new_width / original_width, new_height / original_height)
    return canvas, Placement(*scales, left, top, original_width, original_height)


def scaled_size(height: int, width: int, shorter: int, longest: int) -> tuple[int, int]:
    """Height and width so that the shorter side is `shorter` pixels, unless the other one were above `longest`."""
    scale = min(shorter / min(height, width), longest / max(height, width))
    return max(int(height * scale), 1), max(int(width * scale), 1)


def equal_batches(sizes: Sequence[tuple[int, int]], shorter: int, longest: int, batch_size: int) -> list[Batch]:
    """Batches of images of the given (height, width) that have the same size once they are resized.

    Padding to a multiple of the stride is left to the detector, which knows the value of it.
    """
    groups: dict[tuple[int, int], list[int]] = {}
    for index, (height, width) in enumerate(sizes):
        groups.setdefault(scaled_size(height, width, shorter, longest), []).append(index)
    return [
        Batch(tuple(indices[i : i + batch_size]), *size)
        for size, indices in groups.items()
        for i in range(0, len(indices), batch_size)
    ]


def scale_to(image: Tensor, height: int, width: int) -> tuple[Tensor, Placement]:
    """A uint8 image [3, h, w] as float [3, height, width] in [0, 1], bilinear without antialiasing as torchvision's
    transform, and where the image is in it."""
    original_height, original_width = image.shape[1:]
    pixels = image[None].float() / 255
    if (height, width) != (original_height, original_width):
        pixels = F.interpolate(pixels, (height, width), mode="bilinear", align_corners=False)
    scales = (width / original_width, height / original_height)
    return pixels[0], Placement(*scales, 0, 0, original_width, original_height)


def plan_batches(sizes: Sequence[tuple[int, int]], config: EvaluationConfig, stride: int) -> list[Batch]:
    """Which images of the given (height, width) are detected on together, and at which size."""
    if config.resize == "stretch":
        side, size = config.image_size, config.batch_size
        return [Batch(tuple(range(len(sizes)))[i : i + size], side, side) for i in range(0, len(sizes), size)]
    if config.resize == "shorter_side":
        return equal_batches(sizes, config.image_size, config.longest_side, config.batch_size)
    return make_batches(sizes, config.image_size, stride, config.batch_size, config.rectangular)


def view(image: Tensor, config: EvaluationConfig, batch: Batch) -> tuple[Tensor, Placement]:
    """A uint8 image [3, h, w] as its batch has it, [3, H, W] (see `as_floats`), and where it is in it."""
    if config.resize != "letterbox":
        return scale_to(image, batch.height, batch.width)
    return place(image, config.image_size, batch.height, batch.width, config.interpolation)


def as_floats(images: Tensor) -> Tensor:
    """Images from `view` in [0, 1]; letterboxed ones are uint8 until here, so that a quarter of the bytes move."""
    return images.float() / 255 if images.dtype == torch.uint8 else images
