"""A detection set in COCO format, checked before anything is computed."""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.config.schema import DataConfig
from common.runtime.errors import UserError
from common.runtime.files import read_json

log = logging.getLogger("zsqdet")


@dataclass(frozen=True)
class CocoSet:
    """Images and annotations; `category_ids[c]` is the category of the detector's class c, None where it has none."""

    content: dict[str, Any]
    files: list[Path]
    image_ids: list[int]
    sizes: list[tuple[int, int]]  # height, width
    category_ids: list[int | None]


def read_set(data: DataConfig, class_names: Sequence[str]) -> CocoSet:
    """Reads the annotations and finds the images.

    Raises:
        UserError: not a COCO detection file, nothing in it, images that are missing, or classes that do not fit.
    """
    assert data.images is not None
    assert data.annotations is not None
    content = read_annotations(data.annotations)
    images = content["images"]
    files = [data.images / image["file_name"] for image in images]
    missing = [path for path in files if not path.is_file()]
    if missing:
        raise UserError(
            f"data.images: {len(missing)} of the {len(files)} images of {data.annotations} are not in {data.images}, "
            f"the first is {missing[0].name}; give the folder that holds them"
        )
    return CocoSet(
        content,
        files,
        [image["id"] for image in images],
        [(image["height"], image["width"]) for image in images],
        _categories(content, class_names, data.annotations),
    )


def read_annotations(path: Path) -> dict[str, Any]:
    """A COCO detection file, with what pycocotools needs and the file may leave out.

    Raises:
        UserError: not a COCO detection file, or nothing in it.
    """
    content = read_json(path)
    _check(content, path)
    for annotation in content["annotations"]:
        annotation.setdefault("iscrowd", 0)
        annotation.setdefault("area", annotation["bbox"][2] * annotation["bbox"][3])
    return {"info": {}} | content


def _check(content: Any, path: Path) -> None:
    wanted = {
        "images": ("id", "file_name", "width", "height"),
        "annotations": ("id", "image_id", "category_id", "bbox"),
        "categories": ("id", "name"),
    }
    for key, fields in wanted.items():
        rows = content.get(key) if isinstance(content, dict) else None
        if not isinstance(rows, list):
            raise UserError(f"{path}: found no list {key!r}; a COCO detection file has {', '.join(wanted)}")
        if not rows:
            raise UserError(f"{path}: {key!r} is empty; there is nothing to measure")
        for i, row in enumerate(rows):
            lacking = [field for field in fields if not isinstance(row, dict) or field not in row]
            if lacking:
                raise UserError(f"{path}: {key}[{i}] has no {lacking[0]!r}; a COCO detection file has it")
    for i, row in enumerate(content["annotations"]):
        box = row["bbox"]
        if not isinstance(box, list) or len(box) != 4 or not all(map(_is_finite, box)):
            raise UserError(
                f"{path}: annotations[{i}] has 'bbox' {box!r}; four finite numbers are needed: x, y, width, height"
            )


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _categories(content: dict[str, Any], class_names: Sequence[str], path: Path) -> list[int | None]:
    """Classes are found by name; where no name is known but the numbers are equal, by their order."""
    by_name = {category["name"]: category["id"] for category in content["categories"]}
    if len(by_name) < len(content["categories"]):
        raise UserError(f"{path}: two categories have the same name; give each its own")
    unknown = [name for name in by_name if name not in class_names]
    if not unknown:
        return [by_name.get(name) for name in class_names]
    if len(by_name) == len(class_names) and len(unknown) == len(by_name):
        log.warning("%s: other class names than the detector's; taken in the order of their ids", path)
        return sorted(by_name.values())
    raise UserError(
        f"{path}: {len(by_name)} categories, of which {unknown[0]!r} is none of the detector's {len(class_names)} "
        f"classes ({class_names[0]}, ...); evaluate on a set with the detector's classes"
    )
