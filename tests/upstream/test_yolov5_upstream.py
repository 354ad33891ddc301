"""YOLOv5 in full precision is measured as its own val.py measures it: the same detections, and the known metric."""

import json
import os
from pathlib import Path

import pytest
import torch
from test_evaluation_upstream import detections_without_counterpart, yolo_copy
from upstream import yolov5_val

from common.checkpoints.read import read_checkpoint
from common.config.load import load_config
from common.evaluation import coco
from yolov5.adapter import load

ROOT = Path(__file__).parents[2]
SHARED = Path(os.environ.get("ZSQDET_SHARED", "../shared"))
WEIGHTS = SHARED / "weights/yolov5n.pt"


def labels_of(annotations):
    """Rows class, xyxy of each image, by its id."""
    categories = [row["id"] for row in sorted(annotations["categories"], key=lambda row: row["id"])]
    rows = {image["id"]: [] for image in annotations["images"]}
    for row in annotations["annotations"]:
        x, y, w, h = row["bbox"]
        rows[row["image_id"]].append([categories.index(row["category_id"]), x, y, x + w, y + h])
    return {key: torch.tensor(value).float().reshape(-1, 5) for key, value in rows.items()}


@pytest.mark.skipif(not WEIGHTS.exists(), reason="needs the shared weights")
@pytest.mark.skipif(not (SHARED / "coco/images/val2017").exists(), reason="needs the shared images")
def test_a_real_detector_is_measured_as_val_py_does(tmp_path):
    _, data = yolo_copy(tmp_path, 40)
    annotations = json.loads(data.annotations.read_text())
    paths = [data.images / Path(image["file_name"]).name for image in annotations["images"]]
    config = load_config(ROOT / "configs/yolov5/yolov5n_cpu.yaml").evaluation
    found, scaled = yolov5_val.detections(read_checkpoint(WEIGHTS).state, paths, 320, config.batch_size)
    detector, predictions = load(WEIGHTS), tmp_path / "predictions.json"
    metrics = coco.evaluate(
        detector, detector.build(), data, config, device=torch.device("cpu"), predictions=predictions
    )
    rows = json.loads(predictions.read_text())
    assert len(rows) == sum(map(len, found)) > 4000
    unlike, ours = 0, []
    for i, image in enumerate(annotations["images"]):
        own = [row for row in rows if row["image_id"] == image["id"]]
        unlike += detections_without_counterpart(own, found[i], data)
        ours.append(torch.tensor([[*row["bbox"], row["score"], row["category_id"]] for row in own]))
        ours[i][:, 2:4] += ours[i][:, :2]
        ours[i][:, 5] = torch.tensor([class_of(annotations, row["category_id"]) for row in own])
    assert unlike <= 0.001 * len(rows)  # float32 decides where two boxes overlap by .6 to the last digit
    labels = labels_of(annotations)
    labels = [labels[image["id"]] for image in annotations["images"]]
    upstream = yolov5_val.average_precision(scaled, labels)
    assert yolov5_val.average_precision(ours, labels) == pytest.approx(upstream, abs=2e-3)
    assert metrics["AP"] == pytest.approx(upstream, abs=0.02)  # another interpolation, and 100 detections of an image
    assert metrics["AP"] > 0.15


def class_of(annotations, category):
    return sorted(row["id"] for row in annotations["categories"]).index(category)


def test_the_reference_metric_is_right_where_the_answer_is_known():
    """Two labels, of which one is found twice: precision 1 up to recall .5, then from .5 straight down to 0."""
    labels = torch.tensor([[0.0, 0, 0, 10, 10], [0.0, 50, 50, 60, 60]])
    rows = torch.tensor([[0.0, 0, 10, 10, 0.9, 0], [0.0, 0, 10, 10, 0.8, 0]])
    assert yolov5_val.average_precision([rows], [labels]) == pytest.approx(0.5 + 0.5 * 0.5 / 2, abs=0.01)
