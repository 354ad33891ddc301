"""Image files."""

from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor

from common.errors import UserError

GREY = 114  # of 255: around letterboxed images, as YOLO detectors are trained


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
