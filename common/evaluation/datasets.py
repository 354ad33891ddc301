"""Sets to evaluate on: those that people have, converted once to COCO annotations, and those read and checked.

`data` names a data.yaml of Ultralytics, a folder of Pascal VOC, or a COCO file and its images.
"""

import functools
import hashlib
import json
import logging
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from common.config.schema import DataConfig
from common.detection.coco_json import CocoFile, read_coco
from common.detection.coco_mistakes import Mistakes, short
from common.evaluation.pascal_voc import check_voc, read_voc
from common.evaluation.yolo_labels import read_yolo, read_yolo_yaml
from common.runtime.errors import UserError
from common.runtime.files import atomic, lock

log = logging.getLogger("zsqdet")
YAML = (".yaml", ".yml")
NAMED = 5  # classes in a message


def check_data(data: DataConfig) -> None:
    """Finds mistakes that show without reading a label or an image, so that they come before hours of work.

    Raises:
        UserError: a path that does not exist or is of another kind, a data.yaml with mistakes.
    """
    if data.dataset is not None:
        if _is_yaml(data.dataset):
            read_yolo_yaml(data.dataset, data.split)
        else:
            check_voc(data.dataset, data.split)
    given = {"data.images": data.images, "data.annotations": data.annotations}
    for key, path in given.items():
        if path is None:
            continue
        if not path.exists():
            raise UserError(f"{key}: found {path}, which does not exist; relative paths are relative to {Path.cwd()}")
        if path.is_dir() != (key == "data.images"):
            is_a, needed = ("a folder", "COCO JSON file") if path.is_dir() else ("a file", "folder of the images")
            raise UserError(f"{key}: found {path}, {is_a}; give the {needed}")


def as_coco(data: DataConfig, folder: Path) -> DataConfig:
    """`data` with `images` and `annotations`, what `dataset` names being written as a COCO file into `folder`.

    The name of that file holds the hash of its content: the same set makes the same file, changed labels another one.

    Raises:
        UserError: a line for each mistake of the labels.
    """
    if data.dataset is None:
        return data
    read = read_yolo if _is_yaml(data.dataset) else read_voc
    content = read(data.dataset, data.split)
    rows = content["images"]
    if not content["annotations"]:
        raise UserError(f"{data.dataset}: {data.split}: {len(rows)} images without any object; nothing to measure")
    root = Path(os.path.commonpath([os.path.dirname(row["file_name"]) for row in rows]))
    for row in rows:
        row["file_name"] = os.path.relpath(row["file_name"], root)
    file = _write(content, folder, data)
    return data.model_copy(update={"images": root, "annotations": file})


def _is_yaml(path: Path) -> bool:
    """Whether it is read as a data.yaml; otherwise as a folder of Pascal VOC.

    Raises:
        UserError: it does not exist, or is neither.
    """
    if not path.exists():
        raise UserError(f"data: found {path}, which does not exist; relative paths are relative to {Path.cwd()}")
    if not path.is_dir() and path.suffix.lower() not in YAML:
        raise UserError(
            f"data: found {path}; allowed are a data.yaml of Ultralytics and a folder of Pascal VOC; "
            "a COCO file goes with its images: data.images=DIR data.annotations=FILE"
        )
    return not path.is_dir()


def _write(content: dict[str, Any], folder: Path, data: DataConfig) -> Path:
    text = json.dumps(content)
    assert data.dataset is not None
    name = f"{data.dataset.resolve().stem}-{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"
    with lock(folder):
        file = folder / name
        if not file.is_file() or file.read_bytes() != text.encode():  # none, or a damaged one
            with atomic(file) as temporary:
                temporary.write_text(text, encoding="utf-8")
            counts = f"{len(content['images'])} images, {len(content['annotations'])} objects"
            log.info("%s: %s: %s, converted to %s", data.dataset, data.split, counts, file)
    return file


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
    categories = _categories(coco, class_names, data)
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
        if "://" in missing[0]:
            raise UserError(
                f"{coco.path}: {len(missing)} images are addresses, the first is {short(missing[0])}; nothing is "
                "fetched: download them, and name the files"
            )
        raise UserError(
            f"data.images: {len(missing)} of the {len(coco.images)} images of {coco.path} are not in {folder}, "
            f"the first is {missing[0]}; give the folder that holds them"
        )
    return files


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except PermissionError:  # told as what it is
        raise
    except OSError:  # a name that is too long
        return False


def _categories(coco: CocoFile, class_names: Sequence[str], data: DataConfig) -> list[int | None]:
    """Classes are found by name; where no name is known but the numbers are equal, by their order.

    A category of another name that no object has, a root or a background, is left out. One that objects have is
    refused: no detection could be right, and the mean over classes would count a 0 for it.
    """
    where = data.dataset or coco.path
    ids = _by_name(coco, class_names)
    used = {row["category_id"] for row in coco.annotations}
    with_objects = {name: id_ for name, id_ in ids.items() if id_ in used or name in class_names}
    for names in (ids, with_objects):
        unknown = [name for name in names if name not in class_names]
        if not unknown:
            _say_unmatched(where, ids, names, class_names)
            return [names.get(name) for name in class_names]
        # The classes of Pascal VOC have no numbers, so no order.
        ordered = data.dataset is None or not data.dataset.is_dir()
        if ordered and len(names) == len(class_names) and len(unknown) == len(names):
            log.warning("%s: other class names than the detector's; taken in the order of their ids", where)
            return [*sorted(names.values())]
    raise UserError(
        f"{where}: {len(ids)} categories, of which {_some(unknown)} {'is' if len(unknown) == 1 else 'are'} none of the "
        f"detector's {len(class_names)} classes ({class_names[0]}, ...); evaluate on a set with the detector's classes"
    )


def _by_name(coco: CocoFile, class_names: Sequence[str]) -> dict[str, int]:
    """Ids of the categories, by the detector's name where they differ from one in case, spaces or underscores alone."""
    given = [category["name"] for category in coco.categories]
    known, plain = Counter(map(_plain, class_names)), Counter(map(_plain, given))
    of_detector = {_plain(name): name for name in class_names if known[_plain(name)] == 1}
    ids = {}
    for category in coco.categories:
        name = category["name"]
        if name not in class_names and plain[_plain(name)] == 1:
            name = of_detector.get(_plain(name), name)
        ids[name] = category["id"]
    return ids


def _plain(name: str) -> str:
    return " ".join(name.replace("_", " ").replace("-", " ").casefold().split())


@functools.cache  # once, not again for each detector of a run
def _say(line: str) -> None:
    log.info(line)


def _say_unmatched(where: Path, ids: Mapping[str, int], names: Mapping[str, int], class_names: Sequence[str]) -> None:
    """What does not match and does no harm."""
    without = [name for name in ids if name not in names]
    if without:
        _say(f"{where}: no object has {_some(without)}, unknown to the detector; left out")
    more = [name for name in class_names if name not in names]
    if more:
        _say(f"{where}: has not the detector's {_some(more)}; such detections are left out")


def _some(names: Sequence[str]) -> str:
    """Names for a message, the first of many."""
    return ", ".join(map(short, names[:NAMED])) + f" and {len(names) - NAMED} more" * (len(names) > NAMED)
