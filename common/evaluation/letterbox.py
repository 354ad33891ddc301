"""Images as Ultralytics' validator shows them to a detector, and boxes on the way back."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import cv2
import numpy as np
import torch
from torch import Tensor

from common.detection.masks import cut
from common.detection.types import Detections
from common.runtime.images import GREY

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
