"""Trains the micro Mask R-CNN on drawn shapes: python -m tools.shapes.train_mask_rcnn runs/mask_rcnn.safetensors.

Every step draws new images. Takes about 15 minutes on one CPU core. `--start` continues from such a file; `--minutes`
fits the learning rate schedule to a time instead of a number of steps.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from common.checkpoints.rcnn_architecture import MICRO
from common.checkpoints.read import load_tensors
from resnet.adapter import FAMILY, load
from resnet.models import build_module
from tools.shapes import TRAIN_SEED, Progress, main, write_weights
from tools.shapes.generate import CLASS_NAMES, IMAGE_SIZE, box, draw_image

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
        UserError: the file cannot be written, or `start` is not such a checkpoint.
    """
    torch.manual_seed(seed)  # initial weights and torchvision's samplers
    module: Any = (build_module(ARCHITECTURE) if start is None else load(start).build()).train()
    seen = 0 if start is None else _images(load_tensors(start)[1]["training"])
    average = AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(SETTINGS["average_decay"]), use_buffers=True)
    optimizer = _optimizer(module)
    batch, progress = int(SETTINGS["batch"]), Progress(steps, minutes)
    while (done := progress.done) < 1:
        step = progress.step
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
        progress.step += 1
        if progress.step % 200 == 0:
            parts = ", ".join(f"{name} {float(value.detach()):.3f}" for name, value in losses.items())
            print(f"{progress.step} ({done:.0%})  {parts}  {progress.seconds:.0f} s", flush=True)
            _save(path, average.module, seen + progress.step * batch, seed)
    _save(path, average.module, seen + progress.step * batch, seed)
    return path


def _optimizer(module: nn.Module) -> torch.optim.Optimizer:
    """AdamW without weight decay on biases and BatchNorm."""
    decayed = [p for p in module.parameters() if p.ndim > 1]
    others = [p for p in module.parameters() if p.ndim == 1]
    groups: list[dict[str, Any]] = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=SETTINGS["learning_rate"], weight_decay=SETTINGS["weight_decay"])


def _images(made: Mapping[str, Any]) -> int:
    """Number of training images of a checkpoint; older ones record batches instead."""
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


if __name__ == "__main__":
    main("tools.shapes.train_mask_rcnn", (__doc__ or "").splitlines()[0], train)
