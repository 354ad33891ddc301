"""Trains the micro Mask R-CNN on drawn shapes: python -m tools.shapes.train_mask_rcnn runs/mask_rcnn.safetensors.

Every step draws new images, so that none is seen twice. Takes about half an hour on one CPU core.
"""

import argparse
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from common.errors import UserError
from common.weights import save_tensors
from resnet.adapter import FAMILY
from resnet.models import MICRO, build_module
from tools.shapes.draw import draw_image
from tools.shapes.generate import IMAGE_SIZE, box
from tools.shapes.outlines import CLASS_NAMES

TRAIN_SEED = 1  # the generator's default, 2, is for images that the detector never saw
ARCHITECTURE = {
    "model": MICRO,
    "outputs": len(CLASS_NAMES) + 1,
    "frozen_batch_norm": False,
    "names": list(CLASS_NAMES),
}
SETTINGS = {"batch": 8, "learning_rate": 3e-3, "weight_decay": 0.01, "warm_up": 100, "clip": 5.0}


def train(path: Path, steps: int, seed: int = 0) -> Path:
    """Trains for `steps` batches and writes the weights in half precision, every 200 steps and at the end.

    Raises:
        UserError: the file cannot be written.
    """
    torch.manual_seed(seed)  # of the first weights and of torchvision's samplers
    module: Any = build_module(ARCHITECTURE).train()
    decayed = [p for p in module.parameters() if p.ndim > 1]
    groups: list[dict[str, Any]] = [
        {"params": decayed},
        {"params": [p for p in module.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=SETTINGS["learning_rate"], weight_decay=SETTINGS["weight_decay"])
    batch = int(SETTINGS["batch"])
    with tqdm(range(steps), mininterval=10) as bar:
        for step in bar:
            drawn = [_draw(step * batch + i) for i in range(batch)]
            losses = module([image for image, _ in drawn], [target for _, target in drawn])
            loss = torch.stack(list(losses.values())).sum()
            rate = SETTINGS["learning_rate"] * min((step + 1) / SETTINGS["warm_up"], 1.0)
            for group in optimizer.param_groups:
                group["lr"] = rate * (0.01 + 0.99 * (1 + math.cos(math.pi * step / steps)) / 2)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(module.parameters(), SETTINGS["clip"])
            optimizer.step()
            bar.set_postfix({name: f"{float(value.detach()):.3f}" for name, value in losses.items()}, refresh=False)
            if (step + 1) % 200 == 0:
                _save(path, module, step + 1, seed)
    _save(path, module, steps, seed)
    return path


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


def _save(path: Path, module: nn.Module, steps: int, seed: int) -> None:
    state = {name: t.half() if t.is_floating_point() else t for name, t in module.state_dict().items()}
    made = {"steps": steps, "seed": seed, "drawn_with_seed": TRAIN_SEED, "settings": SETTINGS}
    save_tensors(path, state, {"family": FAMILY, "architecture": ARCHITECTURE, "training": made})


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.shapes.train_mask_rcnn", description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="a new .safetensors file")
    parser.add_argument("--steps", type=int, default=1600, help="batches of 8 (default: %(default)s)")
    arguments = parser.parse_args()
    if arguments.out.exists():
        sys.exit(f"error: {arguments.out}: exists; name a new file, or remove it first")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    try:
        path = train(arguments.out, arguments.steps)
    except UserError as error:
        sys.exit(f"error: {error}")
    print(path, f"({path.stat().st_size / 1e6:.2f} MB)")


if __name__ == "__main__":
    main()
