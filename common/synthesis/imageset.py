"""A set of synthetic images on disk: ordinary PNG files and a COCO annotation file."""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cv2
import torch
from torch import Tensor

from common.detection.masks import decode, encode
from common.detection.types import Targets
from common.runtime.errors import UserError
from common.runtime.files import atomic, read_json
from common.runtime.images import read_image

ANNOTATIONS, DESCRIPTION, IMAGES = "annotations.json", "set.json", "images"
READERS = 8  # threads that decode the images of a batch, so that a GPU need not wait for one after the other


class ImageSet:
    """Reads a finished set.

    `description` is the content of set.json: configuration, seed, hash of the weights, seconds, files that were read,
    where the labels come from, loss history.

    Raises:
        UserError: the set is unfinished or damaged.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        if not (directory / DESCRIPTION).is_file():
            raise UserError(f"{directory}: no finished image set ({DESCRIPTION} is missing); run synthesize to make it")
        self.description: dict[str, Any] = read_json(directory / DESCRIPTION)
        content = read_json(directory / ANNOTATIONS)
        try:
            self.class_names = tuple(c["name"] for c in content["categories"])
            self._files = [directory / IMAGES / i["file_name"] for i in content["images"]]
            self._segmentations: list[list[Any]] = [[] for _ in self._files]
            self._sizes = [(i["height"], i["width"]) for i in content["images"]]
            self._rows: list[list[list[float]]] = [[] for _ in self._files]
            place = {i["id"]: n for n, i in enumerate(content["images"])}
            for a in content["annotations"]:
                x, y, w, h = a["bbox"]
                self._rows[place[a["image_id"]]].append([x, y, x + w, y + h, a["category_id"] - 1])
                if "segmentation" in a:
                    self._segmentations[place[a["image_id"]]].append(a["segmentation"])
        except (KeyError, TypeError, ValueError) as error:
            raise _damaged(directory / ANNOTATIONS, f"{type(error).__name__}: {error}") from error
        missing = next((f for f in self._files if not f.is_file()), None)
        if missing is not None:
            raise _damaged(missing, "missing")
        self._readers = ThreadPoolExecutor(READERS)

    def __len__(self) -> int:
        return len(self._files)

    def image(self, index: int) -> Tensor:
        """One image as uint8 [3, H, W], RGB.

        Raises:
            UserError: the file cannot be decoded.
        """
        return read_image(self._files[index])

    def targets(self, index: int) -> Targets:
        """The labels of one image, on the CPU, boxes in pixels; masks where all of them have one."""
        table = torch.tensor(self._rows[index], dtype=torch.float32).view(-1, 5)
        found = self._segmentations[index]
        masks = decode(found, *self._sizes[index]) if found and len(found) == len(table) else None
        return Targets(table[:, :4].contiguous(), table[:, 4].long(), masks)

    def batch(self, indices: Sequence[int], device: torch.device) -> tuple[Tensor, list[Targets]]:
        """Images [B, 3, H, W] in [0, 1] and their labels, on `device`."""
        images = torch.stack(list(self._readers.map(self.image, indices))).to(device).float() / 255
        targets = [self.targets(i) for i in indices]
        return images, [
            Targets(t.boxes.to(device), t.labels.to(device), None if t.masks is None else t.masks.to(device))
            for t in targets
        ]


def _damaged(path: Path, found: str) -> UserError:
    return UserError(f"{path}: the image set is damaged ({found}); run synthesize again, it makes what is missing")


def write_image(path: Path, image: Tensor) -> int:
    """Writes a uint8 image [3, H, W] as PNG, atomically; returns the size of the file in bytes."""
    _, encoded = cv2.imencode(".png", image.permute(1, 2, 0).flip(2).contiguous().numpy())
    with atomic(path) as temporary:
        temporary.write_bytes(encoded.tobytes())
    return len(encoded)


def coco(targets: Sequence[Targets], sizes: Sequence[tuple[int, int]], class_names: Sequence[str]) -> Mapping[str, Any]:
    """The labels as a COCO detection file; images are called 000000.png and so on, `sizes` are (height, width)."""
    images = [
        {"id": i, "file_name": image_name(i), "width": width, "height": height}
        for i, (height, width) in enumerate(sizes)
    ]
    annotations: list[dict[str, Any]] = []
    for i, target in enumerate(targets):
        masks = [None] * len(target.labels) if target.masks is None else encode(target.masks)
        for (x1, y1, x2, y2), label, mask in zip(target.boxes.tolist(), target.labels.tolist(), masks, strict=True):
            box = [round(v, 3) for v in (x1, y1, x2 - x1, y2 - y1)]
            annotation = {"id": len(annotations) + 1, "image_id": i, "category_id": label + 1, "bbox": box}
            annotation |= {"area": round(box[2] * box[3], 3), "iscrowd": 0}
            annotations.append(annotation if mask is None else annotation | {"segmentation": mask})
    categories = [{"id": i + 1, "name": name} for i, name in enumerate(class_names)]
    return {"images": images, "annotations": annotations, "categories": categories}


def image_name(index: int) -> str:
    """The file name of image `index` in the folder of images."""
    return f"{index:06d}.png"
