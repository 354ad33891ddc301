"""Instance masks: from a box's own grid to the image, and as COCO's run-length encoding."""

import math
from array import array
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from pycocotools import mask as coco_mask
from torch import Tensor
from torch.nn import functional as F
from torchvision.models.detection.roi_heads import paste_masks_in_image
from torchvision.ops import roi_align

from common.detection.coco_mistakes import short

THRESHOLD = 0.5  # of a pixel's probability (He et al., arXiv 1703.06870, section 3.1)
SMALLEST_CUT = 0.01  # pixels; less is a rounding of the box
PASTED = 16  # masks of an image that are float at once
FARTHEST = 10  # sides of the image that a polygon may leave it by; the work of drawing one grows with its length
POLYGONS = "a list of polygons [x1, y1, x2, y2, x3, y3, ...] of at least three points each"


def paste(masks: Tensor, boxes: Tensor, height: int, width: int) -> Tensor:
    """Probabilities [n, m, m], each stretched over its box [n, 4] xyxy, as masks [n, height, width] bool of the image.

    The interpolation is torchvision's, whose evaluation does the same.
    """
    return paste_masks_in_image(masks[:, None].float(), boxes.float(), (height, width))[:, 0] > THRESHOLD


def cut(masks: Tensor, boxes: Tensor, inner: Tensor) -> Tensor:
    """The part of each grid [n, m, m] over a box [n, 4] xyxy that lies over its part `inner` [n, 4], as grids alike."""
    changed = ((boxes - inner).abs() > SMALLEST_CUT).any(1).nonzero()[:, 0]
    if not len(changed):
        return masks
    outer, side = boxes[changed].float(), masks.shape[-1]
    corner, size = outer[:, :2].repeat(1, 2), (outer[:, 2:] - outer[:, :2]).clamp(min=1e-6).repeat(1, 2)
    places = (inner[changed].float() - corner) / size * side  # in places of the grid
    rows = torch.cat([torch.arange(len(changed), device=places.device)[:, None].to(places), places], 1)
    parts = roi_align(masks[changed, None].float(), rows, (side, side), 1.0, 1, aligned=True)[:, 0]
    return masks.index_copy(0, changed, parts.to(masks.dtype))


def resize_masks(masks: Tensor, height: int, width: int) -> Tensor:
    """The nearest pixels: masks [n, h, w] bool -> [n, height, width] bool."""
    return F.interpolate(masks[:, None].to(torch.uint8), (height, width), mode="nearest-exact")[:, 0].bool()


def encode(masks: Tensor) -> list[dict[str, Any]]:
    """Masks [n, h, w] bool as COCO's compressed run lengths, JSON-able."""
    encoded = [coco_mask.encode(np.asfortranarray(m.cpu().numpy().astype(np.uint8))) for m in masks]
    return [{"size": list(e["size"]), "counts": e["counts"].decode("ascii")} for e in encoded]


def encode_pasted(masks: Tensor, boxes: Tensor, height: int, width: int) -> list[dict[str, Any]]:
    """`encode` of `paste`, a few at a time: 300 masks of a photograph would be 400 MB of float."""
    parts = zip(masks.split(PASTED), boxes.split(PASTED), strict=True)
    return [mask for part, places in parts for mask in encode(paste(part, places, height, width))]


def decode(segmentations: Sequence[Any], height: int, width: int) -> Tensor:
    """COCO's segmentations (polygons, run lengths, compressed or not) as masks [n, height, width] bool.

    Raises:
        ValueError: not a segmentation, or of another size.
    """
    planes = np.zeros((len(segmentations), height, width), np.bool_)
    for plane, found in zip(planes, segmentations, strict=True):
        wrong = check_segmentation(found, height, width)
        if wrong:
            raise ValueError(f"found {short(found)}; allowed: {wrong}")
        encoded = found
        if isinstance(found, list):
            encoded = coco_mask.merge(coco_mask.frPyObjects(found, height, width))
        elif isinstance(found["counts"], list):
            encoded = coco_mask.frPyObjects(found, height, width)
        plane[:] = coco_mask.decode(encoded)
    return torch.from_numpy(planes)


def compact(found: Any) -> Any:
    """A segmentation of a file, its polygons as arrays of float64: a quarter of the memory of lists."""
    try:
        if isinstance(found, list) and all(type(p) is list and set(map(type, p)) <= {int, float} for p in found):
            return [array("d", polygon) for polygon in found]
    except OverflowError:  # a whole number of 400 digits
        pass
    return found


def check_segmentation(found: Any, height: int, width: int) -> str | None:
    """What would be allowed in the place of a segmentation of an image of this size, None where it is right.

    pycocotools' C code reads and writes outside its memory for some that are wrong.
    """
    if isinstance(found, list) and found:
        reach = FARTHEST * max(height, width)
        return None if all(_is_polygon(polygon, reach) for polygon in found) else POLYGONS
    if not isinstance(found, dict):
        return f"{POLYGONS}, or run lengths (`size` and `counts`)"
    if found.get("size") != [height, width] or any(type(side) is bool for side in found["size"]):
        return f"run lengths whose size is the image's, [{height}, {width}]"
    runs = _runs(found.get("counts"))
    if runs is None or min(runs, default=-1) < 0 or sum(runs) != height * width:
        return f"run lengths of 0 and more that add up to the image's {height * width} pixels"
    return None


def _is_polygon(polygon: Any, reach: float) -> bool:
    return (
        isinstance(polygon, list | array)
        and len(polygon) >= 6
        and len(polygon) % 2 == 0
        and (isinstance(polygon, array) or set(map(type, polygon)) <= {int, float})
        and min(polygon) >= -reach
        and max(polygon) <= reach
        and not any(map(math.isnan, polygon))
    )


def _runs(counts: Any) -> list[int] | None:
    """The lengths of the runs in `counts` of COCO's run-length encoding, compressed or not; None where it is neither.

    Compressed, each number is written in groups of 5 bits, lowest first, as letters from "0" on whose sixth bit says
    that another one follows; from the fourth number on it is the difference to the number two before it.
    """
    if isinstance(counts, list):
        return counts if set(map(type, counts)) <= {int} else None
    if not isinstance(counts, str) or not counts.isascii():
        return None
    runs: list[int] = []
    number = shift = 0
    for letter in counts.encode():
        group = letter - 48
        if not 0 <= group < 64 or shift > 30:
            return None
        number |= (group & 31) << shift
        shift += 5
        if not group & 32:
            if group & 16:
                number -= 1 << shift
            runs.append(number + (runs[-2] if len(runs) > 2 else 0))
            number = shift = 0
    return None if shift else runs
