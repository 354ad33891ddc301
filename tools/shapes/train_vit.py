"""Trains the micro Swin Mask R-CNN on drawn shapes: python -m tools.shapes.train_vit runs/micro_vit.safetensors.

Every step draws new images. Takes about 30 minutes on one CPU core. `--start` continues from such a file, at full
resolution; `--minutes` fits the learning rate schedule to a time instead of a number of steps.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from common.checkpoints.rcnn_architecture import CONFIGURATIONS
from common.checkpoints.read import load_tensors
from common.detection.roi_outputs import two_stage_output
from common.detection.types import Targets
from tools.shapes import TRAIN_SEED, Progress, main, write_weights
from tools.shapes.generate import CLASS_NAMES, IMAGE_SIZE, box, draw_image
from vit import adapter
from vit.models import class_counts

SETTINGS: dict[str, Any] = {
    "batch": 8,
    "optimizer": "AdamW",
    "learning_rate": 1.5e-3,
    "weight_decay": 0.05,  # matrices and convolutions only
    "warm_up_steps": 200,
    "gradient_clip": 5.0,
    "proposals": 48,
    "masks": 8,
    "average_decay": 0.99,
    "small_size": 128,  # pixels; training starts at low resolution
    "small_share": 0.75,  # fraction of the training at low resolution
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
    return {"config": CONFIGURATIONS["t"], "overrides": dict(MICRO) | class_counts(classes)}


def train(
    path: Path, steps: int, minutes: float | None = None, start: Path | None = None, seed: int = 0
) -> Path:  # fmt: skip
    """Trains for `steps` batches or `minutes`, from random weights or from `start`, and writes the averaged weights.

    Returns:
        `path`.

    Raises:
        UserError: the file cannot be written, or `start` is not such a checkpoint.
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
    progress, mean = Progress(steps, minutes), 0.0
    while (done := progress.done) < 1:
        step = progress.step
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
        progress.step += 1
        if progress.step % 50 == 0:
            parts = ", ".join(f"{name} {float(values.detach().mean()):.3f}" for name, values in losses.items())
            print(f"{progress.step} ({done:.0%})  loss {mean:.3f} ({parts})  {progress.seconds:.0f} s", flush=True)
    made = {"images": seen + progress.step * SETTINGS["batch"], "seed": seed, "settings": SETTINGS}
    write_weights(path, average.module.state_dict(), adapter.FAMILY, architecture, made)
    return path


def _optimizer(module: nn.Module) -> torch.optim.Optimizer:
    """AdamW without weight decay on biases, norms and relative position bias tables."""
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


if __name__ == "__main__":
    main("tools.shapes.train_vit", (__doc__ or "").splitlines()[0], train)
