"""Average precision by pycocotools."""

import contextlib
import io
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any, Literal

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

STATISTICS = {"AP": 0, "AP50": 1, "AP75": 2, "AP_small": 3, "AP_medium": 4, "AP_large": 5, "AR100": 8}


def evaluator() -> str:
    """The library that scores, with its version."""
    return f"pycocotools {version('pycocotools')}"


def score(
    content: dict[str, Any], detections: list[dict[str, Any]], kind: Literal["bbox", "segm"] = "bbox"
) -> dict[str, Any]:
    """COCO's metrics for boxes or masks.

    Args:
        content: a COCO detection file, with segmentations for `segm`.
        detections: COCO results; for `segm` with segmentations.
        kind: what is compared.

    Returns:
        AP, AP50, AP75, AP_small, AP_medium, AP_large and AR100 in [0, 1], -1 where no annotation counts; AP50_voc07,
        Pascal VOC 2007's AP: precision at IoU .5 at the eleven recalls 0, .1 ... 1 (VOC's later AP is close to AP50);
        per_class with the AP of each category that has annotations.
    """
    evaluation = matched(content, detections, kind)
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation.accumulate()
        evaluation.summarize()
    metrics: dict[str, Any] = {name: float(evaluation.stats[i]) for name, i in STATISTICS.items()}
    precision = evaluation.eval["precision"][:, :, :, 0, 2]  # [thresholds, recalls, categories], all areas, 100 boxes
    eleven = precision[0, ::10]
    metrics["AP50_voc07"] = float(np.mean(eleven[eleven > -1])) if (eleven > -1).any() else -1.0
    names = {category["id"]: category["name"] for category in content["categories"]}
    per_class = {}
    for k, category in enumerate(evaluation.params.catIds):
        counted = precision[:, :, k][precision[:, :, k] > -1]
        if len(counted):
            per_class[names[category]] = float(np.mean(counted))
    return metrics | {"per_class": per_class}


def as_objects(detections: Sequence[Mapping[str, Any]], lowest: float) -> list[dict[str, Any]]:
    """Detections, COCO results, of score `lowest` and more as the annotations of a COCO detection file.

    `area` is that of the box in square pixels, for masks too, so that with these only AP of all sizes is meant.
    """
    kept = [row for row in detections if row["score"] >= lowest]
    return [{**row, "id": i, "area": row["bbox"][2] * row["bbox"][3], "iscrowd": 0} for i, row in enumerate(kept, 1)]


def matched(
    content: dict[str, Any], detections: list[dict[str, Any]], kind: Literal["bbox", "segm"], areas: slice = slice(None)
) -> COCOeval:
    """pycocotools' evaluation up to where detections and objects of each image are matched.

    Args:
        content: as of `score`.
        detections: as of `score`.
        kind: what is compared.
        areas: which of COCO's sizes of objects: all, small, medium, large.
    """
    with contextlib.redirect_stdout(io.StringIO()):
        truth = _indexed(content)
        # pycocotools writes into the rows, and where one has a box it takes the box's area for the mask's.
        detections = [{k: v for k, v in row.items() if kind == "bbox" or k != "bbox"} for row in detections]
        found = truth.loadRes(detections) if detections else _indexed(content | {"annotations": []})
        evaluation = COCOeval(truth, found, kind)
        evaluation.params.areaRng = evaluation.params.areaRng[areas]
        evaluation.params.areaRngLbl = evaluation.params.areaRngLbl[areas]
        evaluation.evaluate()
    return evaluation


def _indexed(content: dict[str, Any]) -> COCO:
    coco = COCO()
    coco.dataset = content
    coco.createIndex()
    return coco
