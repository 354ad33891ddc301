"""Trains the micro Swin Mask R-CNN on drawn shapes: python -m tools.shapes.train_vit runs/shapes_vit.

Writes micro_vit.safetensors (half precision, with the architecture) into the folder. Every image is drawn anew and seen
once. Half an hour on one CPU core; with --start it goes on from such a file, at full size and on new images. With
--minutes time and not the number of steps says when the learning rate has fallen to zero, for a machine that is shared.
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

from common.checkpoints.read import load_tensors, save_tensors
from common.detection.roi_outputs import two_stage_output
from common.detection.types import Targets
from common.runtime.errors import UserError
from tools.shapes.draw import draw_image
from tools.shapes.generate import IMAGE_SIZE, box
from tools.shapes.outlines import CLASS_NAMES
from vit import adapter
from vit.models import CONFIG, class_counts

TRAIN_SEED = 1  # the generator's default, 2, is for images that the detector never saw
SETTINGS: dict[str, Any] = {
    "batch": 8,
    "optimizer": "AdamW",
    "learning_rate": 1.5e-3,
    "weight_decay": 0.05,  # of matrices and convolutions
    "warm_up_steps": 200,
    "gradient_clip": 5.0,
    "proposals": 48,
    "masks": 8,
    "average_decay": 0.99,
    "small_size": 128,  # pixels of the first images, which are quicker
    "small_share": 0.75,  # of the steps, or of the time
}


# A detector of 1.3 million parameters for drawn shapes and for tests; objects from 12 pixels on need smaller anchors.
MICRO: Mapping[str, Any] = {
    "backbone.embed_dims": 24,
    "backbone.depths": [2, 2, 2, 2],
    "backbone.num_heads": [1, 2, 4, 8],
    "backbone.mlp_ratio": 2,
    "neck.in_channels": [24, 48, 96, 192],
    "neck.out_channels": 48,
    "rpn_head.in_channels": 48,
    "rpn_head.feat_channels": 48,
    "rpn_head.anchor_generator.scales": [4],
    "roi_head.bbox_roi_extractor.out_channels": 48,
    "roi_head.bbox_roi_extractor.finest_scale": 28,
    "roi_head.bbox_head.in_channels": 48,
    "roi_head.bbox_head.fc_out_channels": 96,
    "roi_head.mask_roi_extractor.out_channels": 48,
    "roi_head.mask_roi_extractor.finest_scale": 28,
    "roi_head.mask_head.in_channels": 48,
    "roi_head.mask_head.conv_out_channels": 32,
    "roi_head.mask_head.num_convs": 2,
    "test_cfg.rpn.nms_pre": 300,
    "test_cfg.rpn.max_per_img": 300,
}


def micro(classes: int) -> dict[str, Any]:
    """The architecture of the micro Swin."""
    return {"config": CONFIG.format("t", ""), "overrides": dict(MICRO) | class_counts(classes)}


def train(
    directory: Path, steps: int, minutes: float | None = None, start: Path | None = None, seed: int = 0
) -> Path:  # fmt: skip
    """Trains for `steps` batches or `minutes`, from random weights or from `start`. Returns the path of the weights.

    Raises:
        UserError: the folder cannot be written, or `start` is no file of such weights.
    """
    architecture = micro(len(CLASS_NAMES)) | {"names": list(CLASS_NAMES)}
    torch.manual_seed(seed)
    module, seen = adapter.from_architecture(architecture).build(), 0
    if start is None:
        module.init_weights()  # type: ignore[operator]
    else:
        module.load_state_dict(adapter.load(start).state or {})
        seen = load_tensors(start)[1]["training"]["images"]
    average = torch.optim.swa_utils.AveragedModel(
        module, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(SETTINGS["average_decay"])
    )
    optimizer = _optimizer(module)
    begun, mean, step = time.perf_counter(), 0.0, 0
    while (done := (time.perf_counter() - begun) / (60 * minutes) if minutes else step / steps) < 1:
        for group in optimizer.param_groups:
            group["lr"] = SETTINGS["learning_rate"] * _rate(step, done)
        small = start is None and done < SETTINGS["small_share"]
        size = SETTINGS["small_size"] if small else IMAGE_SIZE
        indices = range(seen + step * SETTINGS["batch"], seen + (step + 1) * SETTINGS["batch"])
        losses = _losses(module, *_draw(indices, size))
        loss = torch.stack([values.mean() for values in losses.values()]).sum()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), SETTINGS["gradient_clip"])
        optimizer.step()
        average.update_parameters(module)
        mean += (loss.item() - mean) * (0.02 if step else 1.0)
        step += 1
        if step % 50 == 0:
            parts = ", ".join(f"{name} {float(values.detach().mean()):.3f}" for name, values in losses.items())
            spent = time.perf_counter() - begun
            print(f"{step} ({done:.0%})  loss {mean:.3f} ({parts})  {spent:.0f} s", flush=True)
    state = {name: t.half() if t.is_floating_point() else t for name, t in average.module.state_dict().items()}
    made = {
        "images": seen + step * SETTINGS["batch"],
        "seed": seed,
        "drawn_with_seed": TRAIN_SEED,
        "settings": SETTINGS,
    }
    path = directory / "micro_vit.safetensors"
    save_tensors(path, state, {"family": adapter.FAMILY, "architecture": architecture, "training": made})
    return path


def _optimizer(module: nn.Module) -> torch.optim.Optimizer:
    """AdamW, without decay of biases, norms and position tables."""
    decayed: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in module.named_parameters():
        plain = parameter.ndim > 1 and not name.endswith("relative_position_bias_table")
        (decayed if plain else others).append(parameter)
    groups = [{"params": decayed, "weight_decay": SETTINGS["weight_decay"]}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=SETTINGS["learning_rate"])


def _rate(step: int, done: float) -> float:
    """The factor of the learning rate: a linear warm-up, then a cosine to zero; `done` in [0, 1)."""
    return min((step + 1) / SETTINGS["warm_up_steps"], 1.0) * (1 + math.cos(math.pi * done)) / 2


def _draw(indices: range, size: int) -> tuple[Tensor, list[Targets]]:
    """Images [B, 3, S, S] in [0, 1] and what they show."""
    images, targets = [], []
    for i in indices:
        image, shapes = draw_image(size, np.random.default_rng([TRAIN_SEED, i]))
        images.append(torch.from_numpy(image).permute(2, 0, 1).float() / 255)
        boxes = torch.tensor([box(shape) for shape in shapes], dtype=torch.float32).view(-1, 4)
        masks = torch.from_numpy(np.array([shape.mask for shape in shapes], bool).reshape(-1, size, size))
        targets.append(Targets(boxes, torch.tensor([shape.label for shape in shapes], dtype=torch.int64), masks))
    return torch.stack(images), targets


def _losses(module: nn.Module, images: Tensor, targets: list[Targets]) -> dict[str, Tensor]:
    parts = adapter.SwinParts(module, images)
    wanted = adapter.as_outputs(targets, images.device)
    return dict(two_stage_output(parts, wanted, None, SETTINGS["proposals"], SETTINGS["masks"]).losses)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.shapes.train_vit", description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="a folder")
    parser.add_argument("--steps", type=int, default=1600)
    parser.add_argument("--minutes", type=float, help="train for so long instead")
    parser.add_argument("--start", type=Path, help="weights to go on from")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    try:
        path = train(arguments.out, arguments.steps, arguments.minutes, arguments.start)
    except UserError as error:
        sys.exit(f"error: {error}")
    print(path, f"({path.stat().st_size / 1e6:.2f} MB)")


if __name__ == "__main__":
    main()
