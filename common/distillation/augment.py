"""Random mirroring and zooming of training images; the labels follow."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from common.detection.masks import resize_masks
from common.detection.types import Targets
from common.runtime.image_files import GREY


def augment(
    images: Tensor, targets: Sequence[Targets], flip: bool, scale: tuple[float, float], draws: Tensor
) -> tuple[Tensor, list[Targets]]:
    """Each image [3, H, W] of a batch by itself: mirrored with probability 1/2, zoomed and moved at random.

    Args:
        images: [B, 3, H, W] in [0, 1].
        targets: of each image.
        flip: whether to mirror at all.
        scale: range of the zoom, drawn evenly in its logarithm; what is left free is grey.
        draws: [B, 4] in [0, 1], random, on the CPU: whether to mirror, how far to zoom, where to move it (two).

    Returns:
        Images of the same size, and the boxes that are still at least two pixels wide and high.
    """
    changed_images, changed_targets = [], []
    for image, target, (mirror, zoom, right, down) in zip(images, targets, draws.tolist(), strict=True):
        if flip and mirror < 0.5:
            image, target = _mirrored(image, target)
        if scale != (1.0, 1.0):
            factor = math.exp(math.log(scale[0]) + zoom * (math.log(scale[1]) - math.log(scale[0])))
            image, target = _zoomed(image, target, factor, right, down)
        changed_images.append(image)
        changed_targets.append(target)
    return torch.stack(changed_images), changed_targets


def _mirrored(image: Tensor, target: Targets) -> tuple[Tensor, Targets]:
    x1, y1, x2, y2 = target.boxes.unbind(1)
    width = image.shape[2]
    masks = None if target.masks is None else target.masks.flip(2)
    return image.flip(2), Targets(torch.stack([width - x2, y1, width - x1, y2], 1), target.labels, masks)


def _zoomed(image: Tensor, target: Targets, factor: float, right: float, down: float) -> tuple[Tensor, Targets]:
    """`right` and `down` in [0, 1] say where the image lies in, or over, the frame."""
    height, width = image.shape[1:]
    new_height, new_width = max(round(height * factor), 1), max(round(width * factor), 1)
    resized = F.interpolate(image[None], (new_height, new_width), mode="bilinear", antialias=factor < 1)[0]
    left, top = round((width - new_width) * right), round((height - new_height) * down)
    canvas = _moved(resized, torch.full_like(image, GREY / 255), top, left)
    scale = target.boxes.new_tensor([new_width / width, new_height / height] * 2)
    boxes = target.boxes * scale + target.boxes.new_tensor([left, top] * 2)
    boxes = torch.minimum(boxes.clamp(min=0), boxes.new_tensor([width, height] * 2))
    visible = ((boxes[:, 2:] - boxes[:, :2]) >= 2).all(1)
    masks = target.masks
    if masks is not None:
        masks = _moved(resize_masks(masks[visible], new_height, new_width), torch.zeros_like(masks[visible]), top, left)
    return canvas, Targets(boxes[visible], target.labels[visible], masks)


def _moved(content: Tensor, frame: Tensor, top: int, left: int) -> Tensor:
    """`frame` [n, H, W] with what of `content` [n, h, w] lies in it; its corner comes to (`top`, `left`)."""
    height, width = frame.shape[1:]
    inside = content[:, max(-top, 0) : max(-top, 0) + height, max(-left, 0) : max(-left, 0) + width]
    y, x = max(top, 0), max(left, 0)
    frame[:, y : y + inside.shape[1], x : x + inside.shape[2]] = inside
    return frame
