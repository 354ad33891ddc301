"""Which epoch is kept: the one of highest fidelity to the teacher on held-out synthetic images."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from common.detection.average_precision import as_objects, score
from common.detection.detector import Detector
from common.detection.types import Detections
from common.runtime.distributed import gather

CONFIDENCE = 0.01  # lowest score that is ranked
OVERLAP = 0.7  # IoU of the suppression, as Ultralytics' validator
MOST = 100  # detections of an image
OBJECT = 0.1  # score from which a detection of the teacher is an object: sure ones alone are too few to compare by

Found = Mapping[int, Detections]  # by the number of the image


@torch.no_grad()
def detections(detector: Detector, module: nn.Module, batches: Iterable[tuple[Sequence[int], Tensor]]) -> Found:
    """What `module` finds in numbered images [B, 3, H, W]; several processes that look at some each know all."""
    rows = []
    for numbers, images in batches:
        found = detector.detect(module, images, CONFIDENCE, OVERLAP, MOST)
        rows += [
            (number, Detections(one.boxes.cpu(), one.scores.cpu(), one.labels.cpu()))
            for number, one in zip(numbers, found, strict=True)
        ]
    return dict(sorted(gather(rows), key=lambda row: row[0]))


def fidelity(teacher: Found, student: Found) -> float:
    """Fidelity AP: COCO's AP of the student's boxes with the teacher's, from a score of .1 on, as ground truth.

    All classes share one ranking. A mean over classes would be of one or two objects each, with a few dozen images.

    Returns:
        In [0, 1]; -1 where the teacher finds no object at all.
    """
    classes = 1 + max((int(label) for one in (*teacher.values(), *student.values()) for label in one.labels), default=0)
    truth = as_objects(_rows(teacher, classes), OBJECT)
    if not truth:
        return -1.0
    found = _rows(student, classes)
    content = {
        "images": [{"id": number} for number in sorted({row["image_id"] for row in (*truth, *found)})],
        "annotations": truth,
        "categories": [{"id": 1, "name": "object"}],
    }
    return float(score(content, found)["AP"])


def _rows(found: Found, classes: int) -> list[dict[str, Any]]:
    """COCO results of one category; each class of an image counts as an image, so that only equal classes match."""
    return [
        {
            "image_id": number * classes + label,
            "category_id": 1,
            "bbox": [x1, y1, x2 - x1, y2 - y1],
            "score": confidence,
        }
        for number, one in found.items()
        for (x1, y1, x2, y2), confidence, label in zip(
            one.boxes.tolist(), one.scores.tolist(), one.labels.tolist(), strict=True
        )
    ]


def chosen_epoch(history: Sequence[Mapping[str, Any]]) -> int | None:
    """The epoch whose weights are kept: that of the highest fidelity and, of several, that of the least loss.

    An epoch counts only if it is no worse in either than the first row, the detector before training. Without held-out
    images it is the last one; None without a history. Rows of a history have `epoch` and, on held-out images,
    `fidelity` and the loss `held_out`.
    """
    scored = [row for row in history if math.isfinite(row.get("held_out", math.nan))]
    if scored:
        first, *_ = ranks = [(row.get("fidelity", -1.0), -row["held_out"]) for row in scored]
        nearer = [i for i, rank in enumerate(ranks) if all(a >= b for a, b in zip(rank, first, strict=True))]
        return int(scored[max(nearer, key=ranks.__getitem__)]["epoch"])
    return int(history[-1]["epoch"]) if history else None
