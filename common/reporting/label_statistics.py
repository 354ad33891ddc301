"""Label statistics of a COCO file: class, size, position and number of boxes."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.detection.coco_json import read_coco


@dataclass(frozen=True)
class Boxes:
    """All boxes of a dataset. Coordinates are fractions of the image sides."""

    name: str
    images: int
    labels: np.ndarray  # [n] class index, -1 for a class that the detector does not have
    centres: np.ndarray  # [n, 2] xy
    sizes: np.ndarray  # [n] sqrt(box area / image area)
    counts: np.ndarray  # [images] boxes per image

    @property
    def boxes(self) -> int:
        """Number of boxes."""
        return len(self.labels)

    @property
    def per_image(self) -> float:
        """Mean number of boxes per image."""
        return self.boxes / max(self.images, 1)


def of_coco(path: Path, class_names: Sequence[str], name: str | None = None) -> Boxes:
    """The boxes of a COCO file without crowds; classes are matched by name. `name` is shown in the charts.

    Raises:
        UserError: not a COCO detection file.
    """
    coco = read_coco(path, may_be_empty=True)
    sizes = {image["id"]: (image["width"], image["height"]) for image in coco.images}
    places = {name: i for i, name in enumerate(class_names)}
    labels = {category["id"]: places.get(category["name"], -1) for category in coco.categories}
    counts = dict.fromkeys(sizes, 0)
    rows = []
    for annotation in coco.annotations:
        if annotation["iscrowd"]:
            continue
        width, height = sizes[annotation["image_id"]]
        x, y, w, h = annotation["bbox"]
        counts[annotation["image_id"]] += 1
        rows.append([x / width, y / height, (x + w) / width, (y + h) / height, labels[annotation["category_id"]]])
    return _boxes(name or path.name, rows, list(counts.values()))


def _boxes(name: str, rows: list[list[float]], counts: list[int]) -> Boxes:
    table = np.array(rows, dtype=float).reshape(-1, 5)
    sides = (table[:, 2:4] - table[:, :2]).clip(min=0)
    centres = (table[:, :2] + table[:, 2:4]) / 2
    return Boxes(name, len(counts), table[:, 4].astype(int), centres, np.sqrt(sides.prod(1)), np.array(counts))
