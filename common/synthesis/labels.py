"""Labels of the synthetic images: sampled at random, read from a COCO file for the baselines, and updated.

Adaptive label sampling (arXiv 2507.16782): the detector's detections update the labels during synthesis.
"""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor
from torchvision.ops import box_iou, nms

from common.config.schema import LabelSamplingConfig
from common.detection.coco_json import CocoFile, read_coco
from common.detection.masks import decode, paste, resize_masks
from common.detection.roi_losses import ellipses
from common.detection.types import Detections, Targets
from common.runtime.errors import UserError
from common.runtime.image_files import image_size

MIN_SIDE, MAX_SIDE = 0.2, 0.8  # of a box, fraction of the image side
MAX_BOXES = 25  # of `multi_box`
# Of `scene`: like photographs, many small objects of few classes. Fractions of the image side.
SCENE_BOXES, SCENE_CLASSES = 20, 4
SCENE_SIZES, SCENE_ASPECT = (0.05, 0.35), 2.0


def sample_labels(kind: str, count: int, size: int, num_classes: int, generator: torch.Generator) -> list[Targets]:
    """Samples labels for `count` square images of `size` pixels.

    one_box: one box, width and height uniform in [0.2, 0.8] of the image, uniform position and class (arXiv 2507.16782,
        initial labels).
    multi_box: 1 to 25 of these; they may overlap.
    mosaic: four of these, one in each quadrant at half size.
    scene: 2 to 20 boxes of at most four classes; they may overlap. sqrt(area) is log-uniform in [0.05, 0.35] of the
        image side, the aspect ratio log-uniform in [1/2, 2].

    Raises:
        ValueError: another `kind` (for true labels see `read_labels`).
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
        raise ValueError(f"labels: cannot sample {kind!r}")
    drawn = []
    for number in numbers:
        boxes = _boxes(number, generator)
        if kind == "mosaic":
            corners = torch.tensor([[0.0, 0.0], [0.5, 0.0], [0.0, 0.5], [0.5, 0.5]])
            boxes = boxes / 2 + corners.repeat(1, 2)
        drawn.append(Targets(boxes * size, torch.randint(num_classes, (number,), generator=generator)))
    return drawn


def _boxes(number: int, generator: torch.Generator) -> Tensor:
    """Boxes [number, 4] xyxy, in fractions of the image side."""
    return _place(MIN_SIDE + (MAX_SIDE - MIN_SIDE) * torch.rand(number, 2, generator=generator), generator)


def _place(sides: Tensor, generator: torch.Generator) -> Tensor:
    """Boxes [N, 4] xyxy of given widths and heights [N, 2] at uniform positions inside the image; fractions."""
    corner = (1 - sides) * torch.rand(sides.shape, generator=generator)
    return torch.cat([corner, corner + sides], 1)


def _scene(size: int, num_classes: int, generator: torch.Generator) -> Targets:
    number = int(torch.randint(2, SCENE_BOXES + 1, (1,), generator=generator))
    smallest, largest = SCENE_SIZES
    side = smallest * (largest / smallest) ** torch.rand(number, generator=generator)
    stretch = SCENE_ASPECT ** (torch.rand(number, generator=generator) - 0.5)  # square root of width / height
    boxes = _place(torch.stack([side * stretch, side / stretch], 1), generator)
    classes = torch.randint(num_classes, (SCENE_CLASSES,), generator=generator)
    return Targets(boxes * size, classes[torch.randint(SCENE_CLASSES, (number,), generator=generator)])


def scale_labels(targets: Sequence[Targets], factor: float) -> list[Targets]:
    """The labels after resizing the image by `factor`."""
    scaled = []
    for t in targets:
        masks = t.masks
        if masks is not None:
            masks = resize_masks(masks, round(masks.shape[1] * factor), round(masks.shape[2] * factor))
        scaled.append(Targets(t.boxes * factor, t.labels, masks))
    return scaled


def letterbox(width: float, height: float, size: int) -> tuple[float, float, float]:
    """Scale, left and top padding (pixels) of an image letterboxed to a square of `size` pixels."""
    scale = size / max(width, height)
    return scale, (size - width * scale) / 2, (size - height * scale) / 2


@dataclass(frozen=True)
class TrueLabels(Targets):
    """Labels of one image of a COCO file; masks stay encoded until `with_masks`."""

    segmentations: tuple[Any, ...] = ()  # of each box, polygons or RLE as in the file; None without
    image_size: tuple[int, int] = (0, 0)  # (width, height) in the file


def read_labels(annotations: Path, class_names: Sequence[str], size: int, masks: bool = False) -> list[TrueLabels]:
    """The labels of every labelled image of a COCO file, letterboxed to `size` pixels; no image is read.

    Categories are matched to the detector's classes by name; other categories and crowds are skipped.

    Args:
        annotations: the COCO file.
        class_names: the detector's.
        size: of the images, pixels.
        masks: whether the detector learns masks; without, segmentations are not looked at.

    Raises:
        UserError: mistakes in the file, or no box of a known class in it.
    """
    coco = read_coco(annotations, masks=masks)
    found = _labels_of(coco, class_names, size)
    return [found[key] for key in sorted(found, key=str)]


def labels_of_files(
    annotations: Path, files: Sequence[Path], class_names: Sequence[str], size: int, masks: bool = False
) -> list[TrueLabels]:
    """The labels of given image files, matched by file name, as `read_labels` returns them; may be empty.

    Raises:
        UserError: as `read_labels`, or a file that is not in the annotations.
    """
    coco = read_coco(annotations, masks=masks)
    found = _labels_of(coco, class_names, size)
    ids: dict[str, list[int]] = {}
    for image in coco.images:
        ids.setdefault(PurePosixPath(image.get("file_name", "").replace("\\", "/")).name, []).append(image["id"])
    sizes = {image["id"]: (image["height"], image["width"]) for image in coco.images}
    labels = []
    for file in files:
        known = ids.get(file.name, [])
        if len(known) != 1:
            has = f"has {len(known)} entries" if known else "has no entry"
            raise UserError(
                f"synthesis.annotations: {annotations} {has} for {file.name} of synthesis.real_images; needed is one"
            )
        if (own := image_size(file)) != sizes[known[0]]:
            there, here = ("{1}x{0}".format(*size) for size in (sizes[known[0]], own))
            raise UserError(
                f"{file}: {here} pixels, but {there} in {annotations}; boxes of another size are of another image"
            )
        labels.append(found.get(known[0], _labels(array("f"), [], (0, 0))))
    return labels


def _labels_of(coco: CocoFile, class_names: Sequence[str], size: int) -> dict[int, TrueLabels]:
    """Image id -> labels for the images that have any."""
    index = {name: i for i, name in enumerate(class_names)}
    classes = {row["id"]: index[row["name"]] for row in coco.categories if row["name"] in index}
    images = {row["id"]: (row["width"], row["height"]) for row in coco.images}
    rows: dict[int, array[float]] = {}  # five numbers a box, which a list would give 200 bytes
    segmentations: dict[int, list[Any]] = {}
    for annotation in coco.annotations:
        image, category = annotation["image_id"], annotation["category_id"]
        box = _letterboxed(annotation["bbox"], images[image], size)
        if category in classes and not annotation["iscrowd"] and box is not None:
            rows.setdefault(image, array("f")).extend([*box, classes[category]])
            segmentations.setdefault(image, []).append(annotation.get("segmentation"))
    if not rows:
        raise UserError(f"{coco.path}: no box of the detector's classes; its category names must be the detector's")
    return {key: _labels(rows[key], segmentations[key], images[key]) for key in rows}


def _labels(rows: "array[float]", segmentations: Sequence[Any], image_size: tuple[int, int]) -> TrueLabels:
    table = torch.tensor(rows, dtype=torch.float32).view(-1, 5)
    return TrueLabels(table[:, :4].contiguous(), table[:, 4].long(), None, tuple(segmentations), image_size)


def with_masks(labels: TrueLabels, size: int) -> Targets:
    """The labels with masks [n, size, size], letterboxed; without masks if the file lacks one of them."""
    if not labels.segmentations or not all(labels.segmentations):
        return Targets(labels.boxes, labels.labels)
    width, height = labels.image_size
    scale, left, top = letterbox(width, height, size)
    masks = decode(labels.segmentations, height, width)
    new_height, new_width = max(round(height * scale), 1), max(round(width * scale), 1)
    padded = torch.zeros(len(masks), size, size, dtype=torch.bool)
    y, x = round(top - 0.1), round(left - 0.1)
    padded[:, y : y + new_height, x : x + new_width] = resize_masks(masks, new_height, new_width)
    return Targets(labels.boxes, labels.labels, padded)


def _letterboxed(bbox: Sequence[float], image_size: tuple[float, float], size: int) -> list[float] | None:
    """A COCO box (x, y, width, height) as letterboxed xyxy; None if nothing of it is inside the image."""
    width, height = image_size
    scale, left, top = letterbox(width, height, size)
    x, y, w, h = bbox
    x1, x2 = max(x, 0), min(x + w, width)
    y1, y2 = max(y, 0), min(y + h, height)
    if x2 <= x1 or y2 <= y1:
        return None
    return [x1 * scale + left, y1 * scale + top, x2 * scale + left, y2 * scale + top]


def take_labels(pool: Sequence[TrueLabels], start: int, count: int, seed: int) -> list[TrueLabels]:
    """Labels `start` to `start + count` of the pool in an order shuffled by `seed`; wraps around at its end."""
    order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed)).tolist()
    return [pool[order[i % len(order)]] for i in range(start, start + count)]


def relabel(targets: Targets, found: Detections, size: int, config: LabelSamplingConfig) -> Targets:
    """The labels of one image after one update.

    With class-agnostic IoU, a detection above `config.confidence` becomes a new label if its IoU with every label is
    below `config.overlap` and its area is within the limits. A label without such a detection at `config.overlap` or
    more is removed; if none would stay, the one with the highest IoU stays, and a single label always stays. Labels
    that stay keep box and class. Without detections or labels nothing changes.

    Beyond the paper: new labels are NMS-filtered among themselves, so that one object does not get two classes, and
    boxes are clipped at all four borders.

    Args:
        targets: labels, boxes in pixels of the image.
        found: detections in the same image.
        size: side of the square image in pixels.
        config: thresholds.
    """
    confident = found.scores > config.confidence
    if not confident.any() or not len(targets.labels):
        return targets
    boxes, scores, labels = found.boxes[confident].clamp(0, size), found.scores[confident], found.labels[confident]
    overlap = box_iou(boxes, targets.boxes)  # [detections, labels]
    area = (boxes[:, 2:] - boxes[:, :2]).prod(1) / size**2
    new = (overlap.amax(1) < config.overlap) & (area > config.min_area) & (area < config.max_area)
    added = new.nonzero().flatten()
    added = added[nms(boxes[added], scores[added], config.overlap)]
    kept = _supported(overlap.amax(0), config.overlap)
    new_boxes = boxes[added].to(targets.boxes.dtype)
    masks = None
    if targets.masks is not None:
        masks = torch.cat([targets.masks[kept], ellipses(new_boxes, size, size)])
    updated = Targets(
        torch.cat([targets.boxes[kept], new_boxes]), torch.cat([targets.labels[kept], labels[added]]), masks
    )  # fmt: skip
    return update_masks(updated, found, size, config)


def update_masks(targets: Targets, found: Detections, size: int, config: LabelSamplingConfig) -> Targets:
    """The same labels with masks predicted by the detector.

    A label gets the mask of the detection above `config.confidence` with the highest IoU, if that is `config.overlap`
    or more, resized to the label's box. The others keep their mask, initially the ellipse inscribed in the box. Without
    masks among the detections nothing changes.
    """
    if found.masks is None or not len(targets.labels):
        return targets
    masks = ellipses(targets.boxes, size, size) if targets.masks is None else targets.masks
    confident = found.scores > config.confidence
    if confident.any():
        overlap, best = box_iou(found.boxes[confident], targets.boxes).max(0)
        predicted = paste(found.masks[confident][best], targets.boxes, size, size)
        seen = (overlap >= config.overlap) & predicted.flatten(1).any(1)
        masks = torch.where(seen[:, None, None], predicted, masks)
    return Targets(targets.boxes, targets.labels, masks)


def _supported(best: torch.Tensor, threshold: float) -> torch.Tensor:
    """Which labels stay [n] bool, from the best IoU of each with a detection."""
    if len(best) == 1:
        return torch.ones_like(best, dtype=torch.bool)
    kept = best >= threshold
    if not kept.any():
        kept[best.argmax()] = True
    return kept
