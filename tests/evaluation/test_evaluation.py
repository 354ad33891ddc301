"""What evaluation reports and writes, against pycocotools called directly, and what it refuses."""

import contextlib
import io
import json
import shutil

import cv2
import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import nn

from common.config.schema import DataConfig, EvaluationConfig
from common.detection.types import Detections
from common.evaluation import coco
from common.runtime.errors import UserError

CPU = torch.device("cpu")
CLASSES = ("circle", "square", "star")
IDS = {"star": 3, "circle": 7, "square": 90}  # neither contiguous nor in the detector's order
SIZES = [(48, 64), (64, 48), (50, 50), (97, 31), (30, 61), (200, 90)]  # height, width


class Scripted:
    """A detector that knows which image it is shown, by its grey level, and says what it was told to.

    `script` has, for each image, rows [x1, y1, x2, y2, score, class] in pixels of that image.
    """

    stride = 32

    def __init__(self, script, class_names=CLASSES):
        self.script, self.class_names, self.calls = script, class_names, 0

    def detect(self, module, images, confidence, iou, max_detections):
        self.calls += 1
        return [self.one(image) for image in images]

    def one(self, image):
        rows, columns = (image[0] != 114 / 255).nonzero(as_tuple=True)
        top, left = rows.min(), columns.min()
        index = round(image[0, top, left].item() * 255) // 5
        height, width = SIZES[index]
        scale = torch.tensor([(columns.max() + 1 - left) / width, (rows.max() + 1 - top) / height] * 2)
        found = torch.tensor(self.script[index]).reshape(-1, 6)
        boxes = found[:, :4] * scale + torch.tensor([left, top, left, top])
        return Detections(boxes, found[:, 4], found[:, 5].long())


def write_set(folder, changes=None, per_image=3):
    """One plain grey image of each size with random boxes; `changes` edits the content of the annotations."""
    rng = np.random.default_rng(0)
    (folder / "images").mkdir(exist_ok=True)
    images, annotations = [], []
    for i, (height, width) in enumerate(SIZES):
        cv2.imwrite(str(folder / f"images/{i}.png"), np.full((height, width, 3), 5 * i, np.uint8))
        images.append({"id": 100 - i, "file_name": f"{i}.png", "width": width, "height": height})
        for _ in range(per_image):
            x, y = rng.uniform(0, width - 10), rng.uniform(0, height - 10)
            w, h = rng.uniform(8, width - x), rng.uniform(8, height - y)
            category = list(IDS.values())[len(annotations) % 3]
            row = {"id": len(annotations) + 1, "image_id": 100 - i, "category_id": category, "iscrowd": 0}
            annotations.append(row | {"bbox": [round(v, 2) for v in (x, y, w, h)], "area": round(w * h, 2)})
    categories = [{"id": value, "name": name} for name, value in IDS.items()]
    content = {"images": images, "annotations": annotations, "categories": categories}
    if changes:
        changes(content)
    (folder / "annotations.json").write_text(json.dumps(content))
    return DataConfig(images=folder / "images", annotations=folder / "annotations.json")


def truth(data):
    """What is annotated, as a script of `Scripted`."""
    content = json.loads(data.annotations.read_text())
    classes = {value: CLASSES.index(name) for name, value in IDS.items()}
    script = [[] for _ in SIZES]
    for row in content["annotations"]:
        x, y, w, h = row["bbox"]
        script[100 - row["image_id"]].append([x, y, x + w, y + h, 0.9, classes[row["category_id"]]])
    return script


def random_script(seed=0):
    """The annotated boxes moved a little, the classes now and then wrong, and noise."""

    def script(data):
        rng = np.random.default_rng(seed)
        rows = []
        for known, (height, width) in zip(truth(data), SIZES, strict=True):
            moved = np.repeat(np.array(known), 15, 0)  # more than 10 of a class
            moved[:, :4] = (moved[:, :4] + rng.normal(0, 1.5, (len(moved), 4))).clip(0, [width, height] * 2)
            moved[:, 4] = rng.uniform(0.001, 1, len(moved))
            wrong = rng.random(len(moved)) < 0.3
            moved[wrong, 5] = rng.integers(0, 3, wrong.sum())
            rows.append(moved[np.argsort(-moved[:, 4])].tolist())
        return rows

    return script


def measure(data, script, predictions=None, class_names=CLASSES, **settings):
    settings = {"image_size": 64, "batch_size": 4} | settings
    detector = Scripted(script, class_names)
    config = EvaluationConfig(**settings)
    return coco.evaluate(detector, nn.Identity(), data, config, device=CPU, predictions=predictions)


def reference(annotations, predictions, category=None):
    """COCO's 12 numbers, from the two files."""
    with contextlib.redirect_stdout(io.StringIO()):
        known = COCO(str(annotations))
        evaluation = COCOeval(known, known.loadRes(str(predictions)), "bbox")
        if category is not None:
            evaluation.params.catIds = [category]
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats.tolist()


@pytest.mark.parametrize("rectangular", [True, False])
@pytest.mark.parametrize("seed", [0, 1])
def test_scores_are_those_of_pycocotools_on_the_written_files(tmp_path, seed, rectangular):
    data, predictions = write_set(tmp_path), tmp_path / "predictions.json"
    script = random_script(seed)(data)
    metrics = measure(data, script, predictions, rectangular=rectangular)
    wanted = reference(data.annotations, predictions)
    assert 0.05 < wanted[0] < 0.95
    for name, i in (("AP", 0), ("AP50", 1), ("AP75", 2), ("AP_small", 3), ("AP_medium", 4), ("AP_large", 5)):
        assert metrics[name] == wanted[i]
    assert metrics["AR100"] == wanted[8] != wanted[7]
    for name, category in IDS.items():
        assert metrics["per_class"][name] == pytest.approx(reference(data.annotations, predictions, category)[0])
    assert (metrics["images"], metrics["image_size"]) == (len(SIZES), 64)
    assert metrics["evaluator"].startswith("pycocotools 2.")


def test_written_detections_are_what_the_detector_said_in_pixels_of_each_file(tmp_path):
    data, predictions = write_set(tmp_path), tmp_path / "new/predictions.json"
    script = random_script()(data)
    measure(data, script, predictions)
    rows = json.loads(predictions.read_text())
    assert [row["image_id"] for row in rows] == sorted(row["image_id"] for row in rows)
    for i, wanted in enumerate(script):
        found = [row for row in rows if row["image_id"] == 100 - i]
        assert len(found) == len(wanted)
        for row, (x1, y1, x2, y2, score, label) in zip(found, wanted, strict=True):
            assert row["bbox"] == pytest.approx([x1, y1, x2 - x1, y2 - y1], abs=2e-3)
            assert row["score"] == pytest.approx(score, abs=1e-5)
            assert row["category_id"] == IDS[CLASSES[int(label)]]


def test_perfect_detections_have_an_ap_of_1(tmp_path):
    data = write_set(tmp_path)
    for rectangular in (True, False):
        metrics = measure(data, truth(data), rectangular=rectangular)
        assert metrics["AP"] == metrics["AP50"] == metrics["AR100"] == pytest.approx(1)
        assert metrics["per_class"] == pytest.approx(dict.fromkeys(IDS, 1.0))


def test_no_detections_have_an_ap_of_0_and_a_file_that_says_so(tmp_path):
    data, predictions = write_set(tmp_path), tmp_path / "predictions.json"
    metrics = measure(data, [[] for _ in SIZES], predictions)
    assert metrics["AP"] == metrics["AP50"] == metrics["AR100"] == 0
    assert metrics["per_class"] == dict.fromkeys(IDS, 0)
    assert json.loads(predictions.read_text()) == []


def test_the_file_is_the_same_whatever_the_batches(tmp_path):
    data = write_set(tmp_path)
    script, files = random_script()(data), [tmp_path / f"{n}.json" for n in (1, 2, 6)]
    for file, size in zip(files, (1, 2, 6), strict=True):
        measure(data, script, file, batch_size=size, rectangular=False)
    assert files[0].read_bytes() == files[1].read_bytes() == files[2].read_bytes()


def test_the_module_is_measured_in_eval_mode(tmp_path):
    data, module = write_set(tmp_path), nn.Identity().train()
    coco.evaluate(Scripted(truth(data)), module, data, EvaluationConfig(image_size=64), device=CPU)
    assert not module.training


def test_area_and_crowd_may_be_missing_and_crowds_are_ignored_not_missed(tmp_path):
    def without(content):
        for row in content["annotations"]:
            del row["area"], row["iscrowd"]

    def crowded(content):
        content["annotations"].append(content["annotations"][0] | {"id": 999, "iscrowd": 1, "bbox": [0, 0, 64, 48]})

    data = write_set(tmp_path)
    script = random_script()(data)
    plain = measure(data, script)["AP"]
    perfect = truth(data)
    assert measure(write_set(tmp_path, without), script)["AP"] == plain
    assert measure(write_set(tmp_path, crowded), perfect)["AP"] == pytest.approx(1)


def test_categories_are_found_by_name(tmp_path):
    data = write_set(tmp_path, lambda content: content["categories"].reverse())
    assert measure(data, truth(data))["AP"] == pytest.approx(1)


def test_a_set_with_some_of_the_classes_counts_only_those(tmp_path):
    def only_star(content):
        content["categories"] = [row for row in content["categories"] if row["name"] == "star"]
        content["annotations"] = [row for row in content["annotations"] if row["category_id"] == IDS["star"]]

    everything = truth(write_set(tmp_path))
    data, predictions = write_set(tmp_path, only_star), tmp_path / "predictions.json"
    metrics = measure(data, everything, predictions)
    assert metrics["AP"] == pytest.approx(1)
    assert metrics["per_class"] == pytest.approx({"star": 1.0})
    assert {row["category_id"] for row in json.loads(predictions.read_text())} == {IDS["star"]}


def test_other_names_in_the_same_number_are_taken_in_the_order_of_their_ids(tmp_path, caplog):
    data = write_set(tmp_path)
    script = truth(data)
    names = ("Stern", "Kreis", "Quadrat")  # of the ids 3, 7 and 90
    renamed = dict(zip(sorted(IDS, key=IDS.get), names, strict=True))

    def rename(content):
        content["categories"] = [row | {"name": renamed[row["name"]]} for row in reversed(content["categories"])]

    data = write_set(tmp_path, rename)
    assert measure(data, script, class_names=CLASSES)["AP"] < 0.5  # the detector's class 0 is id 3 now
    assert "in the order of their ids" in caplog.text
    in_order = [[[*row[:5], ("star", "circle", "square").index(CLASSES[row[5]])] for row in rows] for rows in script]
    metrics = measure(data, in_order, class_names=CLASSES)
    assert metrics["AP"] == pytest.approx(1)
    assert metrics["per_class"] == pytest.approx(dict.fromkeys(names, 1.0))


def set_key(key, value):
    return lambda content: content.__setitem__(key, value)


def drop_field(key, field):
    return lambda content: content[key][1].pop(field)


def rename_category(content):
    content["categories"][0]["name"] = "hexagon"


def larger(content):
    content["images"][2] |= {"width": 51}


def at(section, number, **values):
    return lambda content: content[section][number].update(values)


BAD_ANNOTATIONS = {
    "no annotations": (set_key("annotations", []), r"annotations: found \[\].*nothing to measure"),
    "no images": (set_key("images", []), r"images: found \[\]"),
    "crowds alone": (
        lambda content: [row.update(iscrowd=1) for row in content["annotations"]],
        "every object has 'iscrowd' 1",
    ),
    "another kind of file": (set_key("categories", None), "categories: found None; allowed: a list"),
    "image without a size": (drop_field("images", "width"), r"images\[1\]\.width: found nothing"),
    "box missing": (drop_field("annotations", "bbox"), r"annotations\[1\]\.bbox: found nothing"),
    "ids of text": (at("annotations", 4, image_id="100"), r"annotations\[4\]\.image_id: found '100'"),
    "one unknown class": (rename_category, "'hexagon' is none of the detector's 3 classes"),
    "out of the folder": (
        at("images", 2, file_name="../images/2.png"),
        r"images\[2\]\.file_name: .* inside the folder",
    ),
    "absolute": (at("images", 2, file_name="/etc/passwd"), r"images\[2\]\.file_name: .* inside the folder"),
    "one file, two names": (
        at("images", 2, file_name="x/1.png"),
        r"images\[2\]\.file_name: .*images\[1\] has .*1\.png",
    ),
    "a name too long": (at("images", 2, file_name="a" * 5000), "1 of the 6 images"),
    "wrong size": (larger, r"2\.png: 50x50 pixels, but 51x50 in the annotations"),
}


def assert_refused(data, folder, message, calls=None):
    """A one-line error, and no file beside those that were there."""
    before = sorted(folder.rglob("*"))
    detector = Scripted([[] for _ in SIZES])
    with pytest.raises(UserError, match=message) as caught:
        coco.evaluate(
            detector,
            nn.Identity(),
            data,
            EvaluationConfig(image_size=64, batch_size=1, rectangular=False),
            device=CPU,
            predictions=folder / "out/predictions.json",
        )
    assert "\n" not in str(caught.value)
    assert sorted(folder.rglob("*")) == before
    if calls is not None:
        assert detector.calls == calls


@pytest.mark.parametrize("name", BAD_ANNOTATIONS)
def test_annotations_that_do_not_fit_are_one_line_and_leave_no_file(tmp_path, name):
    change, message = BAD_ANNOTATIONS[name]
    assert_refused(write_set(tmp_path, change), tmp_path, message, calls=2 if name == "wrong size" else 0)


def test_fewer_other_classes_are_refused(tmp_path):
    def two(content):
        content["categories"] = [{"id": 3, "name": "cat"}, {"id": 7, "name": "dog"}]
        content["annotations"] = [row for row in content["annotations"] if row["category_id"] != 90]

    assert_refused(write_set(tmp_path, two), tmp_path, "2 categories, of which 'cat', 'dog' are none of", calls=0)


def test_a_category_that_no_object_has_is_left_out(tmp_path):
    data = write_set(tmp_path)
    known = truth(data)
    data = write_set(tmp_path, lambda content: content["categories"].insert(0, {"id": 0, "name": "root"}))
    assert measure(data, known)["AP"] == pytest.approx(1)

    def renamed(content):
        content["categories"] = [{"id": 0, "name": "root"}] + [
            row | {"name": f"the {row['name']}"} for row in content["categories"]
        ]

    in_order = [[[*row[:5], sorted(IDS.values()).index(IDS[CLASSES[row[5]]])] for row in rows] for rows in known]
    assert measure(write_set(tmp_path, renamed), in_order)["AP"] == pytest.approx(1)


@pytest.mark.parametrize("prefix", ["images/", "val/images/", "images\\\\", "./"])
def test_folders_in_file_names_are_looked_up_in_the_folder_of_the_images(tmp_path, prefix):
    def moved(content):
        for row in content["images"]:
            row["file_name"] = prefix + row["file_name"]

    known = truth(write_set(tmp_path))
    assert measure(write_set(tmp_path, moved), known)["AP"] == pytest.approx(1)


def test_files_of_one_name_in_different_folders_are_different_images(tmp_path):
    def moved(content):
        for i, row in enumerate(content["images"]):
            (tmp_path / f"images/part{i}").mkdir(exist_ok=True)
            shutil.copy(tmp_path / f"images/{i}.png", tmp_path / f"images/part{i}/same.png")
            row["file_name"] = f"part{i}/same.png"

    known = truth(write_set(tmp_path))
    assert measure(write_set(tmp_path, moved), known)["AP"] == pytest.approx(1)


def test_missing_images_are_counted_before_anything_is_computed(tmp_path):
    data = write_set(tmp_path)
    for name in ("2.png", "4.png"):
        (tmp_path / "images" / name).unlink()
    assert_refused(data, tmp_path, r"data\.images: 2 of the 6 images .* the first is 2\.png", calls=0)


@pytest.mark.parametrize("content", ["", "{", "not JSON"])
def test_annotations_that_are_not_json_are_refused(tmp_path, content):
    data = write_set(tmp_path)
    data.annotations.write_text(content)
    assert_refused(data, tmp_path, "not valid JSON", calls=0)


@pytest.mark.parametrize("damage", ["empty", "cut", "no picture"])
def test_a_damaged_picture_is_named(tmp_path, damage):
    def as_jpeg(content):
        content["images"][3]["file_name"] = "3.jpg"

    data = write_set(tmp_path, as_jpeg)
    height, width = SIZES[3]
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    whole = cv2.imencode(".jpg", noise)[1].tobytes()
    content = {"empty": b"", "cut": whole[: len(whole) // 2], "no picture": b"<html>" * 100}[damage]
    (tmp_path / "images/3.jpg").write_bytes(content)
    assert_refused(data, tmp_path, r"3\.jpg: not a readable image", calls=3)


def test_a_picture_that_libjpeg_calls_corrupt_is_named(tmp_path, capfd):
    def as_jpeg(content):
        content["images"][3]["file_name"] = "3.jpg"

    data = write_set(tmp_path, as_jpeg)
    noise = np.random.default_rng(0).integers(0, 256, (*SIZES[3], 3), dtype=np.uint8)
    whole = bytearray(cv2.imencode(".jpg", noise)[1].tobytes())
    whole[700:1000] = bytes(300)  # cv2 decodes it, with a warning on the standard error
    (tmp_path / "images/3.jpg").write_bytes(whole)
    assert_refused(data, tmp_path, r"3\.jpg: not a readable image \(Corrupt JPEG data: .*\); replace", calls=3)
    assert "JPEG" not in capfd.readouterr().err
