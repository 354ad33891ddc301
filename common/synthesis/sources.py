"""Images that are not optimised: noise and real files, the baselines."""

from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor

from common.runtime.errors import UserError
from common.runtime.images import GREY, SUFFIXES
from common.synthesis.labels import letterbox


def list_images(folder: Path) -> list[Path]:
    """The image files directly in a folder, sorted by name.

    Raises:
        UserError: no such folder, or no image in it.
    """
    if not folder.is_dir():
        raise UserError(f"synthesis.real_images: {folder} is not a folder; give one with image files")
    files = sorted(f for f in folder.iterdir() if f.suffix.lower() in SUFFIXES)
    if not files:
        raise UserError(f"synthesis.real_images: no image in {folder}; allowed are {', '.join(sorted(SUFFIXES))}")
    return files


def letterboxed(path: Path, content: bytes, size: int) -> Tensor:
    """The content of an image file fitted into a grey square, uint8 [3, size, size], RGB.

    Several threads may do so at once, unlike `read_image`, which looks at what libjpeg says.

    Raises:
        UserError: not a readable image.
    """
    image = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR) if content else None
    if image is None:
        raise UserError(f"{path}: not a readable image; replace or remove it")
    height, width = image.shape[:2]
    scale, left, top = letterbox(width, height, size)
    shape = max(round(width * scale), 1), max(round(height * scale), 1)
    pixels = cv2.resize(image, shape, interpolation=cv2.INTER_LINEAR)[..., ::-1]
    padded = torch.full((3, size, size), GREY, dtype=torch.uint8)
    x, y = round(left - 0.1), round(top - 0.1)
    padded[:, y : y + shape[1], x : x + shape[0]] = torch.from_numpy(pixels.transpose(2, 0, 1).copy())
    return padded
