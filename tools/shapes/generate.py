"""Writes a COCO dataset of drawn shapes: python -m tools.shapes.generate OUT --images 200 --size 192 --seed 2."""

import argparse
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from pycocotools import mask as rle

from common.runtime.errors import UserError
from common.runtime.files import write_json
from tools.shapes.draw import Shape, draw_image
from tools.shapes.outlines import CLASS_NAMES

IMAGE_SIZE = 192


def generate(directory: Path, num_images: int, image_size: int = IMAGE_SIZE, seed: int = 2) -> Path:
    """Writes `images/000000.png`, ... and `annotations.json` (COCO, category id = class index + 1) into `directory`.

    Boxes and masks (RLE) cover the visible pixels. Image i depends on the seed, the size and i alone.

    Returns:
        The path of the annotations.

    Raises:
        UserError: the folder is not empty, or a number is out of range.
    """
    if num_images < 1 or image_size < 64 or seed < 0:
        raise UserError(f"images {num_images}, size {image_size}, seed {seed}: allowed are >= 1, >= 64 and >= 0")
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise UserError(f"{directory}: exists and is not an empty folder; name a new one, or remove it first")
    (directory / "images").mkdir(parents=True)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for i in range(num_images):
        image, shapes = draw_image(image_size, np.random.default_rng([seed, i]))
        name = f"{i:06d}.png"
        cv2.imwrite(str(directory / "images" / name), cv2.cvtColor(image, cv2.COLOR_RGB2BGR))
        images.append({"id": i + 1, "file_name": name, "width": image_size, "height": image_size})
        annotations += [_annotation(shape, i + 1, len(annotations) + n) for n, shape in enumerate(shapes, 1)]
    categories = [{"id": i, "name": name, "supercategory": "shape"} for i, name in enumerate(CLASS_NAMES, 1)]
    info = {"description": "drawn shapes", "seed": seed}
    coco = {"info": info, "images": images, "annotations": annotations, "categories": categories}
    write_json(directory / "annotations.json", coco)
    return directory / "annotations.json"


def box(shape: Shape) -> tuple[int, int, int, int]:
    """The tight box of the visible pixels, xyxy, right and bottom exclusive."""
    columns, rows = np.flatnonzero(shape.mask.any(0)), np.flatnonzero(shape.mask.any(1))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def _annotation(shape: Shape, image_id: int, annotation_id: int) -> dict[str, Any]:
    x1, y1, x2, y2 = box(shape)
    encoded = rle.encode(np.asfortranarray(shape.mask, np.uint8))
    return {
        "id": annotation_id,
        "image_id": image_id,
        "category_id": shape.label + 1,
        "bbox": [x1, y1, x2 - x1, y2 - y1],
        "area": int(shape.mask.sum()),
        "segmentation": {"size": encoded["size"], "counts": encoded["counts"].decode("ascii")},
        "iscrowd": 0,
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.shapes.generate", description="Draws a COCO set of shapes.")
    parser.add_argument("out", type=Path, help="a new or empty folder")
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--size", type=int, default=IMAGE_SIZE, help="pixels, square (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=2, help="default: %(default)s; the weights were trained on 1")
    arguments = parser.parse_args()
    try:
        annotations = generate(arguments.out, arguments.images, arguments.size, arguments.seed)
    except UserError as error:
        sys.exit(f"error: {error}")
    print(f"{arguments.images} images and {annotations}")


if __name__ == "__main__":
    main()
