"""Writes a COCO dataset of drawn shapes: python -m tools.shapes.generate OUT --images 200 --size 192 --seed 2.

An image is a textured background with overlapping textured shapes, mildly blurred and noisy. Outlines are centred and
within the unit circle.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from pycocotools import mask as rle

from common.runtime.errors import Parser, UserError
from common.runtime.files import write_json

Contour = NDArray[np.float64]  # [points, 2], xy

SMALLEST = 12  # pixels across
VISIBLE = 0.45  # minimum visible fraction of a shape; a shape that would occlude more is skipped
EMPTY, CROWDED = 0.06, 0.3  # fractions of the images

Image = NDArray[np.uint8]  # [S, S, 3] RGB
Plane = NDArray[Any]  # float32

MOST_IMAGES, LARGEST = 1_000_000, 4096
IMAGE_SIZE = 192


def _arc(start: float, stop: float, points: int = 48, radius: float = 1.0, x: float = 0.0) -> Contour:
    angles = np.linspace(np.radians(start), np.radians(stop), points)
    return np.stack([x + radius * np.cos(angles), radius * np.sin(angles)], -1)


def _star() -> Contour:
    radius = np.where(np.arange(10) % 2 == 0, 1.0, 0.42)[:, None]
    return _arc(0, 324, 10) * radius


def _heart() -> Contour:
    t = np.linspace(0, 2 * np.pi, 64, endpoint=False)
    x = 16 * np.sin(t) ** 3
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return np.stack([x, y + 2.5], -1) / 17


def _crescent() -> Contour:
    """A unit disc less the disc of radius .8 at (.55, 0); both circles meet at x = .602."""
    ends = np.degrees(np.arccos([0.602, (0.602 - 0.55) / 0.8]))
    return np.concatenate([_arc(ends[0], 360 - ends[0]), _arc(360 - ends[1], ends[1], radius=0.8, x=0.55)])


def _points(*xy: tuple[float, float]) -> Contour:
    return np.array(xy, np.float64)


# A second contour is a hole.
OUTLINES: dict[str, tuple[Contour, ...]] = {
    "circle": (_arc(0, 360),),
    "triangle": (_arc(0, 240, 3),),
    "square": (_arc(45, 315, 4),),
    "star": (_star(),),
    "cross": (
        _points(
            *((1, 0.3), (0.3, 0.3), (0.3, 1), (-0.3, 1), (-0.3, 0.3), (-1, 0.3)),
            *((-1, -0.3), (-0.3, -0.3), (-0.3, -1), (0.3, -1), (0.3, -0.3), (1, -0.3)),
        ),
    ),
    "ring": (_arc(0, 360), _arc(0, 360, radius=0.55)),
    "heart": (_heart(),),
    "arrow": (_points((1, 0), (0.15, 0.75), (0.15, 0.28), (-1, 0.28), (-1, -0.28), (0.15, -0.28), (0.15, -0.75)),),
    "crescent": (_crescent(),),
    "bolt": (_points((0.35, 1), (-0.6, 0), (-0.08, -0.05), (-0.35, -1), (0.6, 0.1), (0.08, 0.15)),),
}
CLASS_NAMES = tuple(OUTLINES)


@dataclass
class Shape:
    """A drawn shape: its class index, and its visible pixels."""

    label: int
    mask: NDArray[np.bool_]  # [S, S]
    full_area: float  # pixels, without occlusion and truncation

    @property
    def visible(self) -> float:
        """Visible fraction of the shape, 0 to 1."""
        return float(self.mask.sum()) / self.full_area


def draw_image(size: int, rng: Generator) -> tuple[Image, list[Shape]]:
    """Returns an image of `size` x `size` pixels and its shapes, back to front."""
    canvas = _texture(size, size, rng, contrast=rng.uniform(0.1, 0.7))
    shapes: list[Shape] = []
    for diameter in _diameters(size, rng):
        _add_shape(canvas, shapes, diameter, rng)
    return _finish(canvas, rng), shapes


def _diameters(size: int, rng: Generator) -> NDArray[np.float64]:
    """The sizes of the shapes to try, in pixels, large ones first so that they do not cover small ones."""
    kind = rng.random()
    if kind < EMPTY:
        return np.empty(0)
    if kind < EMPTY + CROWDED:
        diameters = np.exp(rng.uniform(np.log(SMALLEST), np.log(0.35 * size), rng.integers(8, 19)))
    else:
        diameters = rng.uniform(SMALLEST, 0.95 * size, rng.integers(1, 7))
    return np.sort(diameters)[::-1]


def _add_shape(canvas: Plane, shapes: list[Shape], diameter: float, rng: Generator) -> None:
    """Draws a random shape on `canvas`, unless it or a shape below would be mostly occluded."""
    size = len(canvas)
    label = int(rng.integers(len(CLASS_NAMES)))
    contours = _placed(OUTLINES[CLASS_NAMES[label]], diameter, size, rng)
    full_area = _area(contours[0]) - sum(_area(hole) for hole in contours[1:])
    alpha = np.zeros((size, size), np.uint8)
    fixed_point = [np.round(c * 16).astype(np.int32) for c in contours]
    cv2.fillPoly(alpha, fixed_point, 255, lineType=cv2.LINE_AA, shift=4)
    mask = alpha >= 128
    if mask.sum() < VISIBLE * full_area:
        return
    remaining = [s.mask & ~mask for s in shapes]
    if any(r.sum() < VISIBLE * s.full_area for r, s in zip(remaining, shapes, strict=True)):
        return
    for shape, rest in zip(shapes, remaining, strict=True):
        shape.mask = rest
    shapes.append(Shape(label, mask, full_area))
    _paint(canvas, alpha, mask, fixed_point, rng)


def _placed(outline: tuple[Contour, ...], diameter: float, size: int, rng: Generator) -> list[Contour]:
    """The outline in pixels: random aspect ratio, rotation, flip and position."""
    turn = rng.uniform(0, 2 * np.pi)
    rotation = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    ratio = np.exp(rng.uniform(-0.12, 0.12))
    stretch = np.array([ratio, rng.choice([-1.0, 1.0]) / ratio])
    centre = rng.uniform(0.03, 0.97, 2) * size
    return [(c * stretch) @ rotation.T * diameter / 2 + centre for c in outline]


def _area(contour: Contour) -> float:
    return float(cv2.contourArea(contour.astype(np.float32)))


def _paint(canvas: Plane, alpha: Image, mask: NDArray[np.bool_], contours: list[NDArray], rng: Generator) -> None:
    """Blends a texture that differs from what lies under it into `canvas`, sometimes with a line around."""
    x, y, w, h = cv2.boundingRect(alpha)
    patch = canvas[y : y + h, x : x + w]
    under = canvas[mask].mean(0)
    for _ in range(8):
        base = rng.uniform(0, 1, 3)
        if np.abs(base - under).mean() > 0.2:
            break
    texture = _texture(h, w, rng, contrast=rng.uniform(0, 0.45), base=base)
    if rng.random() < 0.3:
        line = np.zeros_like(alpha)
        thickness = 1 + int(np.sqrt(mask.sum()) / 30)
        cv2.polylines(line, contours, True, 255, thickness, cv2.LINE_AA, shift=4)
        texture += (rng.uniform(0, 1, 3).astype(np.float32) - texture) * _opacity(line[y : y + h, x : x + w])
    patch += (texture - patch) * _opacity(alpha[y : y + h, x : x + w])


def _opacity(alpha: Image) -> Plane:
    return alpha[..., None] / np.float32(255)


def _texture(h: int, w: int, rng: Generator, contrast: float, base: NDArray | None = None) -> Plane:
    """A pattern [h, w, 3] between the colour `base` and another one at most `contrast` away in each channel."""
    colour = rng.uniform(0, 1, 3) if base is None else base
    difference = contrast * rng.uniform(-1, 1, 3)
    field = _PATTERNS[rng.integers(len(_PATTERNS))](h, w, rng)
    return cv2.merge([field * np.float32(d) + np.float32(c) for c, d in zip(colour, difference, strict=True)])


def _coordinates(h: int, w: int, rng: Generator) -> tuple[Plane, Plane]:
    turn = rng.uniform(0, np.pi)
    x, y = np.arange(w, dtype=np.float32)[None], np.arange(h, dtype=np.float32)[:, None]
    cos, sin = np.float32(np.cos(turn)), np.float32(np.sin(turn))
    return x * cos + y * sin, y * cos - x * sin


def _flat(h: int, w: int, rng: Generator) -> Plane:
    return np.full((h, w), rng.uniform(), np.float32)


def _gradient(h: int, w: int, rng: Generator) -> Plane:
    along, _ = _coordinates(h, w, rng)
    return (along - along.min()) / max(float(np.ptp(along)), 1.0)


def _stripes(h: int, w: int, rng: Generator) -> Plane:
    along, _ = _coordinates(h, w, rng)
    wave = np.sin(along * np.float32(2 * np.pi / rng.uniform(4, 32)))
    return 0.5 + 0.5 * np.clip(wave * np.float32(rng.uniform(1, 4)), -1, 1)


def _checks(h: int, w: int, rng: Generator) -> Plane:
    along, across = _coordinates(h, w, rng)
    side = np.float32(rng.uniform(4, 24))
    return ((np.floor(along / side) + np.floor(across / side)) % 2).astype(np.float32)


def _clouds(h: int, w: int, rng: Generator) -> Plane:
    cell = rng.uniform(2, 24)
    noise = rng.random((int(h / cell) + 2, int(w / cell) + 2), np.float32)
    return cv2.resize(noise, (w, h), interpolation=cv2.INTER_CUBIC)


_PATTERNS = (_flat, _gradient, _gradient, _stripes, _checks, _clouds, _clouds)


def _finish(canvas: Plane, rng: Generator) -> Image:
    if rng.random() < 0.3:
        canvas = cv2.GaussianBlur(canvas, (0, 0), rng.uniform(0.4, 1.0))
    if rng.random() < 0.5:
        canvas = canvas + rng.standard_normal(canvas.shape, np.float32) * np.float32(rng.uniform(0.0, 0.05))
    return np.clip(canvas * 255 + 0.5, 0, 255).astype(np.uint8)


def generate(directory: Path, num_images: int, image_size: int = IMAGE_SIZE, seed: int = 2) -> Path:
    """Writes `images/000000.png`, ... and `annotations.json` (COCO, category id = class index + 1) into `directory`.

    Boxes and masks (RLE) cover the visible pixels. Image i depends on the seed, the size and i alone.

    Returns:
        The path of the annotations.

    Raises:
        UserError: the folder is not empty, or a number is out of range.
    """
    if not (1 <= num_images <= MOST_IMAGES and 64 <= image_size <= LARGEST and seed >= 0):
        raise UserError(
            f"images {num_images}, size {image_size}, seed {seed}: allowed are 1 to {MOST_IMAGES}, 64 to {LARGEST} "
            "pixels, and seeds from 0"
        )
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


def main() -> int:
    parser = Parser(prog="python -m tools.shapes.generate", description="Draws a COCO set of shapes.")
    parser.add_argument("out", type=Path, help="a new or empty folder")
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--size", type=int, default=IMAGE_SIZE, help="pixels, square (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=2, help="default: %(default)s; the weights were trained on 1")
    arguments = parser.parse_args()
    try:
        annotations = generate(arguments.out, arguments.images, arguments.size, arguments.seed)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{arguments.images} images and {annotations}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
