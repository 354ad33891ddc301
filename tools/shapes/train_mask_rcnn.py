"""Trains the micro Mask R-CNN on drawn shapes: python -m tools.shapes.train_mask_rcnn runs/mask_rcnn.safetensors.

Every step draws new images, so that none is seen twice. Takes about a quarter of an hour on one CPU core. With --start
it goes on from such a file, on further images; with --minutes time and not the number of steps says when the learning
rate has fallen, for a machine that others use as well.
"""

import argparse
import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from common.checkpoints.read import load_tensors
from common.runtime.errors import UserError
from resnet.adapter import FAMILY, load
from resnet.models import MICRO, build_module
from tools.shapes.draw import draw_image
from tools.shapes.generate import IMAGE_SIZE, box
from tools.shapes.outlines import CLASS_NAMES
from tools.shapes.weights import TRAIN_SEED, write_weights

ARCHITECTURE = {
    "model": MICRO,
    "outputs": len(CLASS_NAMES) + 1,
    "frozen_batch_norm": False,
    "names": list(CLASS_NAMES),
}
SETTINGS: dict[str, float] = {
    "batch": 8,
    "learning_rate": 3e-3,
    "weight_decay": 0.01,
    "warm_up": 100,
    "clip": 5.0,
    "average_decay": 0.998,
}


def train(path: Path, steps: int, minutes: float | None = None, start: Path | None = None, seed: int = 0) -> Path:
    """Trains for `steps` batches or `minutes`, from random weights or from `start`, and writes the averaged weights.

    They are written every 200 steps and at the end, in half precision. Returns their path.

    Raises:
        UserError: the file cannot be written, or `start` is no file of such weights.
    """
    torch.manual_seed(seed)  # of the first weights and of torchvision's samplers
    module: Any = (build_module(ARCHITECTURE) if start is None else load(start).build()).train()
    seen = 0 if start is None else _images(load_tensors(start)[1]["training"])
    average = AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(SETTINGS["average_decay"]), use_buffers=True)
    optimizer = _optimizer(module)
    batch, begun, step = int(SETTINGS["batch"]), time.perf_counter(), 0
    while (done := (time.perf_counter() - begun) / (60 * minutes) if minutes else step / steps) < 1:
        rate = SETTINGS["learning_rate"] * min((step + 1) / SETTINGS["warm_up"], 1.0)
        for group in optimizer.param_groups:
            group["lr"] = rate * (0.01 + 0.99 * (1 + math.cos(math.pi * done)) / 2)
        drawn = [_draw(seen + step * batch + i) for i in range(batch)]
        losses = module([image for image, _ in drawn], [target for _, target in drawn])
        optimizer.zero_grad()
        torch.stack(list(losses.values())).sum().backward()
        nn.utils.clip_grad_norm_(module.parameters(), SETTINGS["clip"])
        optimizer.step()
        average.update_parameters(module)
        step += 1
        if step % 200 == 0:
            parts = ", ".join(f"{name} {float(value.detach()):.3f}" for name, value in losses.items())
            print(f"{step} ({done:.0%})  {parts}  {time.perf_counter() - begun:.0f} s", flush=True)
            _save(path, average.module, seen + step * batch, seed)
    _save(path, average.module, seen + step * batch, seed)
    return path


def _optimizer(module: nn.Module) -> torch.optim.Optimizer:
    """AdamW, without decay of biases and BatchNorms."""
    decayed = [p for p in module.parameters() if p.ndim > 1]
    others = [p for p in module.parameters() if p.ndim == 1]
    groups: list[dict[str, Any]] = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=SETTINGS["learning_rate"], weight_decay=SETTINGS["weight_decay"])


def _images(made: Mapping[str, Any]) -> int:
    """How many images the detector of a file has seen; the first such file counts batches."""
    return int(made["images"] if "images" in made else made["steps"] * made["settings"]["batch"])


def _draw(index: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Image [3, S, S] in [0, 1] and torchvision's targets, as `generate` would draw them with this seed and index."""
    image, shapes = draw_image(IMAGE_SIZE, np.random.default_rng([TRAIN_SEED, index]))
    boxes = torch.tensor([box(shape) for shape in shapes], dtype=torch.float32).view(-1, 4)
    masks = np.stack([shape.mask for shape in shapes]) if shapes else np.zeros((0, IMAGE_SIZE, IMAGE_SIZE), np.bool_)
    target = {
        "boxes": boxes,
        "labels": torch.tensor([shape.label + 1 for shape in shapes], dtype=torch.int64),
        "masks": torch.from_numpy(masks).to(torch.uint8),
    }
    return torch.from_numpy(image).permute(2, 0, 1).float() / 255, target


def _save(path: Path, module: nn.Module, images: int, seed: int) -> None:
    made = {"images": images, "seed": seed, "settings": SETTINGS}
    write_weights(path, module.state_dict(), FAMILY, ARCHITECTURE, made)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.shapes.train_mask_rcnn", description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="a new .safetensors file")
    parser.add_argument("--steps", type=int, default=1600, help="batches of 8 (default: %(default)s)")
    parser.add_argument("--minutes", type=float, help="train for so long instead")
    parser.add_argument("--start", type=Path, help="weights to go on from")
    arguments = parser.parse_args()
    if arguments.out.exists():
        sys.exit(f"error: {arguments.out}: exists; name a new file, or remove it first")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    try:
        path = train(arguments.out, arguments.steps, arguments.minutes, arguments.start)
    except UserError as error:
        sys.exit(f"error: {error}")
    print(path, f"({path.stat().st_size / 1e6:.2f} MB)")


if __name__ == "__main__":
    main()
