"""Ultralytics' sets: a data.yaml and a text file of labels for each image, as COCO annotations.

A line of a label file is `class x_center y_center width height` or `class x1 y1 x2 y2 x3 y3 ...`, coordinates as
fractions of the image. The file stands where the image does with the last /images/ of the path as /labels/.
"""

import logging
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.config.yaml_text import parse_yaml, read_text
from common.detection.coco_mistakes import NOTHING, Mistakes, short
from common.runtime.errors import UserError
from common.runtime.files import read_plainly
from common.runtime.image_files import SUFFIXES, find_images, image_size

log = logging.getLogger("zsqdet")
MOST_CLASSES = 100_000
ALIASES = {"val": ("val", "validation", "valid")}
COLUMNS = "`class x_center y_center width height`, or `class x1 y1 x2 y2 x3 y3 ...` of an outline"
DECIMALS = 3  # of lengths in pixels: those of detections, and more than label files have


@dataclass(frozen=True)
class YoloYaml:
    """A checked data.yaml; `sources` are folders or lists of images, `roots` what relative paths are relative to."""

    names: list[str]
    sources: list[Path]
    roots: list[Path]


def read_yolo_yaml(path: Path, split: str) -> YoloYaml:
    """Reads a data.yaml and finds the images of a split. `download` is never followed.

    Raises:
        UserError: a line for each mistake.
    """
    try:
        values, twice = parse_yaml(read_text(path), numbers=True)
    except UserError as error:
        text = str(error)
        raise UserError(text if text.startswith(str(path)) else f"{path}: {text}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: found {short(values)}; allowed are the lines of a data.yaml: path, train, val, names")
    mistakes = Mistakes(path)
    for line in twice:
        mistakes.add(line.partition(":")[0], "it twice", "each key once")
    if "kpt_shape" in values:
        mistakes.add("kpt_shape", short(values["kpt_shape"]), "sets of boxes or outlines, not of poses")
    names = _names(values, mistakes)
    roots = _roots(path, values, mistakes)
    sources = list(_sources(values, split, roots, mistakes))
    mistakes.stop()
    if values.get("download"):
        log.info("%s: `download` is not followed", path)
    return YoloYaml(names, sources, roots)


def _names(values: dict[str, Any], mistakes: Mistakes) -> list[str]:
    """The names of the classes; without any they are class_0, class_1, ..., as Ultralytics calls them."""
    found, count = values.get("names"), values.get("nc")
    if count is not None and (type(count) is not int or not 1 <= count <= MOST_CLASSES):
        mistakes.add("nc", short(count), f"the number of classes, 1 to {MOST_CLASSES}")
        count = None
    if found is None:
        if count is None:
            mistakes.add("names", NOTHING, "a list of the classes' names, or their number as `nc`")
        return [f"class_{i}" for i in range(count or 0)]
    if isinstance(found, dict):
        keys = [int(key) if str(key).isdecimal() else key for key in found]
        if sorted(map(str, keys)) != sorted(str(i) for i in range(len(found))):
            mistakes.add("names", short(list(found)), "the numbers 0, 1, 2, ... as keys, none left out")
            return []
        found = [name for _, name in sorted(zip(keys, found.values(), strict=True))]
    if not isinstance(found, list) or not found:
        mistakes.add("names", short(found), "a list of names, or numbers with a name each")
        return []
    names = []
    for i, name in enumerate(found):
        if isinstance(name, bool) or not isinstance(name, str | int) or not str(name).strip():
            mistakes.add(f"names[{i}]", short(name), "a text; quote it")
        names.append(str(name))
    if len(set(names)) < len(names):
        again = next(name for i, name in enumerate(names) if name in names[:i])
        mistakes.add("names", f"{short(again)} twice", "each name once")
    if count is not None and count != len(names):
        mistakes.add("nc", f"{count}, but {len(names)} names", "the same number, or no `nc`")
    return names


def _roots(path: Path, values: dict[str, Any], mistakes: Mistakes) -> list[Path]:
    """What relative paths may be relative to: `path` beside the file or in the current directory."""
    base = values.get("path")
    if base is not None and not isinstance(base, str):
        mistakes.add("path", short(base), "a folder")
        base = None
    places = (path.parent, Path.cwd())
    return list(dict.fromkeys(Path(os.path.abspath(place / (base or ""))) for place in places))


def _sources(values: dict[str, Any], split: str, roots: list[Path], mistakes: Mistakes) -> Iterator[Path]:
    entry = next((values[name] for name in ALIASES.get(split, (split,)) if values.get(name)), None)
    entries = entry if isinstance(entry, list) else [entry]
    texts = [item for item in entries if isinstance(item, str) and item]
    if not entries or len(texts) < len(entries):
        there = [name for name in ("train", *ALIASES["val"], "test") if values.get(name)]
        others = "" if split in there else ", ".join(there)
        hint = f"; the file has {others}, which data.split=NAME chooses" if others else ""
        mistakes.add(split, NOTHING if entry is None else short(entry), f"a folder of images, a .txt list{hint}")
        return
    for item in texts:
        # Sets that were packed elsewhere have ../valid/images where valid/images is meant, as Ultralytics knows.
        shorter = [item[3:]] if item.startswith("../") else []
        places = list(dict.fromkeys(Path(os.path.abspath(root / name)) for name in [item, *shorter] for root in roots))
        found = next((place for place in places if place.exists()), None)
        if found is None:
            looked = " and ".join(map(str, places))
            mistakes.add(split, f"{short(item)}, which does not exist", f"a folder or a .txt list; looked for {looked}")
        else:
            yield found


def read_yolo(path: Path, split: str) -> dict[str, Any]:
    """The COCO annotations of a split; an image without a label file, or with an empty one, has no object.

    Category ids are the numbers of the classes, `file_name` is an absolute path.

    Raises:
        UserError: a line for each mistake of the data.yaml, or else of the label files.
    """
    about, mistakes = read_yolo_yaml(path, split), Mistakes()
    found: dict[str, Path] = {}  # an image that links lead to twice counts once
    for file in (file for source in about.sources for file in _images(source, about, mistakes)):
        found.setdefault(os.path.realpath(file), file)
    files = list(found.values())
    if not files:
        mistakes.add(
            f"{path}: {split}", "no image", f"image files ({', '.join(sorted(SUFFIXES))}) in {about.sources[0]}"
        )
    images, annotations, labelled, repeated = [], [], 0, 0
    for number, file in enumerate(files, 1):
        labels = _label_file(file)
        labelled += labels.exists()
        rows, again = _labels(labels, len(about.names), mistakes)
        repeated += again
        try:
            height, width = image_size(file)
        except UserError:
            mistakes.add(str(file), "no readable image", f"an image file ({', '.join(sorted(SUFFIXES))})")
            continue
        images.append({"id": number, "file_name": str(file), "width": width, "height": height})
        annotations += [_annotation(row, width, height) | {"image_id": number} for row in rows]
    if files and not labelled:
        mistakes.add(f"{path}: {split}", "no label file of any image", f"for the first one {_label_file(files[0])}")
    mistakes.stop()
    if labelled < len(files):
        log.info("%s: %d of %d images have no label file, so no object", path, len(files) - labelled, len(files))
    if repeated:
        log.warning("%s: %d objects stand in a label file twice; each counts once", path, repeated)
    annotations = [{"id": number} | row for number, row in enumerate(annotations, 1)]
    categories = [{"id": i, "name": name} for i, name in enumerate(about.names)]
    return {"images": images, "annotations": annotations, "categories": categories}


def _images(source: Path, about: YoloYaml, mistakes: Mistakes) -> Iterator[Path]:
    """The images of a folder, of all folders below it, or of a list in a text file."""
    if source.is_dir():
        yield from find_images(source)
        return
    try:
        lines = read_plainly(source).splitlines()
    except (OSError, ValueError) as error:
        mistakes.add(str(source), f"a file that cannot be read ({error})", "a folder, or a .txt list of images")
        return
    for number, line in enumerate(map(str.strip, lines), 1):
        if not line:
            continue
        places = [
            Path(os.path.abspath(root / line)) for root in dict.fromkeys((source.parent, *about.roots, Path.cwd()))
        ]
        found = next((place for place in places if place.is_file()), None)
        if found is None or found.suffix.lower() not in SUFFIXES:
            mistakes.add(f"{source}:{number}", short(line), f"an image file that exists; looked for {places[0]}")
        else:
            yield found


def _label_file(image: Path) -> Path:
    """Beside the path that was given; if nothing is there, beside what its links lead to."""
    paths = (_labels_of(path) for path in (image, Path(os.path.realpath(image))))
    first = next(paths)
    second = first if first.exists() else next(paths)
    return second if second.exists() else first


def _labels_of(image: Path) -> Path:
    before, images, after = str(image).rpartition("/images/")
    return Path(f"{before}/labels/{after}" if images else image).with_suffix(".txt")


def _labels(path: Path, classes: int, mistakes: Mistakes) -> tuple[list[list[float]], int]:
    """The lines of a label file, and how many stand there again."""
    try:
        lines = read_plainly(path).splitlines() if path.exists() else []
    except (OSError, ValueError) as error:
        mistakes.add(str(path), f"a file that cannot be read ({error})", "a text file of labels")
        return [], 0
    rows = []
    for number, line in enumerate(lines, 1):
        columns = line.split()
        if columns:
            row, found, allowed = _row(columns, classes)
            if allowed:
                mistakes.add(f"{path}:{number}", found, allowed)
            else:
                rows.append(row)
    unique = list(dict.fromkeys(map(tuple, rows)))
    return [list(row) for row in unique], len(rows) - len(unique)


def _row(columns: list[str], classes: int) -> tuple[list[float], str, str]:
    """The numbers of a line, what was found wrong, and what is allowed ("" if all is well)."""
    try:
        row = [float(column) for column in columns]
    except ValueError:
        row = []
    if not row or any("_" in column for column in columns):  # which Python takes for nothing between digits
        return [], short(" ".join(columns)), f"numbers: {COLUMNS}"
    if len(row) != 5 and (len(row) < 7 or len(row) % 2 == 0):
        return row, f"{len(row)} columns", COLUMNS
    if not (row[0].is_integer() and 0 <= row[0] < classes):
        return row, f"class {columns[0]}", f"a whole number from 0 to {classes - 1}"
    for column, value in zip(columns[1:], row[1:], strict=True):
        if not (math.isfinite(value) and 0 <= value <= 1):
            return row, f"coordinate {column}", "0 to 1, a fraction of the image"
    return row, "", ""


def _annotation(row: list[float], width: int, height: int) -> dict[str, Any]:
    """An object in pixels; the area of an outline is that inside it, as in COCO."""
    category, *values = row
    if len(values) == 4:
        x, y, w, h = (value * side for value, side in zip(values, (width, height) * 2, strict=True))
        box = [round(v, DECIMALS) for v in (x - w / 2, y - h / 2, w, h)]
        found: dict[str, Any] = {"bbox": box, "area": box[2] * box[3]}
    else:
        xs = [round(value * width, DECIMALS) for value in values[::2]]
        ys = [round(value * height, DECIMALS) for value in values[1::2]]
        box = [min(xs), min(ys), round(max(xs) - min(xs), DECIMALS), round(max(ys) - min(ys), DECIMALS)]
        twice = sum(xs[i - 1] * ys[i] - xs[i] * ys[i - 1] for i in range(len(xs)))
        outline = [value for point in zip(xs, ys, strict=True) for value in point]
        found = {"bbox": box, "area": abs(twice) / 2, "segmentation": [outline]}
    return {"category_id": int(category), "iscrowd": 0} | found
