"""Synthetic images for the report: small JPEG files as data URIs, and their labels as shapes to draw over them."""

import base64
import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import cv2
import numpy as np
from torch import Tensor

from common.errors import UserError
from common.images import read_image
from common.reporting.drawing import hue
from common.synthesis.imageset import ImageSet

SHOWN = 12  # images of the set
LARGEST = 384  # pixels of a shown image's longer side
SNAPSHOT_LARGEST, SNAPSHOT_ROWS = 160, 3
JPEG_QUALITY = 85
LETTER = 0.62  # width of a letter, in heights of the text

Area = tuple[float, float, float, float]  # left, top, right, bottom


@dataclass(frozen=True)
class Box:
    """A label in the image's own pixels. Its name starts, or with `ends` ends, at (text_x, text_y); "" without room."""

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
    """An image and what is drawn over it; lengths are in pixels of the original."""

    source: str  # data URI
    width: int
    height: int
    text: float  # height of the letters
    boxes: list[Box]
    caption: str


@dataclass(frozen=True)
class Snapshot:
    """Some images in the course of stage one, with the labels they were being made for."""

    title: str
    pictures: list[Picture]
    boxes: int  # in all of them


def pictures(images: ImageSet) -> list[Picture]:
    """Images from all over the set with their boxes."""
    chosen = np.linspace(0, len(images) - 1, min(SHOWN, len(images))).round().astype(int)
    return [_picture(images, int(index)) for index in chosen]


def snapshots(images: ImageSet) -> list[Snapshot]:
    """How the first images came about; those whose files are gone are left out. Older sets do not have the boxes."""
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
    """An image [3, H, W] uint8 with boxes xyxy in its pixels, and a text at each; `lines` fit in its longer side."""
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
    """The base line of a box's name where it covers no other: above, inside or below the box; NaN without room.

    `span` is from where to where the name goes; what it takes is added to `taken`.
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
    """An image [3, H, W] uint8 as a data URI, reduced where it is larger than `largest` pixels."""
    pixels = image.permute(1, 2, 0).flip(2).contiguous().numpy()
    factor = largest / max(pixels.shape[:2])
    if factor < 1:
        pixels = cv2.resize(pixels, None, fx=factor, fy=factor, interpolation=cv2.INTER_AREA)
    _, encoded = cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
    return f"data:image/jpeg;base64,{base64.b64encode(encoded.tobytes()).decode()}"
