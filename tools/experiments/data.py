"""Sets of images by name: where they are, and how those that can be made here are made (once, under runs/data).

Paths are kept with their variables ($COCO/images/val2017), so that a command in results/results.csv names no machine.
"""

import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.runtime.errors import UserError
from common.runtime.files import read_json, write_json
from tools import subset

VARIABLES = {
    "COCO": "the folder that holds images/ and annotations/ (python -m tools.get_data coco DIR)",
    "ZSQDET_SHARED": "the folder that holds coco/ with 800 images of val2017, and weights/",
    "VOC": "the folder that holds VOCdevkit/ (python -m tools.get_data voc2007 DIR)",
}
MADE = "runs/data"
DEV_IMAGES = 300  # of the 800 shared ones, by id: settings are chosen on these, and figures come from the others


@dataclass(frozen=True)
class ImageSet:
    """A COCO-format set; `annotations` is None for images alone. `make` writes it, given the variables.

    With `split` it is one that `data=` reads, and `images` its path.
    """

    images: str
    annotations: str | None
    count: int
    make: Callable[[Mapping[str, str]], None] | None = None
    split: str | None = None

    def is_that_of(self, settings: Mapping[str, Any]) -> bool:
        """Whether settings by their dotted keys evaluate on this set."""
        if self.split:
            return (str(settings.get("data.dataset")), settings.get("data.split")) == (self.images, self.split)
        return str(settings.get("data.annotations")) == self.annotations


def _shared(part: str) -> ImageSet:
    annotations = f"{MADE}/shared_{part}.json"

    def make(variables: Mapping[str, str]) -> None:
        content = read_json(Path(variables["ZSQDET_SHARED"]) / "coco/annotations/instances_val2017_subset.json")
        images = sorted(content["images"], key=lambda image: image["id"])
        images = images[:DEV_IMAGES] if part == "dev" else images[DEV_IMAGES:]
        ids = {image["id"] for image in images}
        rows = [row for row in content["annotations"] if row["image_id"] in ids]
        write_json(Path(annotations), content | {"images": images, "annotations": rows})

    count = DEV_IMAGES if part == "dev" else 800 - DEV_IMAGES
    return ImageSet("$ZSQDET_SHARED/coco/images/val2017", annotations, count, make)


def _shapes(folder: str, count: int, seed: int) -> ImageSet:
    def make(_: Mapping[str, str]) -> None:
        from tools.shapes.generate import generate

        shutil.rmtree(folder, ignore_errors=True)  # of an interrupted start; the annotations come last
        generate(Path(folder), count, seed=seed)

    return ImageSet(f"{folder}/images", f"{folder}/annotations.json", count, make)


def _first_2k() -> ImageSet:
    folder, count = f"{MADE}/first_2366", 2366

    def make(variables: Mapping[str, str]) -> None:
        coco = Path(variables["COCO"])
        content = read_json(coco / "annotations/instances_train2017.json")
        images = subset.choose(content, count, "first")
        subset.write_subset(content, images, coco / "images/train2017", Path(folder), copy=False)

    return ImageSet(f"{folder}/images", f"{folder}/annotations.json", count, make)


SETS = {
    "coco_val": ImageSet("$COCO/images/val2017", "$COCO/annotations/instances_val2017.json", 5000),
    "coco_train": ImageSet("$COCO/images/train2017", "$COCO/annotations/instances_train2017.json", 118287),
    "coco_train_2k": _first_2k(),  # 2 % of train2017 by name, the "2k" of the published code
    "voc": ImageSet("$VOC/VOCdevkit/VOC2007", None, 4952, split="test"),
    "shared_dev": _shared("dev"),
    "shared_test": _shared("test"),
    "shared_train128": ImageSet("$ZSQDET_SHARED/coco/images/train2017_128", None, 128),
    "shapes": _shapes("runs/shapes", 200, 2),
    "shapes_1000": _shapes(f"{MADE}/shapes_1000", 1000, 3),
    "shapes_4000": _shapes(f"{MADE}/shapes_4000", 4000, 4),
    "shapes_smoke": _shapes("runs/smoke/shapes", 8, 2),
}


def evaluation_words(name: str) -> list[str]:
    """Settings that evaluate on a set."""
    found = SETS[name]
    if found.split:
        return [f"data={found.images}", f"data.split={found.split}"]
    return [f"data.images={found.images}", f"data.annotations={found.annotations}"]


def real_image_words(name: str) -> list[str]:
    """Settings of a baseline whose stage one takes real images, with their labels where the set has some."""
    found = SETS[name]
    words = ["synthesis.source=real", f"synthesis.real_images={found.images}", f"synthesis.num_images={found.count}"]
    return words + (true_label_words(name) if found.annotations else [])


def true_label_words(name: str) -> list[str]:
    """Settings that take the labels of a set."""
    return ["synthesis.labels=true_label", f"synthesis.annotations={SETS[name].annotations}"]


def variables(given: Mapping[str, str | None] | None = None) -> dict[str, str]:
    """Absolute folders of the variables that are set, those of the command line before the environment's."""
    found = {name: (given or {}).get(name) or os.environ.get(name) for name in VARIABLES}
    return {name: str(Path(folder).resolve()) for name, folder in found.items() if folder}


def expand(text: str, values: Mapping[str, str]) -> str:
    """`$COCO/images` as a path of this machine; what is not set stays as it is."""
    for name, folder in values.items():
        text = text.replace(f"${name}/", f"{folder}/")
    return text


def check_variables(texts: Iterable[str], values: Mapping[str, str]) -> None:
    """Whether all variables that are used are set.

    Raises:
        UserError: one line for each that is not.
    """
    texts = list(texts)
    missing = [name for name in VARIABLES if name not in values and any(f"${name}/" in text for text in texts)]
    if missing:
        option = {name: f"--{name.removeprefix('ZSQDET_').lower()} DIR or {name}=DIR" for name in missing}
        raise UserError(*(f"{name}: not set; {option[name]}: {VARIABLES[name]}" for name in missing))


def prepare(names: Iterable[str], values: Mapping[str, str]) -> None:
    """Makes what is missing and can be made, and checks that all of it is there.

    Raises:
        UserError: a folder or file that is not there.
    """
    for name in dict.fromkeys(names):
        found = SETS[name]
        annotations = Path(expand(found.annotations or found.images, values))
        if found.make and not annotations.exists():
            found.make(values)
        for path in (Path(expand(found.images, values)), annotations):
            if not path.exists():
                raise UserError(f"{name}: {path} does not exist; see tools/README.md for where sets come from")
