"""Detections drawn into an image, and the colours of classes."""

import colorsys
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from common.types import Detections

MASK_SHARE = 0.45  # of the colour where a mask is
TEXT = 40  # the longer side is so many lines of text high, but text is never smaller than
SMALLEST_TEXT = 11  # pixels


def hue(label: int) -> int:
    """Degrees; steps of the golden angle, so that neighbouring classes differ most."""
    return round(label * 137.508) % 360


def draw(image: Tensor, found: Detections, class_names: tuple[str, ...]) -> Tensor:
    """Boxes, masks, names and scores over an image; the best score is drawn last, so that it is on top.

    Args:
        image: uint8 [3, H, W], RGB.
        found: in the image's own pixels, masks [n, H, W] if there are any.
        class_names: by label.

    Returns:
        uint8 [3, H, W].
    """
    height, width = image.shape[1:]
    order = range(len(found.boxes) - 1, -1, -1)
    colours = {i: _colour(int(found.labels[i])) for i in order}
    tinted = image if found.masks is None else tint(image, found.masks, found.labels.tolist())
    picture = Image.fromarray(tinted.permute(1, 2, 0).numpy().copy())
    pen = ImageDraw.Draw(picture)
    size = max(round(max(width, height) / TEXT), SMALLEST_TEXT)
    font = ImageFont.load_default(size)
    line = max(round(size / 6), 1)
    for i in order:
        x1, y1, x2, y2 = found.boxes[i].tolist()
        pen.rectangle((x1, y1, max(x2, x1), max(y2, y1)), outline=colours[i], width=line)
        text = f"{class_names[int(found.labels[i])]} {float(found.scores[i]):.2f}"
        _, _, text_width, text_height = font.getbbox(text)
        left = max(min(x1, width - text_width - 2 * line), 0)
        top = y1 - text_height - 2 * line if y1 > text_height + 2 * line else y1
        pen.rectangle((left, top, left + text_width + 2 * line, top + text_height + 2 * line), fill=colours[i])
        pen.text((left + line, top + line), text, fill="black", font=font)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()


def tint(image: Tensor, masks: Tensor, labels: Sequence[int]) -> Tensor:
    """An image [3, H, W] uint8 with the colour of each label [n] where its mask [n, H, W] is; the first is on top."""
    pixels = image.permute(1, 2, 0).numpy().copy()
    for mask, label in reversed(list(zip(masks, labels, strict=True))):
        inside = mask.cpu().numpy().astype(bool)
        pixels[inside] = pixels[inside] * (1 - MASK_SHARE) + np.array(_colour(label)) * MASK_SHARE
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def _colour(label: int) -> tuple[int, int, int]:
    red, green, blue = colorsys.hls_to_rgb(hue(label) / 360, 0.62, 0.95)
    return round(red * 255), round(green * 255), round(blue * 255)
