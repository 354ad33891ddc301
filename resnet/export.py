"""torchvision's two-stage detectors as one graph: boxes, labels, scores and the grids of masks of one image."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torchvision.ops import batched_nms

from common.detection.types import Detections

OUTPUTS = {"boxes": {0: "detections"}, "labels": {0: "detections"}, "scores": {0: "detections"}}
MASKS = {"masks": {0: "detections"}}
CONFIDENCE, IOU, DETECTIONS = 0.05, 0.5, 100  # of the graph's own suppression: torchvision's defaults


class TwoStage(nn.Module):
    """An image [1, 3, H, W] in [0, 1] to boxes [n, 4], labels [n] (the head's outputs), scores [n], masks [n, 1, m, m].

    Masks stay grids over their boxes: pasting them takes seconds in a graph.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        heads: Any = model.roi_heads
        heads.score_thresh, heads.nms_thresh, heads.detections_per_img = CONFIDENCE, IOU, DETECTIONS

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        found = self.model([images[0]])[0]
        return tuple(found[name] for name in (*OUTPUTS, *MASKS) if name in found)


def detections_of(
    outputs: Sequence[Tensor], classes: Tensor, confidence: float, iou: float, max_detections: int
) -> list[Detections]:
    """The one image's detections; `classes` [outputs] has the class of each output of the head, -1 for none.

    What the graph has suppressed already is gone: lower limits than its own change nothing.
    """
    boxes, heads, scores, *masks = outputs
    labels = classes[heads]
    kept = ((scores > confidence) & (labels >= 0)).nonzero()[:, 0]
    kept = kept[batched_nms(boxes[kept], scores[kept], labels[kept], iou)][:max_detections]
    grids = masks[0][kept, 0] if masks else None
    return [Detections(boxes[kept], scores[kept], labels[kept].long(), grids)]
