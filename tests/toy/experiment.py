"""A whole experiment with the toy detector: checkpoint, COCO set and configuration in one folder."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from common.runtime.files import read_checked_json, sha256, write_checked_json

CONFIG = """
family: toy
weights: {folder}/toy.txt
run_dir: {folder}/run
device: cpu
data: {{images: {folder}/images, annotations: {folder}/annotations.json}}
synthesis:
  directory: {folder}/synthetic
  num_images: 6
  image_size: 64
  batch_size: 3
  iterations: 2
  low_resolution_size: 32
  low_resolution_iterations: 4
  label_sampling: {{every: 2}}
quantization: {{weight_bits: 4, activation_bits: 4, calibration_images: 4, calibration_batch_size: 2}}
training: {{epochs: 2, batch_size: 2, holdout: 0.34, learning_rate: 0.001}}
evaluation: {{image_size: 64, batch_size: 2, directory: {folder}/measured}}
"""


def write_experiment(folder: Path) -> Path:
    """Returns the configuration's path."""
    (folder / "toy.txt").write_text("3")
    write_coco(folder, boxes=2)
    (folder / "experiment.yaml").write_text(CONFIG.format(folder=folder))
    return folder / "experiment.yaml"


def write_coco(folder: Path, boxes: int, classes: tuple[str, ...] = ("circle", "square")) -> None:
    """Four noisy images of 64 by 48 pixels with `boxes` bright boxes in each."""
    rng = np.random.default_rng(0)
    (folder / "images").mkdir(exist_ok=True)
    images, annotations = [], []
    for i in range(1, 5):
        pixels = rng.integers(0, 120, (48, 64, 3), dtype=np.uint8)
        for n in range(boxes):
            x, y = int(rng.integers(0, 40)), int(rng.integers(0, 24))
            pixels[y : y + 20, x : x + 20] = 255
            annotation = {"bbox": [x, y, 20, 20], "area": 400, "iscrowd": 0, "category_id": 1 + n % len(classes)}
            annotations.append(annotation | {"id": len(annotations) + 1, "image_id": i})
        Image.fromarray(pixels).save(folder / "images" / f"{i}.png")
        images.append({"id": i, "file_name": f"{i}.png", "width": 64, "height": 48})
    categories = [{"id": i, "name": name} for i, name in enumerate(classes, 1)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "annotations.json").write_text(json.dumps(content))


def rename_classes(imageset: Path, name: str) -> None:
    """Calls the classes of a finished set `name` with a number behind."""
    path = imageset / "annotations.json"
    head, start, classes = path.read_text().partition('"categories": ')
    rows = [row | {"name": f"{name}{row['id']}"} for row in json.loads(classes[:-2])]
    path.write_text(head + start + "[\n" + ",\n".join(map(json.dumps, rows)) + "\n]}\n")
    description = read_checked_json(imageset / "set.json")
    write_checked_json(imageset / "set.json", description | {"annotations_sha256": sha256(path)})
