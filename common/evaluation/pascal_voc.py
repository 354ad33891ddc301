"""Pascal VOC: a folder of Annotations/*.xml and JPEGImages/, as COCO annotations.

VOC's corners are 1-based and inclusive, COCO's boxes 0-based: x = xmin - 1, width = xmax - xmin + 1. Difficult objects
become `iscrowd`, so that they and detections on them do not count, as in VOC's own evaluation.
"""

import logging
import math
import os
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree
from xml.parsers import expat

from common.detection.coco_mistakes import Mistakes, short
from common.runtime.errors import UserError
from common.runtime.files import open_ordinary, read_plainly
from common.runtime.image_files import SUFFIXES, image_size

log = logging.getLogger("zsqdet")
ANNOTATIONS, IMAGES, SETS = "Annotations", "JPEGImages", "ImageSets/Main"
MOST_BYTES, DEEPEST = 10_000_000, 20  # of an XML file: VOC's have a few thousand bytes and four levels
COLUMN = re.compile(r"\s+(-1|0|1)$")  # of a list for one class: whether the image has it
NUMBER = re.compile(r"[+-]?[0-9.]+(e[+-]?[0-9]+)?", re.IGNORECASE)
CORNERS = ("xmin", "ymin", "xmax", "ymax")


def check_voc(folder: Path, split: str) -> None:
    """Whether the folders and the list of the split are there.

    Raises:
        UserError: something is missing; says what was looked for.
    """
    missing = [name for name in (ANNOTATIONS, IMAGES) if not (folder / name).is_dir()]
    if missing:
        raise UserError(
            f"data: {folder}: found no {' and no '.join(missing)} in it; a folder of Pascal VOC, as VOCdevkit/VOC2007, "
            f"has {ANNOTATIONS}/*.xml and {IMAGES}/; of an Ultralytics set give the data.yaml"
        )
    sets = folder / SETS
    if sets.is_dir() and not (sets / f"{split}.txt").is_file():
        there = ", ".join(sorted(p.stem for p in sets.glob("*.txt") if "_" not in p.stem)) or "none"
        raise UserError(f"data.split: found {split}, but {sets / split}.txt does not exist; there are: {there}")


def read_voc(folder: Path, split: str) -> dict[str, Any]:
    """The COCO annotations of a split; without a folder ImageSets, of all annotations.

    The classes are those that objects have, by name. `file_name` is an absolute path.

    Raises:
        UserError: a line for each mistake.
    """
    check_voc(folder, split)
    folder = folder.absolute()
    names = _listed(folder, split)
    mistakes = Mistakes()
    images: list[dict[str, Any]] = []
    objects: list[tuple[str, dict[str, Any]]] = []
    for number, name in enumerate(names, 1):
        path = folder / ANNOTATIONS / f"{name}.xml"
        try:
            root = _parse(path)
            image = _image(folder / IMAGES, name, root)
        except (UserError, OSError, ValueError) as error:
            mistakes.add(str(path), str(error), f"an annotation of Pascal VOC, and its image in {IMAGES}")
            continue
        _check_size(path, root, image, mistakes)
        images.append({"id": number} | image)
        objects += [(label, row | {"image_id": number}) for label, row in _objects(path, root, image, mistakes)]
    mistakes.stop()
    ids = {label: i for i, label in enumerate(sorted({label for label, _ in objects}), 1)}
    annotations = [{"id": i, "category_id": ids[label]} | row for i, (label, row) in enumerate(objects, 1)]
    categories = [{"id": i, "name": label} for label, i in ids.items()]
    return {"images": images, "annotations": annotations, "categories": categories}


def _listed(folder: Path, split: str) -> list[str]:
    """Names of the annotations; of lists for one class, with 1 or -1 behind each name, the names alone."""
    sets = folder / SETS
    if not sets.is_dir():
        log.info("%s: has no %s; all of its annotations count", folder, SETS)
        return sorted(path.stem for path in (folder / ANNOTATIONS).glob("*.xml"))
    path = sets / f"{split}.txt"
    try:
        lines = [line.strip() for line in read_plainly(path).splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); give a list with a name in each line") from error
    place = f"{folder / ANNOTATIONS}/"
    names = [line if os.path.isfile(f"{place}{line}.xml") else COLUMN.sub("", line) for line in lines]
    wrong = next((name for name in names if "/" in name or "\0" in name or name == ".."), None)
    if not names or wrong:
        raise UserError(f"{path}: found {short(wrong or names)}; allowed is the name of an annotation in each line")
    return list(dict.fromkeys(names))


def _parse(path: Path) -> ElementTree.Element:
    """The elements without their attributes; nothing is fetched or expanded.

    Raises:
        OSError: it cannot be read.
        ValueError: not XML, with a document type (and so with entities), too large or too deep.
    """
    with open_ordinary(path) as stream:
        content = stream.read(MOST_BYTES + 1)
    if len(content) > MOST_BYTES:
        raise ValueError(f"more than {MOST_BYTES} bytes")
    builder, parser, depth = ElementTree.TreeBuilder(), expat.ParserCreate(), 0

    def refuse(*_: object) -> None:
        raise ValueError("a document type, whose entities are not read")

    def start(tag: str, _: object) -> None:
        nonlocal depth
        depth += 1
        if depth > DEEPEST:
            raise ValueError(f"elements more than {DEEPEST} levels deep")
        builder.start(tag, {})

    def end(tag: str) -> None:
        nonlocal depth
        depth -= 1
        builder.end(tag)

    parser.StartDoctypeDeclHandler = refuse
    parser.StartElementHandler, parser.EndElementHandler, parser.CharacterDataHandler = start, end, builder.data
    try:
        parser.Parse(content, True)
    except (expat.ExpatError, LookupError) as error:  # LookupError: an encoding that there is not, or of no text
        raise ValueError(f"no XML ({error})") from error
    root = builder.close()
    if root.tag != "annotation":
        raise ValueError(f"the root {short(root.tag)}, where `annotation` is needed")
    odd = [child.tag for child in root if child.tag != "object" and child.tag.rpartition(":")[2].lower() == "object"]
    if odd:
        raise ValueError(f"an element {short(odd[0])}, where objects are called `object`")
    return root


def _text(entry: ElementTree.Element, *keys: str) -> str:
    """The text of the element below `entry` with these keys; empty where there is none.

    Raises:
        ValueError: an element twice, or with elements in it.
    """
    for key in keys:
        found = entry.findall(key)
        if not found:
            return ""
        if len(found) > 1:
            raise ValueError(f"{key} {len(found)} times")
        entry = found[0]
    if len(entry):
        raise ValueError(f"elements within {keys[-1]}")
    return (entry.text or "").strip()


def _image(folder: Path, name: str, root: ElementTree.Element) -> dict[str, Any]:
    """The image of the annotation's own name, or else of the name in it."""
    stated = _text(root, "filename")
    candidates = [f"{name}{suffix}" for suffix in (".jpg", *sorted(SUFFIXES), ".JPG", ".JPEG", ".PNG")]
    candidates += [stated] * ("/" not in stated and stated not in ("", "..") and "\0" not in stated)
    file = next((folder / candidate for candidate in candidates if (folder / candidate).is_file()), None)
    if file is None:
        raise ValueError(f"no image {folder / name}.jpg")
    height, width = image_size(file)
    return {"file_name": str(file), "width": width, "height": height}


def _check_size(path: Path, root: ElementTree.Element, image: dict[str, Any], mistakes: Mistakes) -> None:
    """Boxes of another size are of another image; 0 or nothing stands for a size that was not noted."""
    for key in ("width", "height"):
        try:
            stated = _text(root, "size", key)
        except ValueError as error:
            mistakes.add(f"{path}: size", str(error), "each element once, with text alone")
            continue
        if stated not in ("", "0", str(image[key])):
            mistakes.add(f"{path}: size/{key}", short(stated), f"{image[key]}, that of {image['file_name']}")


def _objects(
    path: Path, root: ElementTree.Element, image: dict[str, Any], mistakes: Mistakes
) -> list[tuple[str, dict[str, Any]]]:
    """Class and row of each object; mistakes are noted with its number."""
    found = []
    for number, entry in enumerate(root.findall("object"), 1):
        place = f"{path}: object {number}"
        try:
            label, difficult = _text(entry, "name"), _text(entry, "difficult") or "0"
            texts = [_text(entry, "bndbox", key) for key in CORNERS]
        except ValueError as error:
            mistakes.add(place, str(error), "each element once, with text alone")
            continue
        try:
            left, top, right, bottom = (float(text) if NUMBER.fullmatch(text) else math.nan for text in texts)
        except ValueError:
            left = top = right = bottom = math.nan
        box = [left - 1, top - 1, right - left + 1, bottom - top + 1]
        if not label:
            mistakes.add(f"{place}: name", "nothing", "the name of a class")
        if not all(map(math.isfinite, box)) or min(box[2:]) < 0:
            mistakes.add(f"{place}: bndbox", short(texts), f"pixels {', '.join(CORNERS)}, finite, max not below min")
        elif right < 1 or bottom < 1 or left > image["width"] or top > image["height"]:
            size = f"{image['width']} x {image['height']}"
            mistakes.add(f"{place}: bndbox", short(texts), f"pixels of which some lie in the image of {size}")
        if difficult not in ("0", "1"):
            mistakes.add(f"{place}: difficult", short(difficult), "0 or 1")
        row = {"bbox": box, "area": box[2] * box[3], "iscrowd": int(difficult == "1")}
        found.append((label, row))
    return found
