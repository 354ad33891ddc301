"""The first labels of an image: where its objects should appear, before the detector has seen anything."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.detection.masks import decode, resize_masks
from common.detection.types import Targets
from common.runtime.errors import UserError
from common.runtime.files import read_json

MIN_SIDE, MAX_SIDE = 0.2, 0.8  # of a box, as a fraction of the canvas
MAX_BOXES = 25  # of `multi_box`
# Of `scene`: what photographs show at the sizes that detectors are used at, many small objects of few classes.
SCENE_BOXES, SCENE_CLASSES = 20, 4
SCENE_SIDES, SCENE_ASPECT = (0.05, 0.35), 2.0


def draw_labels(kind: str, count: int, size: int, num_classes: int, generator: torch.Generator) -> list[Targets]:
    """Labels for `count` square canvases of `size` pixels.

    one_box: one box of uniform width and height in [.2, .8] of the canvas, uniform among the places where it fits, with
    a uniform class (arXiv 2507.16782, first labels). multi_box: 1 to 25 of these, which may overlap. mosaic: four of
    these, each scaled into its quadrant. scene: 2 to 20 boxes, uniform, whose size (square root of the area) is
    log-uniform in [.05, .35] of the canvas and whose ratio of width to height is log-uniform in [1/2, 2], of up to four
    classes; they may overlap.

    Raises:
        ValueError: `kind` is none of these (true labels come from `read_labels`).
    """
    if kind == "scene":
        return [_scene(size, num_classes, generator) for _ in range(count)]
    if kind == "one_box":
        numbers = [1] * count
    elif kind == "mosaic":
        numbers = [4] * count
    elif kind == "multi_box":
        numbers = torch.randint(1, MAX_BOXES + 1, (count,), generator=generator).tolist()
    else:
        raise ValueError(f"no labels can be drawn for {kind!r}")
    drawn = []
    for number in numbers:
        boxes = _boxes(number, generator)
        if kind == "mosaic":
            corners = torch.tensor([[0.0, 0.0], [0.5, 0.0], [0.0, 0.5], [0.5, 0.5]])
            boxes = boxes / 2 + corners.repeat(1, 2)
        drawn.append(Targets(boxes * size, torch.randint(num_classes, (number,), generator=generator)))
    return drawn


def _boxes(number: int, generator: torch.Generator) -> Tensor:
    """`number` boxes, xyxy, in fractions of the canvas."""
    return _place(MIN_SIDE + (MAX_SIDE - MIN_SIDE) * torch.rand(number, 2, generator=generator), generator)


def _place(sides: Tensor, generator: torch.Generator) -> Tensor:
    """Boxes, xyxy, of these widths and heights [N, 2], uniform among the places where they fit; fractions."""
    corner = (1 - sides) * torch.rand(sides.shape, generator=generator)
    return torch.cat([corner, corner + sides], 1)


def _scene(size: int, num_classes: int, generator: torch.Generator) -> Targets:
    number = int(torch.randint(2, SCENE_BOXES + 1, (1,), generator=generator))
    smallest, largest = SCENE_SIDES
    side = smallest * (largest / smallest) ** torch.rand(number, generator=generator)
    stretch = SCENE_ASPECT ** (torch.rand(number, generator=generator) - 0.5)  # square root of width / height
    boxes = _place(torch.stack([side * stretch, side / stretch], 1), generator)
    classes = torch.randint(num_classes, (SCENE_CLASSES,), generator=generator)
    return Targets(boxes * size, classes[torch.randint(SCENE_CLASSES, (number,), generator=generator)])


def scale_labels(targets: Sequence[Targets], factor: float) -> list[Targets]:
    """The same labels on a canvas `factor` times as large."""
    scaled = []
    for t in targets:
        masks = t.masks
        if masks is not None:
            masks = resize_masks(masks, round(masks.shape[1] * factor), round(masks.shape[2] * factor))
        scaled.append(Targets(t.boxes * factor, t.labels, masks))
    return scaled


def letterbox(width: float, height: float, size: int) -> tuple[float, float, float]:
    """Scale and left and top border (pixels) that fit an image into the middle of a square of `size` pixels."""
    scale = size / max(width, height)
    return scale, (size - width * scale) / 2, (size - height * scale) / 2


@dataclass(frozen=True)
class TrueLabels(Targets):
    """Labels of a COCO file, with what `with_masks` makes their masks of."""

    segmentations: tuple[Any, ...] = ()  # of each box, as the file has it; None where it has none
    image_size: tuple[int, int] = (0, 0)  # width and height in the file


def read_labels(annotations: Path, class_names: Sequence[str], size: int) -> list[TrueLabels]:
    """The labels of every image of a COCO file that has any, letterboxed to `size` pixels; no image is read.

    Categories are matched to the detector's classes by name; boxes of other categories and of crowds are left out.

    Raises:
        UserError: not a COCO detection file, or no box of a known class in it.
    """
    _, found = _read(annotations, class_names, size)
    return [found[key] for key in sorted(found, key=str)]


def labels_of_files(
    annotations: Path, files: Sequence[Path], class_names: Sequence[str], size: int
) -> list[TrueLabels]:
    """The labels of image files as `read_labels` reads them, found by name; an image may have none.

    Raises:
        UserError: as `read_labels`, or a file that the annotations do not know.
    """
    names, found = _read(annotations, class_names, size)
    unknown = next((file for file in files if file.name not in names), None)
    if unknown is not None:
        raise UserError(f"synthesis.annotations: {annotations} does not know {unknown.name} of synthesis.real_images")
    return [found.get(names[file.name], _labels([], [], (0, 0))) for file in files]


def _read(annotations: Path, class_names: Sequence[str], size: int) -> tuple[dict[str, Any], dict[Any, TrueLabels]]:
    """The id of each file name, and for each id that has labels those."""
    content = read_json(annotations)
    try:
        index = {name: i for i, name in enumerate(class_names)}
        classes = {c["id"]: index[c["name"]] for c in content["categories"] if c["name"] in index}
        images = {i["id"]: (i["width"], i["height"]) for i in content["images"]}
        names = {Path(i.get("file_name", "")).name: i["id"] for i in content["images"]}
        rows: dict[Any, list[list[float]]] = {}
        outlines: dict[Any, list[Any]] = {}
        for annotation in content["annotations"]:
            if annotation["category_id"] in classes and not annotation.get("iscrowd"):
                row = _letterboxed(annotation["bbox"], images[annotation["image_id"]], size)
                if row is not None:
                    rows.setdefault(annotation["image_id"], []).append([*row, classes[annotation["category_id"]]])
                    outlines.setdefault(annotation["image_id"], []).append(annotation.get("segmentation"))
    except (AttributeError, KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise UserError(
            f"{annotations}: not a COCO detection file ({type(error).__name__}: {error}); it needs images with "
            "width and height, annotations with bbox, image_id and category_id, and categories"
        ) from error
    if not rows:
        raise UserError(f"{annotations}: no box of the detector's classes; its category names must be the detector's")
    return names, {key: _labels(rows[key], outlines[key], images[key]) for key in rows}


def _labels(rows: Sequence[Sequence[float]], outlines: Sequence[Any], image_size: tuple[int, int]) -> TrueLabels:
    table = torch.tensor(rows, dtype=torch.float32).view(-1, 5)
    return TrueLabels(table[:, :4].contiguous(), table[:, 4].long(), None, tuple(outlines), image_size)


def with_masks(labels: TrueLabels, size: int) -> Targets:
    """The labels with their masks on a canvas of `size` pixels; without, where the file lacks one.

    Raises:
        UserError: a segmentation that is none.
    """
    if not labels.segmentations or not all(labels.segmentations):
        return Targets(labels.boxes, labels.labels)
    width, height = labels.image_size
    scale, left, top = letterbox(width, height, size)
    try:
        masks = decode(labels.segmentations, height, width)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"synthesis.annotations: not a COCO segmentation ({type(error).__name__}: {error})") from error
    new_height, new_width = max(round(height * scale), 1), max(round(width * scale), 1)
    canvas = torch.zeros(len(masks), size, size, dtype=torch.bool)
    y, x = round(top - 0.1), round(left - 0.1)
    canvas[:, y : y + new_height, x : x + new_width] = resize_masks(masks, new_height, new_width)
    return Targets(labels.boxes, labels.labels, canvas)


def _letterboxed(bbox: Sequence[float], image_size: tuple[float, float], size: int) -> list[float] | None:
    """COCO's x, y, width, height as xyxy on the canvas; None where nothing of the box is inside the image."""
    width, height = image_size
    scale, left, top = letterbox(width, height, size)
    x, y, w, h = (float(v) for v in bbox)
    x1, x2 = max(x, 0), min(x + w, width)
    y1, y2 = max(y, 0), min(y + h, height)
    if not all(math.isfinite(v) for v in (x, y, w, h)) or x2 <= x1 or y2 <= y1:
        return None
    return [x1 * scale + left, y1 * scale + top, x2 * scale + left, y2 * scale + top]


def take_labels(pool: Sequence[TrueLabels], start: int, count: int, seed: int) -> list[TrueLabels]:
    """Labels `start` to `start + count` of the pool as shuffled by `seed`, beginning anew at its end."""
    order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed)).tolist()
    return [pool[order[i % len(order)]] for i in range(start, start + count)]
