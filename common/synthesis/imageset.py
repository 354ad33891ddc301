"""A set of images on disk: ordinary PNG files and a COCO annotation file.

Real images (`source: real`) are not copied: set.json has their folder, `streamed_from`, and they are letterboxed when
they are read.

annotations.json is COCO with a row a line, so that the labels of an image are read when they are asked for: a set of
118,287 images needs a few megabytes of memory. Each row of `images` has the SHA-256 of its file, set.json has that of
annotations.json and of itself.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor

from common.detection.masks import decode, encode
from common.detection.types import Targets
from common.runtime.errors import UserError
from common.runtime.files import atomic, open_ordinary, read_checked_json, read_ordinary, sha256, write_checked_json
from common.runtime.image_files import GREY, SUFFIXES, decode_image
from common.synthesis.labels import letterbox

ANNOTATIONS, DESCRIPTION, IMAGES = "annotations.json", "set.json", "images"
WHITE = 65535  # the largest code of 16 bits
READERS = 8  # threads that decode the images of a batch, so that a GPU need not wait for one after the other
SECTIONS = ("annotations", "images", "categories")  # in the order of the file

NO_LABELS = Targets(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))


@dataclass(frozen=True)
class ImageRecord:
    """What a set knows of one image."""

    sha256: str  # of the file
    height: int
    width: int
    boxes: Sequence[Sequence[float]]  # xyxy, pixels
    labels: Sequence[int]  # class indices
    masks: Sequence[Any] | None = None  # COCO's run lengths, of each box
    source: str | None = None  # the file that it was made of, where there is one
    range: Sequence[float] | None = None  # of 16-bit files: what codes 0 and 65535 stand for; else [0, 1] in 8 bits


class ImageSet:
    """Reads a finished set.

    `description` is the content of set.json: configuration, seed, hash of the weights, seconds, data that was read,
    where the labels come from, loss history.

    Raises:
        UserError: the set is unfinished or damaged.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        if not (directory / DESCRIPTION).is_file():
            raise UserError(f"{directory}: no finished image set ({DESCRIPTION} is missing); run synthesize to make it")
        self.description: dict[str, Any] = read_checked_json(directory / DESCRIPTION)
        path = directory / ANNOTATIONS
        try:
            if sha256(path) != self.description["annotations_sha256"]:
                raise _damaged(path, "its SHA-256 is not the recorded one")
            index = _index(path)
            self._file = open_ordinary(path)
            self.class_names = tuple(row["name"] for row in self._rows(*index["categories"][[0, -1]]))
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise _damaged(path, f"{type(error).__name__}: {error}") from error
        self._images, self._annotations = index["images"], index["annotations"]
        self._streamed = "streamed_from" in self.description
        if not self._streamed:
            there = set(os.listdir(directory / IMAGES)) if (directory / IMAGES).is_dir() else set()
            missing = next((name for name in map(image_name, range(len(self))) if name not in there), None)
            if missing is not None:
                raise _damaged(directory / IMAGES / missing, "missing")
        self._readers = ThreadPoolExecutor(READERS)

    def __len__(self) -> int:
        return len(self._images) - 1

    def _rows(self, start: int, end: int) -> list[dict[str, Any]]:
        """The rows between two places of the file; works in several threads at once."""
        content = os.pread(self._file.fileno(), int(end - start), int(start))
        rows: list[dict[str, Any]] = json.loads(b"[" + content.rstrip().rstrip(b",") + b"]")
        return rows

    def image(self, index: int) -> Tensor:
        """One image as uint8 [3, H, W], RGB; what lies outside [0, 1] is cut.

        Raises:
            UserError: the file is not the one that was made.
        """
        found = self._image(index)
        return found if found.dtype == torch.uint8 else (found.clamp(0, 1) * 255).round().to(torch.uint8)

    def _image(self, index: int) -> Tensor:
        """One image [3, H, W], RGB: uint8, or float32 where it was stored with a range."""
        (row,) = self._rows(*self._images[index : index + 2])
        path = self.directory / IMAGES / row["file_name"]
        if self._streamed:
            path = Path(self.description["streamed_from"]) / row["source"]
        try:
            content = read_ordinary(path)
        except OSError as error:
            raise _damaged(path, error.strerror or str(error)) from error
        if self._streamed:
            if hashlib.sha256(content).hexdigest() != row["sha256"]:
                raise UserError(f"{path}: another file than the one of this set; put that one back, or run again")
            return letterboxed(path, content, row["width"])
        if hashlib.sha256(content).hexdigest() != row["sha256"]:
            raise UserError(f"{path}: damaged; remove this file and repeat the command, it is made again")
        return decoded(content, row.get("range"))

    def targets(self, index: int) -> Targets:
        """The labels of one image, on the CPU, boxes in pixels; masks where all of them have one."""
        rows = self._rows(*self._annotations[index : index + 2])
        boxes = torch.tensor([row["bbox"] for row in rows], dtype=torch.float32).view(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        masks = [row["segmentation"] for row in rows if "segmentation" in row]
        decoded = decode(masks, *masks[0]["size"]) if masks and len(masks) == len(rows) else None
        return Targets(boxes, torch.tensor([row["category_id"] - 1 for row in rows], dtype=torch.int64), decoded)

    def batch(self, indices: Sequence[int], device: torch.device, labels: bool = True) -> tuple[Tensor, list[Targets]]:
        """Images [B, 3, H, W] and their labels, on `device`; in [0, 1] but for sets that were not clipped.

        Without `labels` none are read, and each image has none.
        """
        images = torch.stack(list(self._readers.map(self._image, indices))).to(device)
        images = images.float() / 255 if images.dtype == torch.uint8 else images
        targets = [self.targets(i) if labels else NO_LABELS for i in indices]
        return images, [
            Targets(t.boxes.to(device), t.labels.to(device), None if t.masks is None else t.masks.to(device))
            for t in targets
        ]


def _damaged(path: Path, found: str) -> UserError:
    return UserError(f"{path}: the image set is damaged ({found}); run synthesize again, it makes what is missing")


def _index(path: Path) -> dict[str, np.ndarray]:
    """Where the rows of each section start, and at the end where the last one ends; of annotations those of each image.

    `write_set` has put a row into each line, and annotations in the order of their images.
    """
    starts: dict[str, list[int]] = {section: [] for section in SECTIONS}
    image, place, section = -1, 0, -1
    with open_ordinary(path) as stream:
        for line in stream:
            if not line.startswith(b'{"id"'):
                if section >= 0:
                    starts[SECTIONS[section]].append(place)
                section += 1
            elif section == 0:
                own = int(line.partition(b'"image_id": ')[2].partition(b",")[0])
                starts["annotations"] += [place] * (own - image)
                image = own
            else:
                starts[SECTIONS[section]].append(place)
            place += len(line)
    count = len(starts["images"])  # of images and an end
    starts["annotations"] += starts["annotations"][-1:] * (count - len(starts["annotations"]))
    return {section: np.array(found, np.int64) for section, found in starts.items()}


def with_range(image: Tensor) -> tuple[np.ndarray, list[float]]:
    """An image [3, H, W] that may leave [0, 1], as 16-bit codes and what codes 0 and 65535 stand for."""
    low, high = min(float(image.min()), 0.0), max(float(image.max()), 1.0)
    codes = ((image.detach().double().cpu() - low) / (high - low) * WHITE).round().numpy().astype(np.uint16)
    return codes, [low, high]


def decoded(content: bytes, bounds: Sequence[float] | None = None) -> Tensor:
    """The content of a file of `write_image`: uint8 [3, H, W], RGB, or float32 from 16-bit codes and their range."""
    if bounds is None:
        pixels, _ = decode_image(np.frombuffer(content, np.uint8))
        assert pixels is not None
        return torch.from_numpy(pixels[..., ::-1].transpose(2, 0, 1).copy())
    codes = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_UNCHANGED)
    assert codes is not None
    low, high = bounds
    values = codes[..., ::-1].transpose(2, 0, 1).astype(np.float64) / WHITE * (high - low) + low
    return torch.from_numpy(values.astype(np.float32))


def write_image(path: Path, image: Tensor | np.ndarray) -> tuple[int, str]:
    """Writes an image [3, H, W], 8 or 16 bits, as PNG, atomically; returns the file's size in bytes and its SHA-256."""
    codes = image.numpy() if isinstance(image, Tensor) else image
    _, encoded = cv2.imencode(".png", np.ascontiguousarray(codes.transpose(1, 2, 0)[..., ::-1]))
    content = encoded.tobytes()
    with atomic(path) as temporary:
        temporary.write_bytes(content)
    return len(content), hashlib.sha256(content).hexdigest()


def write_set(
    directory: Path,
    records: Iterable[ImageRecord],
    class_names: Sequence[str],
    describe: Callable[[], Mapping[str, Any]],
) -> None:
    """Writes annotations.json and, last, set.json, which marks the set as complete. The images are there already.

    Args:
        directory: of the set.
        records: of its images, in their order; they may be made on the way.
        class_names: of the labels.
        describe: called after the last record; JSON-able.
    """
    images: list[dict[str, Any]] = []
    count = 0
    digest = hashlib.sha256()  # of what is written: a file that is damaged right afterwards must not count as whole
    with atomic(directory / ANNOTATIONS) as temporary, temporary.open("wb") as stream:

        def write(text: str) -> None:
            digest.update(text.encode())
            stream.write(text.encode())

        separator = '{"annotations": [\n'
        for record in records:
            for row in _annotations(record, len(images), count):
                write(separator + json.dumps(row))
                separator, count = ",\n", count + 1
            row = {"id": len(images), "file_name": image_name(len(images)), "width": record.width}
            row |= {"height": record.height, "sha256": record.sha256}
            row |= {"source": record.source} if record.source else {}
            images.append(row | ({"range": list(record.range)} if record.range else {}))
        write((separator if not count else "\n") + '], "images": [\n')
        write(",\n".join(map(json.dumps, images)) + '\n], "categories": [\n')
        categories = [{"id": i, "name": name} for i, name in enumerate(class_names, 1)]
        write(",\n".join(map(json.dumps, categories)) + "\n]}\n")
    description = dict(describe()) | {"annotations_sha256": digest.hexdigest()}
    write_checked_json(directory / DESCRIPTION, description)


def _annotations(record: ImageRecord, image: int, count: int) -> Iterable[dict[str, Any]]:
    """Rows of COCO for the labels of an image; `count` are there already."""
    masks = [None] * len(record.labels) if record.masks is None else record.masks
    for (x1, y1, x2, y2), label, mask in zip(record.boxes, record.labels, masks, strict=True):
        count += 1
        box = [round(v, 3) for v in (x1, y1, x2 - x1, y2 - y1)]
        row = {"id": count, "image_id": image, "category_id": label + 1, "bbox": box}
        row |= {"area": round(box[2] * box[3], 3), "iscrowd": 0}
        yield row if mask is None else row | {"segmentation": mask}


def encoded(masks: Tensor | None) -> list[dict[str, Any]] | None:
    """Masks [n, H, W] as an `ImageRecord` has them."""
    return None if masks is None else encode(masks)


def is_complete(directory: Path) -> bool:
    """Whether set.json and annotations.json are those that were written. Says nothing of the images."""
    try:
        return sha256(directory / ANNOTATIONS) == read_checked_json(directory / DESCRIPTION)["annotations_sha256"]
    except (UserError, OSError, KeyError):
        return False


def image_name(index: int) -> str:
    """The file name of image `index` in the folder of images."""
    return f"{index:06d}.png"


def list_images(folder: Path) -> list[Path]:
    """The image files directly in a folder, sorted by name.

    Raises:
        UserError: no such folder, or no image in it.
    """
    if not folder.is_dir():
        raise UserError(f"synthesis.real_images: {folder} is not a folder; give one with image files")
    files = sorted(f for f in folder.iterdir() if f.suffix.lower() in SUFFIXES)
    if not files:
        raise UserError(f"synthesis.real_images: no image in {folder}; allowed are {', '.join(sorted(SUFFIXES))}")
    return files


def letterboxed(path: Path, content: bytes, size: int, known: bool = True) -> Tensor:
    """The content of an image file fitted into a grey square, uint8 [3, size, size], RGB.

    Several threads may do so at once if the content is `known`, looked at before; else what libjpeg says counts too.

    Raises:
        UserError: not a readable image, or one that the decoder calls corrupt.
    """
    codes, complaint = np.frombuffer(content, np.uint8), ""
    try:
        image = cv2.imdecode(codes, cv2.IMREAD_COLOR) if known and content else None
        if not known:
            image, complaint = decode_image(codes)
    except cv2.error:
        image = None
    if image is None or complaint:
        raise UserError(f"{path}: not a readable image{f' ({complaint})' if complaint else ''}; replace or remove it")
    height, width = image.shape[:2]
    scale, left, top = letterbox(width, height, size)
    shape = max(round(width * scale), 1), max(round(height * scale), 1)
    pixels = cv2.resize(image, shape, interpolation=cv2.INTER_LINEAR)[..., ::-1]
    padded = torch.full((3, size, size), GREY, dtype=torch.uint8)
    x, y = round(left - 0.1), round(top - 0.1)
    padded[:, y : y + shape[1], x : x + shape[0]] = torch.from_numpy(pixels.transpose(2, 0, 1).copy())
    return padded
