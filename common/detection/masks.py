"""Instance masks: from a box's own grid to the image, and as COCO's run-length encoding."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from pycocotools import mask as coco_mask
from torch import Tensor
from torch.nn import functional as F
from torchvision.models.detection.roi_heads import paste_masks_in_image

THRESHOLD = 0.5  # of a pixel's probability (He et al., arXiv 1703.06870, section 3.1)


def paste(masks: Tensor, boxes: Tensor, height: int, width: int) -> Tensor:
    """Probabilities [n, m, m], each stretched over its box [n, 4] xyxy, as masks [n, height, width] bool of the image.

    The interpolation is torchvision's, whose evaluation does the same.
    """
    return paste_masks_in_image(masks[:, None].float(), boxes.float(), (height, width))[:, 0] > THRESHOLD


def resize_masks(masks: Tensor, height: int, width: int) -> Tensor:
    """The nearest pixels: masks [n, h, w] bool -> [n, height, width] bool."""
    return F.interpolate(masks[:, None].to(torch.uint8), (height, width), mode="nearest-exact")[:, 0].bool()


def encode(masks: Tensor) -> list[dict[str, Any]]:
    """Masks [n, h, w] bool as COCO's compressed run lengths, JSON-able."""
    encoded = [coco_mask.encode(np.asfortranarray(m.cpu().numpy().astype(np.uint8))) for m in masks]
    return [{"size": list(e["size"]), "counts": e["counts"].decode("ascii")} for e in encoded]


def decode(segmentations: Sequence[Any], height: int, width: int) -> Tensor:
    """COCO's segmentations (polygons, run lengths, compressed or not) as masks [n, height, width] bool.

    Raises:
        ValueError, TypeError, KeyError: not a segmentation, or of another size.
    """
    planes = np.zeros((len(segmentations), height, width), np.bool_)
    for plane, found in zip(planes, segmentations, strict=True):
        encoded = found
        if isinstance(found, list):
            encoded = coco_mask.merge(coco_mask.frPyObjects(found, height, width))
        elif isinstance(found["counts"], list):
            encoded = coco_mask.frPyObjects(found, height, width)
        plane[:] = coco_mask.decode(encoded)
    return torch.from_numpy(planes)
