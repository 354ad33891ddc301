"""What YOLO11 and YOLOv5 share of export: outputs as Ultralytics' exports have them, then suppression and masks."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.ops import roi_align
from ultralytics.utils.nms import non_max_suppression

from common.detection.types import Detections

OUTPUTS = {"output0": {0: "batch", 2: "anchors"}}  # [B, 4 + nc, N]: xywh in pixels (centre), scores in [0, 1]
ONE_TO_ONE = {"output0": {0: "batch"}}  # [B, 300, 6]: xyxy in pixels, score, class; best first
MASKS = {"output1": {0: "batch", 2: "mask_height", 3: "mask_width"}}  # [B, n, h, w]: prototypes; n more rows in output0
GRID, AT_ONCE = 56, 64  # places along the sides of a box's mask; boxes whose prototypes are sampled together


class Expectation(nn.Module):
    """The mean of a box side's distribution, as `DFL` of Ultralytics has it, from two sums in one matrix product.

    Its softmax over an axis that is not the last one takes ONNX Runtime a fifth of YOLO11n's time, this a fiftieth.
    """

    sums: Tensor

    def __init__(self, bins: int) -> None:
        super().__init__()
        self.register_buffer("sums", torch.stack([torch.arange(bins), torch.ones(bins)]).float())

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, 4 * bins, N] to distances [B, 4, N] in strides."""
        x = x.unflatten(1, (4, -1))
        mean, total = torch.matmul(self.sums, (x - x.amax(2, keepdim=True)).exp()).unbind(2)
        return mean / total


class Decoded(nn.Module):
    """A DetectionModel of Ultralytics with the output that its own exports have."""

    module: Any

    def __init__(self, module: nn.Module, one_to_one: bool = False) -> None:
        super().__init__()
        self.module, self.one_to_one = module, one_to_one
        head = self.module.model[-1]
        head.export, head.format, head.dynamic = True, "onnx", True
        if head.reg_max > 1:
            head.dfl = Expectation(head.reg_max)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Images [B, 3, H, W] in [0, 1] to `output0` and, of a model with masks, `output1`."""
        return decoded(self.module, images, self.one_to_one)


def decoded(module: Any, images: Tensor, one_to_one: bool) -> tuple[Tensor, ...]:
    """What `OUTPUTS` or `ONE_TO_ONE`, and `MASKS`, say of images [B, 3, H, W] in [0, 1], by Ultralytics' decoding."""
    out, head = module(images), module.model[-1]
    out = out if head.export else out[0]  # raw maps are beside it
    rows, *prototypes = out if isinstance(out, tuple) else (out,)
    return (head.postprocess(rows.transpose(1, 2)) if one_to_one else rows, *prototypes)


def best(rows: Tensor, confidence: float, max_detections: int) -> list[Tensor]:
    """The rows [B, n, 6 and more] of a head without suppression that are sure enough; best first."""
    return [r[r[:, 4] > confidence][:max_detections] for r in rows]


def suppressed(rows: Tensor, confidence: float, iou: float, max_detections: int, classes: int = 0) -> list[Tensor]:
    """Ultralytics' own suppression of `output0`, by class, several labels to a box, as its validator calls it.

    Rows [n, 6 and more] of each image: xyxy, score, class, and what follows the scores of `classes` (0: nothing does).
    """
    # the time limit would drop the images after it
    found: list[Tensor] = non_max_suppression(
        rows, confidence, iou, multi_label=True, max_det=max_detections, nc=classes, max_time_img=60.0
    )
    return found


def as_detections(found: Sequence[Tensor], prototypes: Tensor | None = None, stride: float = 4.0) -> list[Detections]:
    """Detections of rows [n, 6 and more] of each image; where they have masks, boxes end at the image's border.

    Args:
        found: xyxy, score, class, coefficients of the prototypes.
        prototypes: [B, n, h, w].
        stride: of the prototypes, pixels.
    """
    if prototypes is None:
        return [Detections(r[:, :4].float(), r[:, 4].float(), r[:, 5].long()) for r in found]
    height, width = (stride * side for side in prototypes.shape[2:])
    limit = prototypes.new_tensor([width, height] * 2).float()
    detections = []
    for rows, own in zip(found, prototypes, strict=True):
        boxes = torch.minimum(rows[:, :4].float().clamp(min=0), limit)
        masks = _grids(rows[:, 6:], own, boxes, stride)
        detections.append(Detections(boxes, rows[:, 4].float(), rows[:, 5].long(), masks))
    return detections


def _grids(coefficients: Tensor, prototypes: Tensor, boxes: Tensor, stride: float) -> Tensor:
    """Probabilities [n, m, m] of the mask over each box: the sum of prototypes, read bilinearly inside of it."""
    parts = [torch.zeros(0, GRID, GRID, device=boxes.device)]
    for own, places in zip(coefficients.float().split(AT_ONCE), boxes.float().split(AT_ONCE), strict=True):
        inside = roi_align(prototypes[None].float(), [places], (GRID, GRID), 1 / stride, 1, aligned=True)
        parts.append(torch.einsum("nc,nchw->nhw", own, inside).sigmoid())
    return torch.cat(parts)
