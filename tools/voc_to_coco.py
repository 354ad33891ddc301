"""Converts Pascal VOC XML annotations to one COCO JSON file.

python -m tools.voc_to_coco data/voc/VOCdevkit/VOC2007 test data/voc/voc2007_test.json

VOC corners are 1-based and inclusive, COCO boxes 0-based: x = xmin - 1, width = xmax - xmin + 1. Difficult objects
become `iscrowd`, so that COCO evaluation ignores them and detections on them, as VOC evaluation does.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from tqdm import tqdm

from common.runtime.errors import UserError
from common.runtime.files import write_json
from tools.command import report

CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog"),
    *("horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)


def convert(year: Path, part: str) -> dict[str, Any]:
    """COCO annotations of one image set.

    Args:
        year: folder of one year: VOCdevkit/VOC2007.
        part: an image set of ImageSets/Main: train, val, trainval, test.

    Raises:
        UserError: no such image set, or a missing or invalid annotation.
    """
    names = year / "ImageSets" / "Main" / f"{part}.txt"
    if not names.is_file():
        raise UserError(
            f"{names}: does not exist; give the folder of one year (VOCdevkit/VOC2007) and one of its image sets"
        )
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number, name in enumerate(tqdm(names.read_text().split(), desc=part, disable=None), 1):
        image, boxes = _read(year / "Annotations" / f"{name}.xml")
        images.append({"id": number} | image)
        for row in boxes:
            annotations.append({"id": len(annotations) + 1, "image_id": number} | row)
    categories = [{"id": i, "name": name} for i, name in enumerate(CLASSES, 1)]
    return {"images": images, "annotations": annotations, "categories": categories}


def _read(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    try:
        root = ElementTree.parse(path).getroot()
        image: dict[str, Any] = {"file_name": _text(root, "filename")}
        image |= {key: int(_text(root, f"size/{key}")) for key in ("width", "height")}
        return image, list(_boxes(root))
    except (OSError, ElementTree.ParseError, ValueError) as error:
        raise UserError(f"{path}: not a Pascal VOC annotation ({error}); download the data again") from error


def _boxes(root: ElementTree.Element) -> Iterator[dict[str, Any]]:
    for entry in root.iter("object"):
        label = CLASSES.index(_text(entry, "name")) + 1
        left, top, right, bottom = (float(_text(entry, f"bndbox/{key}")) for key in ("xmin", "ymin", "xmax", "ymax"))
        box = [left - 1, top - 1, right - left + 1, bottom - top + 1]
        difficult = int(entry.findtext("difficult", "0"))
        yield {"category_id": label, "bbox": box, "area": box[2] * box[3], "iscrowd": difficult}


def _text(element: ElementTree.Element, path: str) -> str:
    found = element.findtext(path)
    if found is None:
        raise ValueError(f"no {path}")
    return found


def main(argv: list[str] | None = None) -> int:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m tools.voc_to_coco", description=__doc__, formatter_class=form)
    parser.add_argument("year", type=Path, help="folder of one year, VOCdevkit/VOC2007")
    parser.add_argument("part", help="image set: train, val, trainval, test")
    parser.add_argument("out", type=Path, help="COCO JSON file to write")
    return report(_make(parser.parse_args(argv)))


def _make(arguments: argparse.Namespace) -> Iterator[str]:
    if arguments.out.exists():
        raise UserError(f"{arguments.out}: exists; remove it first")
    content = convert(arguments.year, arguments.part)
    write_json(arguments.out, content)
    yield f"{arguments.out}: {len(content['images'])} images, {len(content['annotations'])} boxes"


if __name__ == "__main__":
    sys.exit(main())
