"""Image files."""

from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor

from common.runtime.errors import UserError

GREY = 114  # of 255: around letterboxed images, as YOLO detectors are trained
DEEPEST_BORDER = 0.2  # of a side; a photograph of 16:9 in a square leaves .22


def read_image(path: Path) -> Tensor:
    """An image file as uint8 [3, H, W], RGB.

    Raises:
        UserError: missing, or not an image.
    """
    try:
        pixels = cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_COLOR)
    except (OSError, cv2.error):
        pixels = None
    if pixels is None:
        raise UserError(
            f"{path}: not a readable image; replace or remove it (for synthesized images: synthesize again)"
        )
    return torch.from_numpy(pixels[..., ::-1].transpose(2, 0, 1).copy())


def with_letterbox_padding(images: Tensor, generator: torch.Generator) -> Tensor:
    """Greys bars of up to a fifth of the sides of square images [B, 3, S, S] in [0, 1], as letterboxing leaves them.

    Two thirds of the images get bars above and below, the others left and right; a copy is returned.
    """
    changed = images.clone()
    size = images.shape[-1]
    for image, (depth, side) in zip(changed, torch.rand(len(images), 2, generator=generator).tolist(), strict=True):
        bar = round(depth * size * DEEPEST_BORDER)
        across = image if side < 2 / 3 else image.transpose(1, 2)
        across[:, :bar] = GREY / 255
        across[:, size - bar :] = GREY / 255
    return changed
