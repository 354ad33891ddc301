"""Evaluation shows a detector the images of Ultralytics' validator, and its AP is that of mmdet's own CocoMetric.

YOLOv5 in full precision is measured as its own val.py measures it: the same detections, and the known metric.
"""

import json
import math
import os
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask
from upstream import yolov5_val

from common.checkpoints.read import read_checkpoint
from common.config.load import load_config
from common.config.schema import DataConfig, EvaluationConfig
from common.detection.detector import load_detector
from common.evaluation import coco
from common.evaluation.resize import make_batches, place
from common.runtime.files import write_json
from common.runtime.image_files import read_image
from tools.shapes.generate import generate
from vit.adapter import FAMILY

from mmdet.evaluation import CocoMetric  # isort: skip  (after the adapter, which puts mmcv's operators in place)

ROOT = Path(__file__).parents[2]
SHARED = Path(os.environ.get("ZSQDET_SHARED", "../shared"))
YOLOV5N = SHARED / "weights/yolov5n.pt"


def ultralytics_dataset(folder, image_size, stride, batch_size, rectangular):
    """The dataset that Ultralytics' validator builds."""
    from ultralytics.cfg import get_cfg
    from ultralytics.data import build_yolo_dataset

    settings = get_cfg(overrides={"imgsz": image_size, "rect": rectangular, "task": "detect"})
    data = {"names": {0: "thing"}, "nc": 1, "channels": 3}
    return build_yolo_dataset(settings, str(folder / "images"), batch_size, data, mode="val", stride=stride)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Noisy images of many shapes and kinds as Ultralytics wants them, each with one labelled box."""
    folder = tmp_path_factory.mktemp("pictures")
    (folder / "images").mkdir()
    (folder / "labels").mkdir()
    rng = np.random.default_rng(0)
    sizes = rng.integers(10, 160, (28, 2)).tolist()
    sizes += [[64, 64], [32, 64], [64, 32], [128, 96], [10, 150], [150, 10], [96, 128], [63, 64], [65, 64], [100, 100]]
    for i, (height, width) in enumerate(sizes):
        channels = (1, 3, 4)[i % 3]
        pixels = rng.integers(0, 256, (height, width, channels), dtype=np.uint8)
        name = f"{i:02d}" + (".jpg" if channels == 3 else ".png")
        cv2.imwrite(str(folder / "images" / name), pixels)
        (folder / f"labels/{i:02d}.txt").write_text("0 0.5 0.45 0.3 0.7\n")
    return folder


@pytest.mark.parametrize("rectangular", [True, False], ids=["rectangular", "square"])
@pytest.mark.parametrize(("image_size", "stride", "batch_size"), [(64, 32, 16), (96, 32, 4), (64, 8, 5), (160, 32, 1)])
def test_images_batches_and_boxes_are_those_of_ultralytics(pictures, image_size, stride, batch_size, rectangular):
    from ultralytics.utils.ops import scale_boxes, xywh2xyxy

    upstream = ultralytics_dataset(pictures, image_size, stride, batch_size, rectangular)
    files = sorted((pictures / "images").iterdir())
    images = [read_image(file) for file in files]
    batches = make_batches([image.shape[1:] for image in images], image_size, stride, batch_size, rectangular)
    assert all(len(batch.indices) == batch_size for batch in batches[:-1])
    order = [(index, batch) for batch in batches for index in batch.indices]
    assert [str(files[index]) for index, _ in order] == list(upstream.im_files)
    generator = torch.Generator().manual_seed(0)
    for wanted, (index, batch) in zip(upstream, order, strict=True):
        got, placement = place(images[index], image_size, batch.height, batch.width)
        assert torch.equal(got, wanted["img"])
        size = wanted["img"].shape[1:]
        boxes = torch.rand(20, 4, generator=generator) * 1.5 * max(size) - 0.25 * max(size)
        back = scale_boxes(size, boxes.clone(), wanted["ori_shape"], ratio_pad=wanted["ratio_pad"])
        assert torch.allclose(placement.back(boxes), back, atol=1e-4)
        # The label that Ultralytics moved along with the image returns to where it was written.
        height, width = images[index].shape[1:]
        label = xywh2xyxy(wanted["bboxes"]) * torch.tensor([size[1], size[0]] * 2)
        written = torch.tensor([[0.35 * width, 0.1 * height, 0.65 * width, 0.8 * height]])
        assert torch.allclose(placement.back(label), written, atol=1e-3)


def test_every_image_is_in_one_batch_that_is_a_multiple_of_the_stride_and_holds_it():
    sizes = np.random.default_rng(0).integers(10, 900, (101, 2)).tolist()
    for rectangular in (True, False):
        batches = make_batches(sizes, 320, 32, 8, rectangular)
        assert sorted(index for batch in batches for index in batch.indices) == list(range(101))
        for batch in batches:
            assert batch.height % 32 == batch.width % 32 == 0
            for index in batch.indices:
                scale = 320 / max(sizes[index])
                assert batch.height >= math.floor(sizes[index][0] * scale)
                assert batch.width >= math.floor(sizes[index][1] * scale)


def test_boxes_are_cut_at_the_border_of_the_original():
    _, placement = place(torch.zeros(3, 40, 80, dtype=torch.uint8), 64, 64, 96)
    boxes = placement.back(torch.tensor([[-50.0, -50, 500, 500], [16, 16, 48, 32]]))
    assert boxes.tolist() == [[0, 0, 80, 40], [0, 0, 40, 20]]


def yolo_copy(folder, count):
    """Some real images as a YOLO dataset and as a COCO set: its data.yaml, and ours. Crowds are left out of both."""
    content = json.loads((SHARED / "coco/annotations/instances_val2017_subset.json").read_text())
    images = sorted(content["images"], key=lambda image: image["file_name"])
    images = images[:: len(images) // count][:count]
    known = {image["id"]: [] for image in images}
    classes = {row["id"]: i for i, row in enumerate(sorted(content["categories"], key=lambda row: row["id"]))}
    for row in content["annotations"]:
        if row["image_id"] in known and not row["iscrowd"]:
            known[row["image_id"]].append(row)
    (folder / "images").mkdir()
    (folder / "labels").mkdir()
    for image in images:
        name = Path(image["file_name"]).name
        (folder / "images" / name).write_bytes((SHARED / "coco/images/val2017" / name).read_bytes())
        lines = []
        for row in known[image["id"]]:
            (x, y, w, h), (width, height) = row["bbox"], (image["width"], image["height"])
            box = (x + w / 2) / width, (y + h / 2) / height, w / width, h / height
            lines.append(" ".join([str(classes[row["category_id"]]), *(f"{value:.9f}" for value in box)]))
        (folder / "labels" / name).with_suffix(".txt").write_text("\n".join(lines))
    names = [row["name"] for row in sorted(content["categories"], key=lambda row: row["id"])]
    write_json(folder / "data.yaml", {"path": str(folder), "train": "images", "val": "images", "names": names})
    annotations = [row for rows in known.values() for row in rows]
    write_json(folder / "coco.json", content | {"images": images, "annotations": annotations})
    return folder / "data.yaml", DataConfig(images=folder / "images", annotations=folder / "coco.json")


def validate_upstream(data, weights, folder, monkeypatch):
    """Detections of each image, by its file's stem, as rows xyxy, score, class, and mAP50-95, of Ultralytics."""
    import ultralytics.data.utils
    from ultralytics import YOLO
    from ultralytics.models.yolo.detect import DetectionValidator

    monkeypatch.setattr(ultralytics.data.utils, "check_font", lambda *_: None)  # wants to download a font
    found = {}

    class Recording(DetectionValidator):
        def update_metrics(self, predictions, batch):
            for i, one in enumerate(predictions):
                one = self.scale_preds(one, self._prepare_batch(i, batch))
                rows = torch.cat([one["bboxes"], one["conf"][:, None], one["cls"][:, None]], 1)
                found[Path(batch["im_file"][i]).stem] = rows.clone()
            super().update_metrics(predictions, batch)

    settings = {"data": str(data), "imgsz": 320, "batch": 16, "conf": 0.001, "iou": 0.7, "max_det": 300}
    settings |= {"rect": True, "workers": 0, "half": False, "plots": False, "device": "cpu", "project": str(folder)}
    metrics = YOLO(weights).val(validator=Recording, verbose=False, **settings)
    return found, float(metrics.box.map)


@pytest.mark.skipif(not (SHARED / "weights/yolo11n.pt").exists(), reason="needs the shared weights")
@pytest.mark.skipif(not (SHARED / "coco/images/val2017").exists(), reason="needs the shared images")
def test_a_real_detector_is_measured_as_ultralytics_does(tmp_path, monkeypatch):
    from yolo11.adapter import load

    weights, predictions = SHARED / "weights/yolo11n.pt", tmp_path / "predictions.json"
    upstream_data, data = yolo_copy(tmp_path, 40)
    upstream, upstream_map = validate_upstream(upstream_data, weights, tmp_path / "upstream", monkeypatch)
    detector = load(weights)
    config = EvaluationConfig(image_size=320)
    metrics = coco.evaluate(
        detector, detector.build(), data, config, device=torch.device("cpu"), predictions=predictions
    )
    rows = json.loads(predictions.read_text())
    assert len(upstream) == 40
    assert len(rows) == sum(map(len, upstream.values())) > 4000
    unlike = sum(
        detections_without_counterpart([row for row in rows if row["image_id"] == int(stem)], wanted, data)
        for stem, wanted in upstream.items()
    )
    # Where two boxes overlap by .7 to the last digit, float32 decides which one suppression keeps: here 1 of 6000.
    assert unlike <= 0.001 * len(rows)
    # The two interpolate precision differently, and COCO counts the best 100 detections of an image.
    assert metrics["AP"] == pytest.approx(upstream_map, abs=0.02)
    assert metrics["AP"] > 0.2


def detections_without_counterpart(rows, wanted, data):
    """How many of `wanted` have not exactly one of `rows` of their class within 1e-2 pixels and 1e-4 of score."""
    categories = [row["id"] for row in json.loads(data.annotations.read_text())["categories"]]
    got = torch.tensor([[*row["bbox"], row["score"], categories.index(row["category_id"])] for row in rows])
    got[:, 2:4] += got[:, :2]
    assert len(got) == len(wanted)
    difference = (got[:, None] - wanted[None]).abs() / torch.tensor([1e-2] * 4 + [1e-4, 0.5])
    same = (difference < 1).all(-1)
    assert same.sum(1).max() <= 1
    return int((same.sum(0) != 1).sum())


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


def labels_of(annotations):
    """Rows class, xyxy of each image, by its id."""
    categories = [row["id"] for row in sorted(annotations["categories"], key=lambda row: row["id"])]
    rows = {image["id"]: [] for image in annotations["images"]}
    for row in annotations["annotations"]:
        x, y, w, h = row["bbox"]
        rows[row["image_id"]].append([categories.index(row["category_id"]), x, y, x + w, y + h])
    return {key: torch.tensor(value).float().reshape(-1, 5) for key, value in rows.items()}


@pytest.mark.skipif(not YOLOV5N.exists(), reason="needs the shared weights")
@pytest.mark.skipif(not (SHARED / "coco/images/val2017").exists(), reason="needs the shared images")
def test_a_real_detector_is_measured_as_val_py_does(tmp_path):
    _, data = yolo_copy(tmp_path, 40)
    annotations = json.loads(data.annotations.read_text())
    paths = [data.images / Path(image["file_name"]).name for image in annotations["images"]]
    config = load_config(ROOT / "configs/yolov5/yolov5n_cpu.yaml").evaluation
    found, scaled = yolov5_val.detections(read_checkpoint(YOLOV5N).state, paths, 320, config.batch_size)
    detector, predictions = load_detector("yolov5", YOLOV5N), tmp_path / "predictions.json"
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
