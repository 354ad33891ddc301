"""Drawn images with true boxes and masks, and detectors trained on them; the benchmark's arithmetic."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from pycocotools import mask as rle

from common.checkpoints.read import load_tensors
from common.config.schema import DataConfig, EvaluationConfig
from common.detection.detector import load_detector
from common.detection.types import Targets
from common.evaluation import coco
from common.runtime.errors import UserError
from common.runtime.image_files import read_image
from tools import benchmark
from tools.shapes import TRAIN_SEED, train, train_mask_rcnn, train_vit, train_yolov5
from tools.shapes.generate import CLASS_NAMES, IMAGE_SIZE, SMALLEST, box, draw_image, generate

HERE = Path(train.__file__).parent
MICRO = {  # weights, what trained them, and the architecture that it trains
    "yolo11": (HERE / "micro_yolo11.safetensors", train, lambda: train._architecture("yolo11")),
    "yolov5": (HERE / "micro_yolov5.safetensors", train_yolov5, train_yolov5.architecture),
}

SWIN = HERE / "micro_vit.safetensors"

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shapes") / "set"
    return folder, json.loads(generate(folder, 64).read_text())


def test_the_set_has_every_class_empty_and_crowded_images_and_several_scales(shapes):
    _, content = shapes
    counts = np.bincount([a["image_id"] for a in content["annotations"]], minlength=65)[1:]
    areas = np.array([a["area"] for a in content["annotations"]])
    assert {a["category_id"] for a in content["annotations"]} == set(range(1, len(CLASS_NAMES) + 1))
    assert len(CLASS_NAMES) >= 8
    assert counts.min() == 0
    assert counts.max() >= 8
    assert (areas < 32**2).any()
    assert (areas > 96**2).any()


def test_boxes_are_those_of_the_visible_pixels_of_the_masks(shapes):
    _, content = shapes
    for annotation in content["annotations"]:
        mask = rle.decode(annotation["segmentation"])
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        width, height = columns[-1] - columns[0] + 1, rows[-1] - rows[0] + 1
        assert annotation["bbox"] == [columns[0], rows[0], width, height]
        assert annotation["area"] == mask.sum()


def test_masks_of_one_image_do_not_share_pixels_and_no_shape_is_mostly_hidden():
    for seed in range(20):
        image, drawn = draw_image(IMAGE_SIZE, np.random.default_rng(seed))
        assert image.shape == (IMAGE_SIZE, IMAGE_SIZE, 3)
        if drawn:
            assert np.stack([s.mask for s in drawn]).sum(0).max() == 1
            assert min(s.visible for s in drawn) >= 0.45
            assert min(s.mask.sum() for s in drawn) > SMALLEST


def test_the_same_seed_draws_the_same_files_and_another_one_others(shapes, tmp_path):
    folder, _ = shapes
    generate(tmp_path / "same", 2)
    generate(tmp_path / "other", 2, seed=3)
    for name in ("000000.png", "000001.png"):
        first = (folder / "images" / name).read_bytes()
        assert (tmp_path / "same/images" / name).read_bytes() == first
        assert (tmp_path / "other/images" / name).read_bytes() != first


def test_a_folder_that_holds_something_is_left_alone(shapes):
    folder, _ = shapes
    with pytest.raises(UserError, match="not an empty folder"):
        generate(folder, 1)


@pytest.mark.parametrize("family", MICRO)
def test_the_embedded_weights_are_small_and_say_how_they_were_made(family):
    weights, trainer, architecture = MICRO[family]
    state, description = load_tensors(weights)
    assert sum(t.numel() for t in state.values()) < 1e6
    assert weights.stat().st_size < 2e6
    made = description["training"]
    assert made["drawn_with_seed"] == TRAIN_SEED != 2
    assert made["settings"] == trainer.SETTINGS
    assert description["architecture"] == architecture()


@pytest.mark.parametrize(("family", "least", "least_at_50"), [("yolo11", 0.38, 0.5), ("yolov5", 0.28, 0.44)])
def test_the_embedded_detector_finds_shapes_it_was_not_trained_on(shapes, family, least, least_at_50):
    folder, _ = shapes
    detector = load_detector(family, MICRO[family][0])
    data = DataConfig(images=folder / "images", annotations=folder / "annotations.json")
    settings = EvaluationConfig(image_size=IMAGE_SIZE, batch_size=32)
    found = coco.evaluate(detector, detector.build(), data, settings, device=torch.device("cpu"))
    assert found["AP"] > least
    assert found["AP50"] > least_at_50


def test_the_embedded_swin_finds_boxes_and_masks_it_was_not_trained_on(shapes):
    _, description = load_tensors(SWIN)
    assert SWIN.stat().st_size < 3e6
    assert description["training"]["drawn_with_seed"] == TRAIN_SEED != 2
    assert description["training"]["settings"] == train_vit.SETTINGS
    detector = load_detector("vit", SWIN)
    assert detector.class_names == CLASS_NAMES
    folder, _ = shapes
    data = DataConfig(images=folder / "images", annotations=folder / "annotations.json")
    settings = EvaluationConfig(image_size=IMAGE_SIZE, confidence=0.05, iou=0.5, max_detections=100, batch_size=16)
    found = coco.evaluate(detector, detector.build(), data, settings, device=torch.device("cpu"))
    assert found["AP"] > 0.44
    assert found["segm"]["AP"] > 0.37


def test_a_swin_trained_for_two_steps_loads_and_is_trained_further(tmp_path):
    first = train_vit.train(tmp_path / "a.safetensors", steps=2)
    second = train_vit.train(tmp_path / "b.safetensors", steps=1, start=first)
    batch = train_vit.SETTINGS["batch"]
    assert [load_tensors(path)[1]["training"]["images"] for path in (first, second)] == [2 * batch, 3 * batch]
    assert load_detector("vit", second).class_names == CLASS_NAMES


@pytest.mark.parametrize("model", ["yolo11", "yolo26"])
def test_the_training_script_makes_weights_that_load(tmp_path, model):
    path = train.train(tmp_path, num_images=4, epochs=1, model=model)
    detector = load_detector("yolo11", path)
    assert detector.class_names == CLASS_NAMES
    image = read_image(tmp_path / "data/images/000000.png")[None].float() / 255
    assert torch.isfinite(detector.head_output(detector.build(), image).maps[0]).all()


def test_a_model_that_ultralytics_does_not_have_is_refused_before_anything_is_drawn(tmp_path):
    with pytest.raises(UserError, match="--model: found yolo99; give a name of Ultralytics"):
        train.train(tmp_path, num_images=4, epochs=1, model="yolo99")
    assert not list(tmp_path.iterdir())


def test_the_training_of_yolov5_learns_and_makes_weights_that_load(tmp_path, monkeypatch):
    monkeypatch.setitem(train_yolov5.SETTINGS, "batch_size", 2)
    monkeypatch.setitem(train_yolov5.SETTINGS, "warmup_steps", 1)
    monkeypatch.setitem(train_yolov5.SETTINGS, "ema_decay", 0.5)
    monkeypatch.setattr(train_yolov5, "draw_image", lambda *_: draw_image(IMAGE_SIZE, np.random.default_rng(5)))
    image, drawn = draw_image(IMAGE_SIZE, np.random.default_rng(5))
    images = torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255
    boxes = torch.tensor([box(shape) for shape in drawn]).float()
    target = Targets(boxes, torch.tensor([shape.label for shape in drawn]))
    totals = []
    for steps in (1, 25):
        path = train_yolov5.train(tmp_path / f"{steps}.safetensors", num_images=2 * steps)
        detector = load_detector("yolov5", path)
        assert detector.class_names == CLASS_NAMES
        totals.append(sum(detector.head_output(detector.build().train(), images, [target]).losses.values()).item())
    assert totals[1] < 0.8 * totals[0]


def test_the_embedded_mask_rcnn_finds_boxes_and_masks_it_was_not_trained_on(shapes):
    folder, _ = shapes
    weights = HERE / "micro_mask_rcnn.safetensors"
    assert weights.stat().st_size < 3e6
    _, description = load_tensors(weights)
    made = description["training"]
    assert made["drawn_with_seed"] == TRAIN_SEED != 2
    assert made["settings"] == train_mask_rcnn.SETTINGS
    assert description["architecture"] == train_mask_rcnn.ARCHITECTURE
    detector = load_detector("resnet", weights)
    data = DataConfig(images=folder / "images", annotations=folder / "annotations.json")
    settings = EvaluationConfig(
        resize="shorter_side", image_size=IMAGE_SIZE, confidence=0.05, iou=0.5, max_detections=100, batch_size=32
    )
    found = coco.evaluate(detector, detector.build(), data, settings, device=torch.device("cpu"))
    assert found["AP"] > 0.18
    assert found["segm"]["AP"] > 0.15


def test_the_script_of_the_mask_rcnn_makes_weights_that_load(tmp_path):
    detector = load_detector("resnet", train_mask_rcnn.train(tmp_path / "made.safetensors", steps=1))
    assert detector.class_names == CLASS_NAMES
    assert all(torch.isfinite(t).all() for t in detector.build().state_dict().values())


def test_ratios_are_to_the_floor_of_the_same_turn(monkeypatch):
    seconds = {
        "floor": [1.0, 2.0, 1.0],
        "whole": [2.0, 4.0, 9.0],
        "half": [1.5, 3.0, 9.0],
        "only: own": [3.0, 6.0, 3.0],
    }
    monkeypatch.setattr(benchmark, "measure", lambda *_: dict(seconds))
    found = benchmark.compared(dict.fromkeys(seconds, lambda: None), 3, CPU)
    assert (found["floor_seconds"], found["whole"]) == (1.0, 2.0)
    assert found["parts"] == {"half": pytest.approx(0.5)}
    assert found["alone"] == {"own": pytest.approx(3.0)}


def test_each_work_runs_once_in_every_turn_and_once_before():
    runs = []
    works = {name: (lambda name=name: runs.append(name)) for name in ("floor", "whole")}
    times = benchmark.measure(works, 2, CPU)
    assert runs == ["floor", "whole"] * 3
    assert all(len(values) == 2 for values in times.values())


def test_peak_memory_is_that_of_the_work_alone():
    # In a process of its own, and the most of five: memory that the system takes back meanwhile hides the rest.
    measure = (
        "import torch; from tools.benchmark import peak_mib\n"
        "found = [peak_mib(lambda: torch.zeros(2**24).sum(), torch.device('cpu')) for _ in range(5)]\n"  # 64 MiB
        "print(0 if None in found else max(found))"
    )
    done = subprocess.run([sys.executable, "-c", measure], capture_output=True, text=True, check=True)
    found = float(done.stdout)
    assert found == 0 or 50 < found < 90
