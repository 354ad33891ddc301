"""mmdet's Mask R-CNN with a Swin as one graph: its inference on one image, in operators that trace to ONNX.

mmdet's own inference wraps tensors in objects that a tracer cannot follow. Here are the same steps: anchors, proposals,
regions pooled from the levels of the FPN, suppression (mmdet 3.3: rpn_head.py, delta_xywh_bbox_coder.py,
single_level_roi_extractor.py, bbox_nms.py).
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.ops import batched_nms, roi_align

from vit.models import normalised


class TwoStage(nn.Module):
    """An image [1, 3, H, W] in [0, 1] to boxes [n, 4], labels [n], scores [n], masks [n, 1, m, m] over their boxes."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model: Any = model

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        model, size = self.model, (int(images.shape[2]), int(images.shape[3]))
        features = model.extract_feat(normalised(model, images))
        proposals = self._proposals(features, size)
        head = model.roi_head.bbox_head
        logits, deltas = head(_pooled(features, proposals, model.roi_head.bbox_roi_extractor))
        scores = logits.softmax(1)[:, :-1]
        boxes = _decoded(head.bbox_coder, proposals[:, None], deltas.unflatten(1, (-1, 4)), size)  # [n, classes, 4]
        limits = model.roi_head.test_cfg
        row, label = (scores > limits.score_thr).nonzero(as_tuple=True)
        found, score = boxes[row, label], scores[row, label]
        kept = batched_nms(found, score, label, limits.nms.iou_threshold)[: limits.max_per_img]
        found, score, label = found[kept], score[kept], label[kept]
        masks = model.roi_head.mask_head(_pooled(features, found, model.roi_head.mask_roi_extractor))
        return found, label, score, masks[torch.arange(label.shape[0]), label][:, None].sigmoid()

    def _proposals(self, features: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
        """Boxes [n, 4] xyxy, best first."""
        head = self.model.rpn_head
        limits = head.test_cfg
        maps = list(zip(*head(features), strict=True))
        anchors = head.prior_generator.grid_priors([m.shape[-2:] for m, _ in maps], device=features[0].device)
        scores, boxes, levels = [], [], []
        for level, (priors, (score, delta)) in enumerate(zip(anchors, maps, strict=True)):
            score = score[0].permute(1, 2, 0).reshape(-1).sigmoid()
            delta = delta[0].permute(1, 2, 0).reshape(-1, 4)
            best, index = score.topk(min(limits.nms_pre, len(priors)))
            scores.append(best)
            boxes.append(_decoded(head.bbox_coder, priors[index], delta[index], size))
            levels.append(torch.full_like(index, level))
        box, score, level_of = torch.cat(boxes), torch.cat(scores), torch.cat(levels)
        inside = (box[:, 2:] > box[:, :2]).all(1).nonzero()[:, 0]
        box, score, level_of = box[inside], score[inside], level_of[inside]
        return box[batched_nms(box, score, level_of, limits.nms.iou_threshold)[: limits.max_per_img]]


def _decoded(coder: Any, boxes: Tensor, deltas: Tensor, size: tuple[int, int]) -> Tensor:
    """Boxes [..., 4] xyxy moved by deltas [..., 4], within an image of this height and width."""
    deltas = deltas * deltas.new_tensor(coder.stds) + deltas.new_tensor(coder.means)
    reach = abs(math.log(16 / 1000))  # mmdet's wh_ratio_clip
    sides = boxes[..., 2:] - boxes[..., :2]
    centres = (boxes[..., :2] + boxes[..., 2:]) / 2 + sides * deltas[..., :2]
    half = sides * deltas[..., 2:].clamp(-reach, reach).exp() / 2
    corners = torch.cat([centres - half, centres + half], -1)
    x, y = corners[..., 0::2].clamp(0, size[1]), corners[..., 1::2].clamp(0, size[0])
    return torch.stack([x[..., 0], y[..., 0], x[..., 1], y[..., 1]], -1)


def _pooled(features: Sequence[Tensor], boxes: Tensor, extractor: Any) -> Tensor:
    """Regions [n, C, side, side], each from the level of its size."""
    sides = (boxes[:, 2:] - boxes[:, :2]).prod(1).sqrt()
    level_of = (sides / extractor.finest_scale + 1e-6).log2().floor().clamp(0, len(extractor.roi_layers) - 1)
    rois = torch.cat([torch.zeros_like(boxes[:, :1]), boxes], 1)
    side, channels = extractor.roi_layers[0].output_size, features[0].shape[1]
    pooled = boxes.new_zeros(boxes.shape[0], channels, *side)
    for level, (layer, x) in enumerate(zip(extractor.roi_layers, features, strict=False)):
        index = (level_of == level).nonzero()[:, 0]
        pooled[index] = roi_align(x, rois[index], side, layer.spatial_scale, layer.sampling_ratio, layer.aligned)
    return pooled
