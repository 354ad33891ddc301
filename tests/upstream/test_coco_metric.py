"""mmdet's own CocoMetric measures the same AP of boxes and masks as zsqdet on the same detections."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask

from common.config.schema import DataConfig, EvaluationConfig
from common.detection.detector import load_detector
from common.evaluation import coco
from tools.shapes.generate import generate
from vit.adapter import FAMILY

from mmdet.evaluation import CocoMetric  # isort: skip  (after the adapter, which puts mmcv's operators in place)

WEIGHTS = Path(__file__).parents[2] / "tools/shapes/micro_vit.safetensors"
NAMES = {
    "AP": "mAP",
    "AP50": "mAP_50",
    "AP75": "mAP_75",
    "AP_small": "mAP_s",
    "AP_medium": "mAP_m",
    "AP_large": "mAP_l",
}


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Twelve drawn images, what zsqdet makes of the micro Swin's detections in them, and the detections."""
    folder = tmp_path_factory.mktemp("shapes") / "set"
    generate(folder, 12)
    detector = load_detector(FAMILY, WEIGHTS)
    data = DataConfig(images=folder / "images", annotations=folder / "annotations.json")
    settings = EvaluationConfig(image_size=192, confidence=0.05, iou=0.5, max_detections=100, batch_size=6)
    found = folder / "found.json"
    cpu = torch.device("cpu")
    metrics = coco.evaluate(detector, detector.build(), data, settings, device=cpu, predictions=found)
    return detector, folder / "annotations.json", metrics, json.loads(found.read_text())


def samples(annotations, rows):
    """The detections of each image as mmdet hands them to a metric."""
    content = json.loads(annotations.read_text())
    places = {category["id"]: i for i, category in enumerate(content["categories"])}
    for image in content["images"]:
        mine = [row for row in rows if row["image_id"] == image["id"]]
        boxes = torch.tensor([row["bbox"] for row in mine], dtype=torch.float64).view(-1, 4)
        planes = [coco_mask.decode(row["segmentation"]).astype(bool) for row in mine]
        yield {
            "img_id": image["id"],
            "ori_shape": (image["height"], image["width"]),
            "pred_instances": {
                "bboxes": torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1),
                "scores": torch.tensor([row["score"] for row in mine], dtype=torch.float64),
                "labels": torch.tensor([places[row["category_id"]] for row in mine], dtype=torch.int64),
                "masks": torch.from_numpy(np.array(planes).reshape(-1, image["height"], image["width"])),
            },
        }


def test_boxes_and_masks_have_the_ap_of_mmdets_metric(measured):
    detector, annotations, ours, rows = measured
    metric = CocoMetric(ann_file=str(annotations), metric=["bbox", "segm"])
    metric.dataset_meta = {"classes": detector.class_names}
    handed = list(samples(annotations, rows))
    metric.process({}, handed)
    theirs = metric.evaluate(len(handed))
    assert ours["AP"] > 0.05
    assert ours["segm"]["AP"] > 0.05
    assert ours["segm"]["AP"] != ours["AP"]
    for kind, metrics in (("bbox", ours), ("segm", ours["segm"])):
        for mine, its in NAMES.items():
            # mmdet rounds to three digits
            assert metrics[mine] == pytest.approx(theirs[f"coco/{kind}_{its}"], abs=5.1e-4), (kind, mine)
