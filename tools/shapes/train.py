"""Trains a micro YOLO on drawn shapes with Ultralytics' trainer: python -m tools.shapes.train runs/shapes_train.

Writes micro_yolo11.safetensors (half precision, with the architecture) into the folder. Takes about half an hour on
two CPU cores. `--model yolo26` and other names of Ultralytics' detectors train a relative of the same width.
"""

import copy
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
import yaml

from common.runtime.errors import Parser, UserError
from common.runtime.files import atomic
from tools.shapes import TRAIN_SEED, write_weights
from tools.shapes.generate import CLASS_NAMES, IMAGE_SIZE, generate
from yolo11 import adapter

os.environ.setdefault("YOLO_OFFLINE", "true")

WIDTH, DEPTH, MAX_CHANNELS = 0.125, 0.5, 512  # the nano YOLO11 has .25, .5, 1024
SETTINGS: dict[str, Any] = {
    "imgsz": IMAGE_SIZE,
    "batch": 16,
    "optimizer": "AdamW",
    "lr0": 2e-3,
    "lrf": 0.01,
    "cos_lr": True,
    "warmup_epochs": 1,
    "mosaic": 0.5,
    "close_mosaic": 8,
    "scale": 0.3,
    "translate": 0.1,
    "fliplr": 0.5,
    "hsv_h": 0.015,
    "device": "cpu",
    "workers": 0,
    "val": False,
    "plots": False,
    "deterministic": True,
    "verbose": False,
}


def train(directory: Path, num_images: int, epochs: int, seed: int = 0, model: str = "yolo11") -> Path:
    """Draws `num_images` images, trains for `epochs` and writes the weights. Returns their path.

    Raises:
        UserError: the folder is not empty, or Ultralytics has no such model.
    """
    from ultralytics import YOLO

    description = _architecture(model)
    data = _draw(directory / "data", num_images)
    architecture = directory / f"{model}.yaml"  # the name is where Ultralytics looks for the family
    architecture.write_text(yaml.safe_dump(description["yaml"]), encoding="utf-8")
    trainer = YOLO(str(architecture), task="detect")
    trainer.train(
        data=str(data), epochs=epochs, seed=seed, project=str(directory.absolute()), name="training", **SETTINGS
    )
    detector = adapter.load(directory / "training/weights/last.pt")
    assert detector.state is not None
    path = directory / f"micro_{model}.safetensors"
    made = {"images": num_images, "epochs": epochs, "seed": seed, "settings": SETTINGS}
    write_weights(path, detector.state, adapter.FAMILY, description, made)
    return path


def _architecture(model: str) -> dict[str, Any]:
    """The parser's dict of Ultralytics' own YAML, narrower than its smallest scale."""
    from ultralytics.nn.tasks import yaml_model_load

    try:
        content = copy.deepcopy(yaml_model_load(f"{model}n.yaml"))
    except FileNotFoundError as error:
        raise UserError(f"--model: found {model}; give a name of Ultralytics, as yolo11, yolo26 or yolov8") from error
    plain = {key: content[key] for key in ("backbone", "head", "end2end", "reg_max") if key in content}
    scaled = {"nc": len(CLASS_NAMES), "depth_multiple": DEPTH, "width_multiple": WIDTH, "max_channels": MAX_CHANNELS}
    return {"yaml": scaled | plain, "names": list(CLASS_NAMES)}


def _draw(directory: Path, num_images: int) -> Path:
    """Writes the dataset in Ultralytics' format; returns its YAML file."""
    annotations = json.loads(generate(directory, num_images, seed=TRAIN_SEED).read_text(encoding="utf-8"))
    (directory / "labels").mkdir()
    lines: dict[int, list[str]] = {image["id"]: [] for image in annotations["images"]}
    for a in annotations["annotations"]:
        x, y, w, h = (value / IMAGE_SIZE for value in a["bbox"])
        row = [x + w / 2, y + h / 2, w, h]
        lines[a["image_id"]].append(" ".join([str(a["category_id"] - 1), *(f"{value:.6f}" for value in row)]))
    for image in annotations["images"]:
        labels = directory / "labels" / Path(image["file_name"]).with_suffix(".txt")
        labels.write_text("\n".join(lines[image["id"]]), encoding="utf-8")
    description = {"path": str(directory.absolute()), "train": "images", "val": "images"}
    with atomic(directory / "data.yaml") as temporary:
        temporary.write_text(yaml.safe_dump(description | {"names": dict(enumerate(CLASS_NAMES))}), encoding="utf-8")
    return directory / "data.yaml"


def main() -> None:
    parser = Parser(prog="python -m tools.shapes.train", description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="a new folder")
    parser.add_argument("--images", type=int, default=3000)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--model", default="yolo11", help="of Ultralytics, without its scale (default: %(default)s)")
    arguments = parser.parse_args()
    if arguments.out.exists():
        sys.exit(f"error: {arguments.out}: exists; name a new folder, or remove it first")
    torch.set_num_threads(2)
    try:
        path = train(arguments.out, arguments.images, arguments.epochs, model=arguments.model)
    except UserError as error:
        shutil.rmtree(arguments.out, ignore_errors=True)
        sys.exit(f"error: {error}")
    print(path, f"({path.stat().st_size / 1e6:.2f} MB)")


if __name__ == "__main__":
    main()
