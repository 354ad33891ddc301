"""The training loss of YOLO11 and its relatives for each image by itself.

Formulas: Ultralytics' v8DetectionLoss, its assigner, and for heads without suppression one half of its E2ELoss.
"""

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from torchvision.ops import box_convert
from ultralytics.nn.modules.head import Segment, Segment26
from ultralytics.utils.loss import SegmentLoss26, v8SegmentationLoss
from ultralytics.utils.metrics import bbox_iou
from ultralytics.utils.tal import TaskAlignedAssigner

from common.detection.masks import resize_masks
from common.detection.roi_losses import ellipses
from common.detection.types import Targets

BOX_GAIN, CLASS_GAIN, DFL_GAIN = 7.5, 0.5, 1.5  # Ultralytics' defaults, those of the official training
CANDIDATES = 10  # places that a box is assigned to
ONE_TO_ONE = (7, 1)  # without suppression: candidates, and how many of them stay


class _Assigner(TaskAlignedAssigner):
    """Ultralytics' assignment of places to boxes, for all pairs of them, so that no index depends on a value."""

    def get_box_metrics(
        self, pd_scores: Tensor, pd_bboxes: Tensor, gt_labels: Tensor, gt_bboxes: Tensor, mask_gt: Tensor, **extra: Any
    ) -> tuple[Tensor, Tensor]:
        """Alignment and overlap [B, boxes, places], 0 where a place is outside of the box."""
        inside = mask_gt.bool()
        overlap = bbox_iou(gt_bboxes[:, :, None], pd_bboxes[:, None], xywh=False, CIoU=True).squeeze(-1).clamp(0)
        overlap = torch.where(inside, overlap, 0.0)
        classes = gt_labels.squeeze(-1).long()[:, None].expand(-1, pd_scores.shape[1], -1)
        scores = pd_scores.gather(2, classes).transpose(1, 2)
        return torch.where(inside, scores.pow(self.alpha) * overlap.pow(self.beta), 0.0), overlap

    def select_candidates_in_gts(
        self, xy_centers: Tensor, gt_bboxes: Tensor, mask_gt: Tensor, eps: float = 1e-9
    ) -> Tensor:
        """Places inside each box [B, boxes, places]; sides below a stride of the middle level count as that long."""
        centre = (gt_bboxes[..., :2] + gt_bboxes[..., 2:]) / 2
        half = (gt_bboxes[..., 2:] - gt_bboxes[..., :2]).clamp(min=self.stride_val) / 2
        low, high = (centre - half)[:, :, None], (centre + half)[:, :, None]
        return torch.minimum(xy_centers - low, high - xy_centers).amin(-1) > eps


def losses(
    maps: Sequence[Tensor],
    scores: Tensor,
    boxes: Tensor,
    pixels: torch.Size,
    targets: Sequence[Targets],
    one_to_one: bool = False,
) -> Mapping[str, Tensor]:
    """Losses `box`, `cls` and `dfl` (`l1` with one bin), [B] each, gains included: v8DetectionLoss on that one image.

    Shapes are fixed and nothing is selected, so a GPU never waits: what is not assigned weighs nothing.

    Args:
        maps: of each level [B, C, h, w]; only their sizes count.
        scores: logits [B, N, classes] of all places of all levels.
        boxes: logits [B, N, 4, bins] of the distances from a place to the sides of its box; one bin is the distance.
        pixels: height and width of the images.
        targets: of each image; boxes xyxy, pixels.
        one_to_one: a head without suppression, where each box has one place.
    """
    scores, boxes = scores.float(), boxes.float()
    centres, strides = _places(maps, pixels, scores.device)
    bins = torch.arange(boxes.shape[-1], device=boxes.device)
    # [B, N, 4] in strides; no matrix product, which autocast would round
    distance = (boxes.softmax(-1) * bins).sum(-1) if len(bins) > 1 else boxes.squeeze(-1)
    predicted = torch.cat([centres - distance[..., :2], centres + distance[..., 2:]], -1)  # in strides
    wanted = pad_sequence([t.boxes.to(scores.device).float() for t in targets], batch_first=True)
    labels = pad_sequence([t.labels.to(scores.device) for t in targets], batch_first=True)[..., None]
    sides = [pixels[0] // level.shape[2] for level in maps]
    most, kept = ONE_TO_ONE if one_to_one else (CANDIDATES, None)
    assigner = _Assigner(most, scores.shape[2], alpha=0.5, beta=6.0, stride=sides, topk2=kept)
    _, assigned, hot, chosen, _ = assigner(
        scores.detach().sigmoid(),
        predicted.detach() * strides,
        centres * strides,
        labels,
        wanted,
        (wanted.sum(2, keepdim=True) > 0).float(),
    )
    weight = torch.where(chosen, hot.sum(-1), 0.0)  # [B, N]
    total = hot.sum((1, 2)).clamp(min=1)
    overlap = bbox_iou(predicted, assigned / strides, xywh=False, CIoU=True).squeeze(-1)
    found = {
        "box": BOX_GAIN * ((1 - overlap) * weight).sum(1),
        "cls": CLASS_GAIN * F.binary_cross_entropy_with_logits(scores, hot.float(), reduction="none").sum((1, 2)),
    }
    if len(bins) > 1:
        found["dfl"] = DFL_GAIN * (_distribution_loss(boxes, centres, assigned / strides) * weight).sum(1)
    else:
        sizes = torch.tensor([pixels[1], pixels[0]] * 2, device=boxes.device) / strides
        found["l1"] = DFL_GAIN * (_distance_loss(distance / sizes, centres, assigned / strides, sizes) * weight).sum(1)
    return {name: value / total for name, value in found.items()}


def segmentation_losses(
    head: Segment, raw: Mapping[str, Any], targets: Sequence[Targets], one_to_one: bool = False
) -> Mapping[str, Tensor]:
    """Losses `box`, `mask`, `cls` and `dfl` or `l1`, [B] each, gains included: Ultralytics' criterion on each image.

    Args:
        head: of the module.
        raw: what it gives in training, with `proto`.
        targets: of each image; masks that are missing are ellipses.
        one_to_one: as in `losses`.
    """
    args = SimpleNamespace(box=BOX_GAIN, cls=CLASS_GAIN, dfl=DFL_GAIN, overlap_mask=False)
    model: Any = SimpleNamespace(model=[head], parameters=head.parameters, args=args)
    kind = SegmentLoss26 if isinstance(head, Segment26) else v8SegmentationLoss
    criterion = kind(model, *(ONE_TO_ONE if one_to_one else ()))
    height, width = (int(n * head.stride[0]) for n in raw["feats"][0].shape[2:])
    rows = []
    for i, target in enumerate(targets):
        one: Any = {n: [m[i : i + 1] for m in v] if n == "feats" else v[i : i + 1].float() for n, v in raw.items()}
        boxes = target.boxes.to(raw["proto"].device).float()
        masks = ellipses(boxes, height, width) if target.masks is None else target.masks.to(boxes.device)
        wanted = {
            "batch_idx": boxes.new_zeros(len(boxes)),
            "cls": target.labels.to(boxes),
            "bboxes": box_convert(boxes, "xyxy", "cxcywh") / boxes.new_tensor([width, height] * 2),
            "masks": resize_masks(masks, *raw["proto"].shape[2:]).float(),
        }
        rows.append(criterion.loss(one, wanted)[0][:4])
    names = ("box", "mask", "cls", "dfl" if head.reg_max > 1 else "l1")
    return dict(zip(names, torch.stack(rows, 1), strict=True))


def _places(maps: Sequence[Tensor], pixels: torch.Size, device: torch.device) -> tuple[Tensor, Tensor]:
    """The centre of each place in units of its stride [N, 2], and that stride in pixels [N, 1]."""
    centres, strides = [], []
    for level in maps:
        height, width = level.shape[2:]
        rows, columns = (torch.arange(n, device=device) + 0.5 for n in (height, width))
        centres.append(torch.stack(torch.meshgrid(columns, rows, indexing="xy"), -1).view(-1, 2))
        strides.append(torch.full((height * width, 1), pixels[0] / height, device=device))
    return torch.cat(centres), torch.cat(strides)


def _sides(centres: Tensor, assigned: Tensor) -> Tensor:
    """Distances from places to the sides of their boxes, in strides, [B, N, 4]."""
    return torch.cat([centres - assigned[..., :2], assigned[..., 2:] - centres], -1)


def _distance_loss(distance: Tensor, centres: Tensor, assigned: Tensor, sizes: Tensor) -> Tensor:
    """Absolute error of the distances relative to the image, mean over the sides, [B, N]."""
    return (distance - _sides(centres, assigned) / sizes).abs().mean(-1)


def _distribution_loss(boxes: Tensor, centres: Tensor, assigned: Tensor) -> Tensor:
    """Cross-entropy to the two bins around the distance (Li et al., arXiv 2006.04388), mean over the sides, [B, N]."""
    last = boxes.shape[-1] - 1
    distance = _sides(centres, assigned).clamp(0, last - 0.01)
    left = distance.long()
    share = distance - left
    logs = boxes.log_softmax(-1)
    of_left, of_right = (logs.gather(-1, (left + k)[..., None]).squeeze(-1) for k in (0, 1))
    return -(of_left * (1 - share) + of_right * share).mean(-1)
