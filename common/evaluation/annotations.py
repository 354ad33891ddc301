"""A detection set in COCO format, checked before anything is computed."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from common.config.schema import DataConfig
from common.detection.coco_json import CocoFile, read_coco
from common.detection.coco_mistakes import Mistakes, short
from common.runtime.errors import UserError

log = logging.getLogger("zsqdet")


@dataclass(frozen=True)
class CocoSet:
    """Images and annotations; `category_ids[c]` is the category of the detector's class c, None where it has none."""

    coco: CocoFile
    has_masks: bool  # of every object, and masks are wanted
    files: list[Path]
    image_ids: list[int]
    sizes: list[tuple[int, int]]  # height, width
    category_ids: list[int | None]


def read_set(data: DataConfig, class_names: Sequence[str], masks: bool = False) -> CocoSet:
    """Reads the annotations and finds the images.

    Args:
        data: the set; both of its keys are given.
        class_names: the detector's.
        masks: whether the detector gives masks; without, segmentations are not looked at.

    Raises:
        UserError: a line for each mistake of the annotations or missing image; nothing to measure; other classes.
    """
    assert data.images is not None
    assert data.annotations is not None
    coco = read_coco(data.annotations, masks=masks, files=True, to_score=True)
    categories = _categories(coco, class_names)
    if all(row["iscrowd"] for row in coco.annotations):
        raise UserError(
            f"{coco.path}: every object has 'iscrowd' 1, and crowds do not count; there is nothing to measure"
        )
    with_masks = sum("segmentation" in row for row in coco.annotations)
    if 0 < with_masks < len(coco.annotations):
        counts = f"{with_masks} of {len(coco.annotations)}"
        log.warning("%s: %s objects have a segmentation; boxes alone are measured", coco.path, counts)
    return CocoSet(
        coco,
        with_masks == len(coco.annotations),
        find_files(coco, data.images),
        [image["id"] for image in coco.images],
        [(image["height"], image["width"]) for image in coco.images],
        categories,
    )


def find_files(coco: CocoFile, folder: Path) -> list[Path]:
    """The file of each image: its `file_name` in `folder`, or what is left of it without its own first folders.

    Raises:
        UserError: a name that leads out of the folder, two names of one file, or images that are missing.
    """
    mistakes = Mistakes(coco.path)
    files: list[Path] = []
    missing: list[str] = []
    first: dict[Path, int] = {}
    for i, image in enumerate(coco.images):
        name = image["file_name"]
        parts = PurePosixPath(name.replace("\\", "/")).parts
        if PurePosixPath(name).is_absolute() or ".." in parts:
            mistakes.add(f"images[{i}].file_name", short(name), "a path inside the folder of the images (data.images)")
            continue
        candidates = [folder / name, *(folder.joinpath(*parts[k:]) for k in range(len(parts)))]
        file = next((path for path in candidates if _is_file(path)), None)
        if file is None:
            missing.append(name)
            continue
        known = first.setdefault(file, i)
        if known != i:
            mistakes.add(
                f"images[{i}].file_name", short(name), f"a file of its own; images[{known}] has {file} as well"
            )
        files.append(file)
    mistakes.stop()
    if missing:
        raise UserError(
            f"data.images: {len(missing)} of the {len(coco.images)} images of {coco.path} are not in {folder}, "
            f"the first is {missing[0]}; give the folder that holds them"
        )
    return files


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that is too long
        return False


def _categories(coco: CocoFile, class_names: Sequence[str]) -> list[int | None]:
    """Classes are found by name; where no name is known but the numbers are equal, by their order.

    A category of another name that no object has, a root or a background, is left out.
    """
    by_name = {category["name"]: category["id"] for category in coco.categories}
    used = {row["category_id"] for row in coco.annotations}
    with_objects = {name: id_ for name, id_ in by_name.items() if id_ in used or name in class_names}
    for names in (by_name, with_objects):
        unknown = [name for name in names if name not in class_names]
        if not unknown:
            return [names.get(name) for name in class_names]
        if len(names) == len(class_names) and len(unknown) == len(names):
            log.warning("%s: other class names than the detector's; taken in the order of their ids", coco.path)
            return [*sorted(names.values())]
    raise UserError(
        f"{coco.path}: {len(by_name)} categories, of which {unknown[0]!r} is none of the detector's {len(class_names)} "
        f"classes ({class_names[0]}, ...); evaluate on a set with the detector's classes"
    )
