"""Full-precision and quantized detections on the same images, from the prediction files of the run."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import box_iou

from common.detection.masks import decode
from common.evaluation.fidelity import OBJECT
from common.pipeline.run_dir import fidelity_file, predictions_file, read_predictions
from common.reporting.pictures import Picture, picture_of, tint
from common.reporting.run_data import Contents
from common.reporting.tables import FULL, PTQ, TITLES, TRAINED
from common.runtime.errors import UserError
from common.runtime.files import read_json
from common.runtime.image_files import read_image

SHOWN = 6  # images
CONFIDENCE = 0.25
PARTNER = 0.5  # IoU of two detections of one object
LINES = 30  # longer side of an image over the font size

Sides = defaultdict[int, list[Any]]  # detections of one detector by the image's id


def side_by_side(run: Path, contents: Contents) -> dict[str, Any]:
    """`rows` of (full precision, quantized) pictures, and `other`, QAT or else PTQ; without rows `missing` says why.

    The images stand at equal intervals in the evaluation set.
    """
    measured_on = contents.results.get("measured_on") or {}
    names = [row["name"] for row in contents.results["rows"]]
    if FULL not in names:
        names = []

    def read() -> tuple[Any, Path]:
        paths = [measured_on.get(key) or contents.settings.get(f"data.{key}") for key in ("annotations", "images")]
        return read_json(Path(str(paths[0]))), Path(str(paths[1]))

    return _compared(run, names, read, partial(predictions_file, run), CONFIDENCE, _spread)


def least_alike(run: Path, contents: Contents) -> dict[str, Any]:
    """The same of the images that fidelity was measured on, those on which the two detectors differ most."""
    stored = contents.results.get("fidelity") or {}
    names = [row["name"] for row in stored.get("rows", [])]

    def read() -> tuple[Any, Path]:
        return read_predictions(run, fidelity_file(run, "images")), Path(stored["measured_on"]["images"])

    lowest = stored.get("measured_on", {}).get("objects_from", OBJECT)
    return _compared(run, names, read, partial(fidelity_file, run), lowest, _least_alike)


def _compared(
    run: Path,
    names: Sequence[str],
    read: Callable[[], tuple[Any, Path]],
    file: Callable[[str], Path],
    confidence: float,
    choose: Callable[[list[Any], list[Sides]], list[Any]],
) -> dict[str, Any]:
    """Pictures of the best of the detectors `names` beside full precision, of the images that `choose` takes."""
    nothing = {"rows": [], "other": "", "confidence": confidence}
    other = next((name for name in (TRAINED, PTQ) if name in names), None)
    if other is None:
        return nothing | {"missing": "the quantized detector has not been evaluated"}
    try:
        content, folder = read()
        sides = [_by_image(read_predictions(run, file(name)), confidence) for name in (FULL, other)]
        rows = _rows(content, sides, (TITLES[FULL], TITLES[other]), folder, choose(content["images"], sides))
    except (UserError, KeyError, TypeError, ValueError, IndexError) as error:
        reason = str(error) if isinstance(error, UserError) else "a prediction or annotation file is damaged"
        return nothing | {"missing": reason}
    return {"rows": rows, "other": other, "confidence": confidence, "missing": ""}


def _spread(images: list[Any], _: list[Sides]) -> list[Any]:
    return [images[i] for i in np.linspace(0, len(images) - 1, min(SHOWN, len(images))).round().astype(int)]


def _least_alike(images: list[Any], sides: list[Sides]) -> list[Any]:
    return sorted(images, key=lambda image: _alike(*(side[image["id"]] for side in sides)))[:SHOWN]


def _alike(full: list[Any], other: list[Any]) -> float:
    """Share of the detections of two detectors in one image that have a partner: the same class, IoU at least .5."""
    if not full and not other:
        return 1.0
    boxes = [_corners(side) for side in (other, full)]
    overlap = box_iou(*boxes)
    for i, j in np.ndindex(*overlap.shape):
        if other[i]["category_id"] != full[j]["category_id"]:
            overlap[i, j] = 0
    pairs = 0
    for i in sorted(range(len(other)), key=lambda i: -other[i]["score"]):
        if len(full) and overlap[i].max() >= PARTNER:
            overlap[:, overlap[i].argmax()] = 0
            pairs += 1
    return 2 * pairs / (len(full) + len(other))


def _rows(
    content: Any, sides: list[Sides], titles: tuple[str, str], folder: Path, chosen: list[Any]
) -> list[tuple[Picture, Picture]]:
    names = {category["id"]: category["name"] for category in content["categories"]}
    places = {category: i for i, category in enumerate(sorted(names))}
    rows = []
    for image in chosen:
        pixels = read_image(folder / image["file_name"])
        pair = []
        for side, title in zip(sides, titles, strict=True):
            own = side[image["id"]]
            labels = [places[d["category_id"]] for d in own]
            texts = [f"{names[d['category_id']]} {d['score']:.2f}" for d in own]
            caption = f"{title}, {image['file_name']}: {len(own)} detection{'' if len(own) == 1 else 's'}"
            shown = tint(pixels, _masks(own, *pixels.shape[1:]), labels)
            pair.append(picture_of(shown, _corners(own).tolist(), labels, texts, caption, LINES))
        rows.append((pair[0], pair[1]))
    return rows


def _corners(detections: list[Any]) -> Tensor:
    boxes = torch.tensor([d["bbox"] for d in detections], dtype=torch.float32).view(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    return boxes


def _masks(detections: list[Any], height: int, width: int) -> Tensor:
    """Masks of the detections [n, height, width] bool; all False for a box detector."""
    if not all("segmentation" in d for d in detections):
        return torch.zeros(len(detections), height, width, dtype=torch.bool)
    return decode([d["segmentation"] for d in detections], height, width)


def _by_image(detections: list[Any], confidence: float) -> Sides:
    found = defaultdict(list)
    for row in detections:
        if row["score"] >= confidence:
            found[row["image_id"]].append(row)
    return found
