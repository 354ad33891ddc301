"""Masks: measured as torchvision's reference evaluation measures them, pasted, stored and read back."""

import copy
import dataclasses
import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import masks_to_boxes

from common.config.schema import DataConfig, EvaluationConfig, LabelSamplingConfig, SynthesisConfig
from common.detection import masks
from common.detection.detector import load_detector
from common.detection.roi_losses import ellipses
from common.detection.types import Detections, Targets
from common.distillation.augment import augment
from common.evaluation import coco
from common.evaluation.resize import Placement, equal_batches, scaled_size
from common.runtime.image_files import read_image
from common.synthesis import ImageSet, synthesize
from common.synthesis.labels import read_labels, relabel, take_labels, update_masks, with_masks
from common.synthesis.pixels import Augmentation, augment_images, augment_targets
from tools.shapes.generate import generate

WEIGHTS = Path(__file__).parents[2] / "tools/shapes/micro_mask_rcnn.safetensors"
SETTINGS = EvaluationConfig(
    resize="shorter_side", image_size=144, longest_side=200, confidence=0.05, iou=0.5, max_detections=100, batch_size=4
)


@pytest.fixture(scope="module")
def detector():
    return load_detector("resnet", WEIGHTS)


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """Twelve images of three sizes: cut from drawn ones, with the masks and boxes that are left."""
    folder = tmp_path_factory.mktemp("shapes") / "set"
    content = json.loads(generate(folder, 12).read_text())
    kept = []
    for i, image in enumerate(content["images"]):
        image["width"] = (192, 150, 120)[i % 3]
        path = str(folder / "images" / image["file_name"])
        cv2.imwrite(path, cv2.imread(path)[:, : image["width"]])
        for row in (a for a in content["annotations"] if a["image_id"] == image["id"]):
            plane = np.asfortranarray(coco_mask.decode(row["segmentation"])[:, : image["width"]])
            if plane.any():
                code = coco_mask.encode(plane)
                row["bbox"], row["area"] = coco_mask.toBbox(code).tolist(), int(plane.sum())
                row["segmentation"] = {"size": code["size"], "counts": code["counts"].decode()}
                kept.append(row)
    content["annotations"] = kept
    (folder / "annotations.json").write_text(json.dumps(content))
    return folder


def reference_results(module, shapes, content):
    """What torchvision's own model, with its own transform, finds in the images as they are."""
    model = copy.deepcopy(module)
    old = module.transform
    model.transform = GeneralizedRCNNTransform(144, 200, old.image_mean, old.image_std).eval()
    assert (model.roi_heads.score_thresh, model.roi_heads.nms_thresh, model.roi_heads.detections_per_img) == (
        0.05,
        0.5,
        100,
    )
    rows = []
    for image in content["images"]:
        with torch.no_grad():
            (found,) = model([read_image(shapes / "images" / image["file_name"]).float() / 255])
        for box, score, label, mask in zip(*(found[k] for k in ("boxes", "scores", "labels", "masks")), strict=True):
            x1, y1, x2, y2 = box.tolist()
            code = coco_mask.encode(np.asfortranarray((mask[0] > 0.5).numpy().astype(np.uint8)))
            code["counts"] = code["counts"].decode()
            row = {"image_id": image["id"], "category_id": int(label), "score": float(score), "segmentation": code}
            rows.append(row | {"bbox": [x1, y1, x2 - x1, y2 - y1]})
    return rows


def reference_ap(shapes, rows, kind):
    truth = COCO(str(shapes / "annotations.json"))
    rows = copy.deepcopy(rows)
    if kind == "segm":
        rows = [{k: v for k, v in row.items() if k != "bbox"} for row in rows]
    evaluation = COCOeval(truth, truth.loadRes(rows), kind)
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return evaluation.stats


def test_boxes_and_masks_are_measured_as_torchvisions_reference_does(detector, shapes, tmp_path):
    content = json.loads((shapes / "annotations.json").read_text())
    module = detector.build()
    data = DataConfig(images=shapes / "images", annotations=shapes / "annotations.json")
    cpu = torch.device("cpu")
    ours = coco.evaluate(detector, module, data, SETTINGS, device=cpu, predictions=tmp_path / "found.json")
    rows = reference_results(module, shapes, content)
    for kind, metrics in (("bbox", ours), ("segm", ours["segm"])):
        wanted = reference_ap(shapes, rows, kind)
        assert wanted[0] > 0.1
        for name, i in (("AP", 0), ("AP50", 1), ("AP75", 2), ("AP_small", 3), ("AP_medium", 4), ("AR100", 8)):
            assert metrics[name] == pytest.approx(wanted[i], abs=1e-6), (kind, name)
    found = json.loads((tmp_path / "found.json").read_text())
    assert len(found) == len(rows)
    assert [r["category_id"] for r in found] == [r["category_id"] for r in rows]
    overlaps = [
        coco_mask.iou([a["segmentation"]], [b["segmentation"]], [False])[0, 0]
        for a, b in zip(found, rows, strict=True)
        if coco_mask.area(b["segmentation"])
    ]
    assert min(overlaps) > 0.99


def test_a_set_without_masks_is_measured_by_its_boxes_alone(detector, shapes, tmp_path):
    content = json.loads((shapes / "annotations.json").read_text())
    for row in content["annotations"]:
        del row["segmentation"]
    (tmp_path / "boxes.json").write_text(json.dumps(content))
    data = DataConfig(images=shapes / "images", annotations=tmp_path / "boxes.json")
    found = coco.evaluate(detector, detector.build(), data, SETTINGS, device=torch.device("cpu"))
    assert found["AP"] > 0.1
    assert "segm" not in found


def test_images_are_resized_as_in_torchvision_and_batched_with_their_equals():
    sizes = [(480, 640), (640, 480), (427, 640), (200, 1000), (480, 640)]
    transform = GeneralizedRCNNTransform(800, 1333, [0, 0, 0], [1, 1, 1])
    for height, width in sizes:
        resized, _ = transform.eval().resize(torch.zeros(3, height, width))
        assert scaled_size(height, width, 800, 1333) == tuple(resized.shape[1:])
    batches = equal_batches(sizes, 800, 1333, 2)
    assert sorted(batch.indices for batch in batches) == [(0, 4), (1,), (2,), (3,)]


def test_run_lengths_are_cocos_and_polygons_are_read():
    planes = torch.rand(3, 40, 30, generator=torch.Generator().manual_seed(0)) > 0.5
    encoded = json.loads(json.dumps(masks.encode(planes)))
    assert np.array_equal(coco_mask.decode(encoded[1]), planes[1].numpy())
    assert torch.equal(masks.decode(encoded, 40, 30), planes)
    square = masks.decode([[[5, 5, 15, 5, 15, 25, 5, 25]]], 40, 30)
    assert int(square.sum()) == 200
    assert square[0, 5:25, 5:15].all()


def test_a_full_grid_fills_its_box_and_resizing_keeps_the_shape():
    pasted = masks.paste(torch.ones(1, 28, 28), torch.tensor([[8.0, 10.0, 24.0, 20.0]]), 32, 40)
    assert pasted.shape == (1, 32, 40)
    assert pasted[0, 11:19, 9:23].all()
    assert not pasted[0, :9].any()
    assert not pasted[0, :, 26:].any()
    larger = masks.resize_masks(pasted, 64, 80)
    assert torch.equal(larger[:, ::2, ::2], pasted)


def test_true_labels_bring_their_masks_letterboxed_like_the_image(shapes):
    content = json.loads((shapes / "annotations.json").read_text())
    names = tuple(c["name"] for c in content["categories"])
    pool = read_labels(shapes / "annotations.json", names, 128, masks=True)
    for labels in pool:
        made = with_masks(labels, 128)
        assert made.masks.shape == (len(labels.labels), 128, 128)
        deviations = (tight(made.masks) - labels.boxes).abs()
        assert deviations.max() <= 2  # a tip thinner than a pixel may fall between two
        assert deviations.median() <= 0.5
    missing = dataclasses.replace(pool[0], segmentations=(None,) * len(pool[0].labels))
    assert with_masks(missing, 128).masks is None
    assert with_masks(read_labels(shapes / "annotations.json", names, 128)[0], 128).masks is None


def labelled():
    """Two labels on 64 pixels, the first with a mask that is no ellipse."""
    planes = torch.zeros(2, 64, 64, dtype=torch.bool)
    planes[0, 10:30, 8:12] = True
    planes[1, 40:60, 30:50] = True
    return Targets(torch.tensor([[8.0, 10.0, 28.0, 30.0], [30.0, 40.0, 50.0, 60.0]]), torch.tensor([0, 1]), planes)


def tight(planes):
    return masks_to_boxes(planes) + torch.tensor([0, 0, 1, 1])


@pytest.mark.parametrize(
    "augmentation",
    [Augmentation(flip=True), Augmentation(shift_x=7, shift_y=-3), Augmentation(flip=True, shift_x=-5, shift_y=4)],
)
def test_masks_follow_the_image_before_the_loss_of_stage_one(augmentation):
    target = labelled()
    (changed,) = augment_targets([target], augmentation, 64)
    moved = augment_images(target.masks[None].float(), augmentation)[0].bool()  # nothing of them leaves the image here
    assert torch.equal(changed.masks, moved)
    assert torch.equal(tight(changed.masks)[1], changed.boxes[1])


def test_what_leaves_the_image_is_gone_from_the_masks():
    (changed,) = augment_targets([labelled()], Augmentation(shift_x=-20), 64)
    assert changed.labels.tolist() == [0, 1]
    assert not changed.masks[0].any()  # its left part came in again on the right of the image
    assert torch.equal(tight(changed.masks)[1], torch.tensor([10.0, 40.0, 30.0, 60.0]))


@pytest.mark.parametrize("scale", [(0.5, 0.5), (1.5, 1.5), (1.0, 1.0)])
def test_masks_follow_the_image_in_training(scale):
    target = labelled()
    for seed in range(4):
        draws = torch.rand(1, 4, generator=torch.Generator().manual_seed(seed))
        images, (changed,) = augment(target.masks[1:, None].expand(1, 3, 64, 64).float(), [target], True, scale, draws)
        assert len(changed.masks) == len(changed.labels)
        if 1 in changed.labels:
            mask = changed.masks[changed.labels == 1][0]
            assert ((images[0, 0] > 0.5) != mask)[(images[0, 0] != images[0, 1, 0, 0])].float().mean() < 0.2


def test_a_label_takes_the_detectors_mask_and_others_keep_theirs():
    target = Targets(labelled().boxes, labelled().labels)
    grid = torch.zeros(2, 28, 28)
    grid[:, :, :14] = 1
    boxes, scores = torch.tensor([[9.0, 11.0, 29.0, 31.0], [30.0, 40.0, 50.0, 60.0]]), torch.tensor([0.9, 0.1])
    found = Detections(boxes, scores, torch.tensor([0, 1]), grid)
    seen = update_masks(target, found, 64, LabelSamplingConfig())
    assert torch.equal(seen.boxes, target.boxes)
    rows, columns = seen.masks[0].nonzero(as_tuple=True)
    assert (int(columns.min()), int(rows.min())) == (8, 10)
    assert int(columns.max()) == pytest.approx(17, abs=1)  # the left half of its own box
    assert torch.equal(seen.masks[1], ellipses(target.boxes, 64, 64)[1])
    later = update_masks(
        seen, Detections(*(t[:0] for t in (found.boxes, found.scores, found.labels, grid))), 64, LabelSamplingConfig()
    )
    assert torch.equal(later.masks, seen.masks)
    boxes_only = Detections(found.boxes, found.scores, found.labels)
    assert update_masks(target, boxes_only, 64, LabelSamplingConfig()) is target


def test_new_labels_come_with_their_masks():
    grid = torch.ones(1, 28, 28)
    found = Detections(torch.tensor([[2.0, 2.0, 30.0, 20.0]]), torch.tensor([0.9]), torch.tensor([1]), grid)
    target = Targets(labelled().boxes[1:], labelled().labels[1:], labelled().masks[1:])
    edited = relabel(target, found, 64, LabelSamplingConfig())
    assert edited.labels.tolist() == [1, 1]
    assert torch.equal(edited.masks[0], target.masks[0])
    assert torch.equal(edited.masks[1], masks.paste(grid, found.boxes, 64, 64)[0])


def test_true_labels_and_their_masks_are_not_edited(detector, shapes, tmp_path):
    config = SynthesisConfig(
        num_images=2, image_size=96, batch_size=2, low_resolution_size=64, low_resolution_iterations=6, iterations=6,
        label_sampling=LabelSamplingConfig(every=2, confidence=0.0), labels="true_label",
        annotations=shapes / "annotations.json",
        directory=tmp_path,
    )  # fmt: skip
    folder = synthesize(detector, config, seed=0, device=torch.device("cpu"), weights_sha256="0" * 64)
    _, made = ImageSet(folder).batch(range(2), torch.device("cpu"))
    pool = read_labels(config.annotations, detector.class_names, 96, masks=True)
    for target, labels in zip(made, take_labels(pool, 0, 2, 0), strict=True):
        wanted = with_masks(labels, 96)
        assert torch.equal(target.labels, wanted.labels)
        torch.testing.assert_close(target.boxes, wanted.boxes, atol=0.01, rtol=0)
        assert (target.masks == wanted.masks).float().mean() > 0.99  # of half the size and back
    assert json.loads((folder / "set.json").read_text())["data_read"] == [str(config.annotations)]


def test_a_set_holds_the_masks_of_its_labels(detector, tmp_path):
    """Stage one with a detector that finds something: the saved masks are its own, as COCO run lengths."""
    config = SynthesisConfig(
        num_images=2, image_size=96, batch_size=2, low_resolution_size=64, low_resolution_iterations=20, iterations=10,
        label_sampling=LabelSamplingConfig(every=5, confidence=0.05), directory=tmp_path,
    )  # fmt: skip
    folder = synthesize(detector, config, seed=0, device=torch.device("cpu"), weights_sha256="0" * 64)
    images = ImageSet(folder)
    batch, targets = images.batch(range(2), torch.device("cpu"))
    rows = json.loads((folder / "annotations.json").read_text())["annotations"]
    assert all(row["segmentation"]["size"] == [96, 96] for row in rows)
    assert sum(len(t.labels) for t in targets) == len(rows)
    ours = torch.cat([t.masks for t in targets])
    assert ours.shape[1:] == batch.shape[2:]
    assert np.array_equal(coco_mask.decode(rows[-1]["segmentation"]), ours[-1].numpy())
    drawn = torch.cat([ellipses(t.boxes, 96, 96) for t in targets])
    assert (ours != drawn).flatten(1).any(1).any()  # at least one is no ellipse any more


def test_a_mask_is_cut_with_its_box_and_stays_where_it_was():
    """As where a box reaches over the letterbox padding, which is no part of the image."""
    boxes = torch.tensor([[-40.0, 10, 60, 110], [20, 20, 70, 90]])
    inner = torch.tensor([[0.0, 10, 60, 80], [20, 20, 70, 90]])
    grids = torch.zeros(2, 56, 56)
    grids[0, 10:50, 15:45], grids[1, 20:30] = 1, 1
    parts = masks.cut(grids, boxes, inner)
    assert torch.equal(parts[1], grids[1])
    before, after = masks.paste(grids, boxes, 120, 120)[0], masks.paste(parts, inner, 120, 120)[0]
    before[81:] = False
    assert (before & after).sum() > 0.95 * (before | after).sum() > 0
    found = Detections(boxes * 2 + 8, torch.ones(2), torch.zeros(2, dtype=torch.long), grids)
    back = Placement(2.0, 2.0, 8, 8, 120, 80).detections(found)
    assert torch.equal(back.boxes[:, 3], torch.tensor([80.0, 80.0]))
    assert torch.equal(back.masks[0], parts[0])
