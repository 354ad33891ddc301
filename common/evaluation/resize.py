"""Images as an experiment's evaluation shows them to a detector: letterboxed, resized or stretched."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from common.config.schema import EvaluationConfig
from common.evaluation.letterbox import Batch, Placement, make_batches, place


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
