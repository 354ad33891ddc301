"""Images with boxes: as JPEG data URIs with SVG overlays for the report, and drawn into pixels for `predict`."""

import base64
import colorsys
import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from common.detection.types import Detections
from common.runtime.errors import UserError
from common.runtime.image_files import read_image
from common.synthesis.imageset import ImageSet

SHOWN = 12  # images of the set in the report
LARGEST = 384  # longer side in pixels
SNAPSHOT_LARGEST, SNAPSHOT_ROWS = 160, 3
JPEG_QUALITY = 85
LETTER = 0.62  # width of a letter over the font size
MASK_OPACITY = 0.45
TEXT = 40  # longer side of the image over the font size
SMALLEST_TEXT = 11  # pixels

Area = tuple[float, float, float, float]  # left, top, right, bottom


@dataclass(frozen=True)
class Box:
    """A labelled box in pixels of the image. `name` ("" without room) starts at (text_x, text_y), or ends there."""

    x: float
    y: float
    width: float
    height: float
    name: str
    hue: int  # degrees
    text_x: float
    text_y: float
    ends: bool


@dataclass(frozen=True)
class Picture:
    """An image and its overlay; lengths in pixels of the original."""

    source: str  # data URI
    width: int
    height: int
    text: float  # font size
    boxes: list[Box]
    caption: str


@dataclass(frozen=True)
class Snapshot:
    """Some images at one iteration of synthesis, with their labels at that iteration."""

    title: str
    pictures: list[Picture]
    boxes: int  # total


def pictures(images: ImageSet) -> list[Picture]:
    """Images at equal intervals from the set, with their boxes."""
    chosen = np.linspace(0, len(images) - 1, min(SHOWN, len(images))).round().astype(int)
    return [_picture(images, int(index)) for index in chosen]


def snapshots(images: ImageSet) -> list[Snapshot]:
    """The first images during synthesis; missing files are skipped. Sets of older versions have no boxes."""
    found = []
    for row in images.description.get("snapshots", []):
        title, shown = f"{row['size']} pixels, iteration {row['iteration']}", []
        empty: list[list[Any]] = [[]] * len(row["files"])
        labelled = zip(row["files"], row.get("boxes", empty), row.get("labels", empty), strict=True)
        for number, (file, boxes, labels) in enumerate(islice(labelled, SNAPSHOT_ROWS)):
            names = ", ".join(images.class_names[label] for label in labels)
            caption = f"Image {number} at {title}{names and ': '}{names}"
            with contextlib.suppress(UserError):
                image = read_image(images.directory / file)
                shown.append(picture_of(image, boxes, labels, [""] * len(labels), caption, largest=SNAPSHOT_LARGEST))
        if shown:
            found.append(Snapshot(title, shown, sum(len(picture.boxes) for picture in shown)))
    return found


def picture_of(
    image: Tensor,
    boxes: Sequence[Sequence[float]],
    labels: Sequence[int],
    texts: Sequence[str],
    caption: str,
    lines: int = 16,
    largest: int = LARGEST,
) -> Picture:
    """An image [3, H, W] uint8 with boxes (xyxy, pixels) and a text at each; font size is the longer side / `lines`."""
    height, width = image.shape[1:]
    text = max(width, height) / lines
    shapes: list[Box] = []
    taken: list[Area] = []
    for box, label, name in zip(boxes, labels, texts, strict=True):
        x1, y1, x2, y2 = box
        ends = (x1 + x2) / 2 > width / 2  # towards the middle, so that names stay inside
        length = LETTER * text * len(name)
        y = _free_line(box, (x2 - length, x2) if ends else (x1, x1 + length), text, height, taken)
        shown = "" if math.isnan(y) else name
        shapes.append(Box(x1, y1, x2 - x1, y2 - y1, shown, hue(label), x2 if ends else x1, y, ends))
    return Picture(_jpeg(image, largest), width, height, text, shapes, caption)


def _free_line(box: Sequence[float], span: tuple[float, float], text: float, height: int, taken: list[Area]) -> float:
    """Baseline of a box's name that overlaps no other: above, inside or below the box; NaN without room.

    `span` is the horizontal extent of the name; its area is added to `taken`.
    """
    for base in (box[1] - text / 4, box[1] + text, box[3] + text):
        top, bottom = base - 0.8 * text, base + 0.2 * text
        free = all(span[1] <= o[0] or span[0] >= o[2] or bottom <= o[1] or top >= o[3] for o in taken)
        if free and top >= 0 and bottom <= height:
            taken.append((span[0], top, span[1], bottom))
            return base
    return math.nan


def _picture(images: ImageSet, index: int) -> Picture:
    targets = images.targets(index)
    labels = targets.labels.tolist()
    names = [images.class_names[label] for label in labels]
    caption = f"Synthetic image {index}: {', '.join(names) or 'no labels'}"
    return picture_of(images.image(index), targets.boxes.tolist(), labels, names, caption)


def _jpeg(image: Tensor, largest: int) -> str:
    """An image [3, H, W] uint8 as a JPEG data URI, downscaled to at most `largest` pixels."""
    pixels = image.permute(1, 2, 0).flip(2).contiguous().numpy()
    factor = largest / max(pixels.shape[:2])
    if factor < 1:
        pixels = cv2.resize(pixels, None, fx=factor, fy=factor, interpolation=cv2.INTER_AREA)
    _, encoded = cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
    return f"data:image/jpeg;base64,{base64.b64encode(encoded.tobytes()).decode()}"


def hue(label: int) -> int:
    """Hue of a class in degrees; golden-angle steps keep consecutive classes apart."""
    return round(label * 137.508) % 360


def draw_detections(image: Tensor, found: Detections, class_names: tuple[str, ...]) -> Tensor:
    """Draws boxes, masks, class names and scores; the best score is on top.

    Args:
        image: uint8 [3, H, W], RGB.
        found: boxes in pixels of the image; masks [n, H, W] or None.
        class_names: indexed by label.

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
    """Blends masks [n, H, W] into an image [3, H, W] uint8, coloured by label [n]; the first is on top."""
    pixels = image.permute(1, 2, 0).numpy().copy()
    for mask, label in reversed(list(zip(masks, labels, strict=True))):
        inside = mask.cpu().numpy().astype(bool)
        pixels[inside] = pixels[inside] * (1 - MASK_OPACITY) + np.array(_colour(label)) * MASK_OPACITY
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def _colour(label: int) -> tuple[int, int, int]:
    red, green, blue = colorsys.hls_to_rgb(hue(label) / 360, 0.62, 0.95)
    return round(red * 255), round(green * 255), round(blue * 255)
