"""Trains the micro YOLOv5 on drawn shapes with the loss of yolov5/: python -m tools.shapes.train_yolov5 FILE.

Every step draws new images. Takes about 20 minutes on one CPU core.
"""

import copy
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from common.detection.types import Targets
from common.runtime.errors import Parser
from tools.shapes import TRAIN_SEED, write_weights
from tools.shapes.generate import CLASS_NAMES, IMAGE_SIZE, box, draw_image
from yolov5 import adapter
from yolov5.loss import losses
from yolov5.model import YoloV5

WIDTH, DEPTH = 0.125, 0.33  # the nano YOLOv5 has .25, .33
ANCHORS = [[12, 12, 20, 16, 18, 26], [32, 30, 44, 56, 64, 50], [76, 88, 112, 100, 150, 152]]  # pixels
SETTINGS: dict[str, Any] = {
    "image_size": IMAGE_SIZE,
    "batch_size": 16,
    "optimizer": "AdamW",
    "learning_rate": 3e-3,
    "last_learning_rate": 3e-5,
    "warmup_steps": 100,
    "weight_decay": 5e-4,
    "gradient_clip": 10.0,
    "ema_decay": 0.998,
}


def train(path: Path, num_images: int, seed: int = 0) -> Path:
    """Trains on `num_images` drawn images and writes the averaged weights to `path`. Returns it."""
    torch.manual_seed(seed)
    description = architecture()
    module = YoloV5(description["yaml"], len(CLASS_NAMES)).train()
    steps = math.ceil(num_images / SETTINGS["batch_size"])
    average = AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(SETTINGS["ema_decay"]), use_buffers=True)
    optimizer = torch.optim.AdamW(module.parameters(), SETTINGS["learning_rate"], weight_decay=SETTINGS["weight_decay"])
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _share(step, steps))
    with tqdm(_batches(steps), total=steps, desc="training", disable=None) as bar:
        for step, (images, targets) in enumerate(bar):
            found = losses(module.head, module(images), module.strides, targets)
            total = torch.stack([value.mean() for value in found.values()]).sum()
            optimizer.zero_grad()
            total.backward()
            nn.utils.clip_grad_norm_(module.parameters(), SETTINGS["gradient_clip"])
            optimizer.step()
            schedule.step()
            average.update_parameters(module)
            if step % 50 == 0:
                bar.set_postfix({name: f"{value.mean().item():.4f}" for name, value in found.items()})
    made = {"images": num_images, "seed": seed, "settings": SETTINGS}
    write_weights(path, average.module.state_dict(), adapter.FAMILY, description, made)
    return path


def architecture() -> dict[str, Any]:
    """YOLOv5's own layers, which Ultralytics' yolov5.yaml lists, narrower than the smallest scale, with anchors."""
    from ultralytics.nn.tasks import yaml_model_load

    content = copy.deepcopy(yaml_model_load("yolov5n.yaml"))
    content["head"][-1] = [*content["head"][-1][:2], "Detect", ["nc", "anchors"]]
    scaled = {"nc": len(CLASS_NAMES), "depth_multiple": DEPTH, "width_multiple": WIDTH, "anchors": ANCHORS}
    return {"yaml": scaled | {key: content[key] for key in ("backbone", "head")}, "names": list(CLASS_NAMES)}


def _batches(steps: int) -> Iterator[tuple[Tensor, list[Targets]]]:
    """The images of `tools.shapes.generate` with the seed for training, in their order."""
    size = SETTINGS["batch_size"]
    for step in range(steps):
        drawn = [draw_image(IMAGE_SIZE, np.random.default_rng([TRAIN_SEED, step * size + i])) for i in range(size)]
        images = torch.from_numpy(np.stack([image for image, _ in drawn])).permute(0, 3, 1, 2).float() / 255
        targets = []
        for _, shapes in drawn:
            boxes = torch.tensor([box(shape) for shape in shapes]).float().reshape(-1, 4)
            targets.append(Targets(boxes, torch.tensor([shape.label for shape in shapes], dtype=torch.long)))
        yield images, targets


def _share(step: int, steps: int) -> float:
    """Learning rate factor: linear warm-up, then cosine."""
    last = SETTINGS["last_learning_rate"] / SETTINGS["learning_rate"]
    cosine = last + (1 - last) * (1 + math.cos(math.pi * step / steps)) / 2
    return cosine * min((step + 1) / SETTINGS["warmup_steps"], 1)


def main() -> None:
    parser = Parser(prog="python -m tools.shapes.train_yolov5", description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="a new .safetensors file")
    parser.add_argument("--images", type=int, default=64000)
    arguments = parser.parse_args()
    if arguments.out.exists():
        sys.exit(f"error: {arguments.out}: exists; name a new file, or remove it first")
    torch.set_num_threads(1)
    path = train(arguments.out, arguments.images)
    print(path, f"({path.stat().st_size / 1e6:.2f} MB)")


if __name__ == "__main__":
    main()
