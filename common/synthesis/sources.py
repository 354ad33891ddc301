"""Images that are not optimised: noise and real files, the baselines."""

from pathlib import Path

import cv2
import torch
from torch import Tensor

from common.runtime.errors import UserError
from common.runtime.images import GREY, SUFFIXES, read_image
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


def letterboxed(path: Path, size: int) -> Tensor:
    """An image file fitted into a grey square of `size` pixels, float [3, size, size] in [0, 1].

    Raises:
        UserError: not a readable image.
    """
    image = read_image(path)
    height, width = image.shape[1:]
    scale, left, top = letterbox(width, height, size)
    shape = max(round(width * scale), 1), max(round(height * scale), 1)
    pixels = cv2.resize(image.permute(1, 2, 0).contiguous().numpy(), shape, interpolation=cv2.INTER_LINEAR)
    padded = torch.full((3, size, size), GREY, dtype=torch.uint8)
    x, y = round(left - 0.1), round(top - 0.1)
    padded[:, y : y + shape[1], x : x + shape[0]] = torch.from_numpy(pixels).permute(2, 0, 1)
    return padded.float() / 255
