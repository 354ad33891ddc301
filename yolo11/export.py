"""What YOLO11 and YOLOv5 share of export: one output as Ultralytics' exports have it, and the suppression after it."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from ultralytics.utils.nms import non_max_suppression

from common.detection.types import Detections

OUTPUTS = {"output0": {0: "batch", 2: "anchors"}}  # [B, 4 + nc, N]: xywh in pixels (centre), scores in [0, 1]
ONE_TO_ONE = {"output0": {0: "batch"}}  # [B, 300, 6]: xyxy in pixels, score, class; best first


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

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [0, 1] to `output0`."""
        return output0(self.module, images, self.one_to_one)


def output0(module: Any, images: Tensor, one_to_one: bool) -> Tensor:
    """What `OUTPUTS` or `ONE_TO_ONE` say of images [B, 3, H, W] in [0, 1], by Ultralytics' own decoding."""
    out = module(images)
    rows: Tensor = out[0] if isinstance(out, tuple) else out
    return module.model[-1].postprocess(rows.transpose(1, 2)) if one_to_one else rows


def best(rows: Tensor, confidence: float, max_detections: int) -> list[Detections]:
    """The rows [B, n, 6] of a head without suppression that are sure enough; best first."""
    found = [r[r[:, 4] > confidence][:max_detections].float() for r in rows]
    return [Detections(r[:, :4], r[:, 4], r[:, 5].long()) for r in found]


def suppressed(rows: Tensor, confidence: float, iou: float, max_detections: int) -> list[Detections]:
    """Ultralytics' own suppression of `output0`, by class, several labels to a box, as its validator calls it."""
    # rows [n, 6]: xyxy, score, class; the time limit would drop the images after it
    found: Sequence[Tensor] = non_max_suppression(
        rows, confidence, iou, multi_label=True, max_det=max_detections, max_time_img=60.0
    )
    return [Detections(r[:, :4].float(), r[:, 4].float(), r[:, 5].long()) for r in found]
