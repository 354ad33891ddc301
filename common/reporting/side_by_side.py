"""Full-precision and quantized detections on the same evaluation images, from the prediction files of the run."""

from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.detection.masks import decode
from common.pipeline.run_dir import predictions_file
from common.reporting.pictures import Picture, picture_of, tint
from common.reporting.run_data import Contents
from common.reporting.tables import FULL, PTQ, TITLES, TRAINED
from common.runtime.errors import UserError
from common.runtime.files import read_json
from common.runtime.images import read_image

SHOWN = 6  # images
CONFIDENCE = 0.25
LINES = 30  # longer side of an image over the font size


def side_by_side(run: Path, contents: Contents) -> dict[str, Any]:
    """`rows` of (full precision, quantized) pictures, and `other`, QAT or else PTQ; without rows `missing` says why."""
    names = [row["name"] for row in contents.results["rows"]]
    other = next((name for name in (TRAINED, PTQ) if name in names), None)
    if FULL not in names or other is None:
        return _none("the quantized detector has not been evaluated")
    try:
        content = read_json(Path(str(contents.settings.get("data.annotations"))))
        found = [read_json(predictions_file(run, name)) for name in (FULL, other)]
        folder = Path(str(contents.settings.get("data.images")))
        rows = _rows(content, found, (TITLES[FULL], TITLES[other]), folder)
    except (UserError, KeyError, TypeError, ValueError, IndexError) as error:
        return _none(str(error) if isinstance(error, UserError) else "a prediction or annotation file is damaged")
    return {"rows": rows, "other": other, "confidence": CONFIDENCE, "missing": ""}


def _none(reason: str) -> dict[str, Any]:
    return {"rows": [], "other": "", "confidence": CONFIDENCE, "missing": reason}


def _rows(content: Any, found: list[Any], titles: tuple[str, str], folder: Path) -> list[tuple[Picture, Picture]]:
    names = {category["id"]: category["name"] for category in content["categories"]}
    places = {category: i for i, category in enumerate(sorted(names))}
    images = content["images"]
    chosen = [images[i] for i in np.linspace(0, len(images) - 1, min(SHOWN, len(images))).round().astype(int)]
    wanted = {image["id"] for image in chosen}
    rows = []
    sides = [_by_image(detections, wanted) for detections in found]
    for image in chosen:
        pixels = read_image(folder / image["file_name"])
        pair = []
        for side, title in zip(sides, titles, strict=True):
            own = side[image["id"]]
            boxes = torch.tensor([d["bbox"] for d in own], dtype=torch.float32).view(-1, 4)
            boxes[:, 2:] += boxes[:, :2]
            labels = [places[d["category_id"]] for d in own]
            texts = [f"{names[d['category_id']]} {d['score']:.2f}" for d in own]
            caption = f"{title}, {image['file_name']}: {len(own)} detection{'' if len(own) == 1 else 's'}"
            shown = tint(pixels, _masks(own, *pixels.shape[1:]), labels)
            pair.append(picture_of(shown, boxes.tolist(), labels, texts, caption, LINES))
        rows.append((pair[0], pair[1]))
    return rows


def _masks(detections: list[Any], height: int, width: int) -> Tensor:
    """Masks of the detections [n, height, width] bool; all False for a box detector."""
    if not all("segmentation" in d for d in detections):
        return torch.zeros(len(detections), height, width, dtype=torch.bool)
    return decode([d["segmentation"] for d in detections], height, width)


def _by_image(detections: list[Any], wanted: set[int]) -> dict[int, list[Any]]:
    found = defaultdict(list)
    for row in detections:
        if row["score"] >= CONFIDENCE and row["image_id"] in wanted:
            found[row["image_id"]].append(row)
    return found
