"""Pascal VOC from its folder to a measured detector, its mistakes, and its own average precision."""

import shutil
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from PIL import Image
from toy.experiment import converted, refused

from common.checkpoints.read import save_tensors
from common.cli import main
from common.config.load import load_config
from common.config.schema import DataConfig
from common.detection.average_precision import score
from common.detection.detector import build_detector
from common.evaluation.datasets import as_coco, check_data
from common.evaluation.pascal_voc import read_voc
from common.runtime.errors import UserError
from common.runtime.files import read_json

CONFIGS = Path(__file__).parents[2] / "configs/resnet"
MICRO = {"model": "maskrcnn_micro", "outputs": 21, "frozen_batch_norm": False}


def add_image(year, name, objects):
    """An image of 96 by 64 pixels and its annotation; objects are (class, corners as VOC counts, difficult)."""
    root = ElementTree.Element("annotation")
    ElementTree.SubElement(root, "filename").text = f"{name}.jpg"
    size = ElementTree.SubElement(root, "size")
    for key, value in (("width", 96), ("height", 64), ("depth", 3)):
        ElementTree.SubElement(size, key).text = str(value)
    for label, corners, difficult in objects:
        entry = ElementTree.SubElement(root, "object")
        ElementTree.SubElement(entry, "name").text = label
        ElementTree.SubElement(entry, "difficult").text = str(difficult)
        box = ElementTree.SubElement(entry, "bndbox")
        for key, value in zip(("xmin", "ymin", "xmax", "ymax"), corners, strict=True):
            ElementTree.SubElement(box, key).text = str(value)
    ElementTree.ElementTree(root).write(year / "Annotations" / f"{name}.xml")
    pixels = np.random.default_rng(int(name)).integers(0, 255, (64, 96, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(year / "JPEGImages" / f"{name}.jpg")
    with (year / "ImageSets/Main/test.txt").open("a") as stream:
        stream.write(f"{name}\n")


@pytest.fixture
def year(tmp_path):
    folder = tmp_path / "VOCdevkit/VOC2007"
    for name in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (folder / name).mkdir(parents=True)
    add_image(folder, "000001", [("dog", (1, 1, 40, 40), 0), ("cat", (41, 11, 90, 60), 0)])
    add_image(folder, "000002", [("dog", (11, 1, 40, 40), 0), ("dog", (51, 11, 90, 60), 1)])
    return folder


@pytest.fixture
def annotations(year, tmp_path):
    return as_coco(DataConfig(dataset=year, split="test"), tmp_path / "converted").annotations


def result(image, category, box, confidence):
    ids = {"cat": 1, "dog": 2}  # in the order of their names
    return {"image_id": image, "category_id": ids[category], "bbox": box, "score": confidence}


def test_a_detector_with_vocs_classes_is_measured_on_a_folder_of_voc(year, tmp_path, capsys):
    torch.manual_seed(0)
    state = build_detector("resnet", MICRO).build().state_dict()
    save_tensors(tmp_path / "voc.safetensors", state, {"family": "resnet", "architecture": MICRO})
    (tmp_path / "voc.yaml").write_text(
        f"family: resnet\nweights: {tmp_path}/voc.safetensors\ndevice: cpu\nevaluation: {{image_size: 64}}\n"
    )
    data = [f"data={year}", "data.split=test", f"evaluation.directory={tmp_path / 'measured'}"]
    assert main(["evaluate", str(tmp_path / "voc.yaml"), *data, "--json", str(tmp_path / "out.json")]) == 0
    metrics = read_json(tmp_path / "out.json")
    assert metrics["images"] == 2
    assert set(metrics["per_class"]) == {"dog", "cat"}
    assert all(0 <= metrics[name] <= 1 for name in ("AP", "AP50", "AP50_voc07"))
    assert "AP50_voc07" in capsys.readouterr().out


def test_names_with_spaces_are_whole_names_and_a_column_of_a_class_is_none(year):
    for name in ("image (1)", "image 1", "plain"):
        for folder, suffix in (("Annotations", ".xml"), ("JPEGImages", ".jpg")):
            shutil.copyfile(year / folder / f"000001{suffix}", year / folder / f"{name}{suffix}")
    (year / "ImageSets/Main/test.txt").write_text("image (1)\nimage 1\nplain  1\n000002 -1\n")
    names = [Path(image["file_name"]).stem for image in read_voc(year, "test")["images"]]
    assert names == ["image (1)", "image 1", "plain", "000002"]
    (year / "ImageSets/Main/test.txt").write_text("000001 of others\n")
    with pytest.raises(UserError, match=r"000001 of others\.xml"):
        read_voc(year, "test")
    (year / "ImageSets/Main/test.txt").write_text("a" * 5000 + "\n")
    with pytest.raises(UserError, match="File name too long"):
        read_voc(year, "test")


def test_difficult_objects_and_detections_on_them_do_not_count(annotations):
    content = read_json(annotations)
    perfect = [
        result(1, "dog", [0, 0, 40, 40], 0.9),
        result(1, "cat", [40, 10, 50, 50], 0.9),
        result(2, "dog", [10, 0, 30, 40], 0.8),
    ]
    on_difficult = result(2, "dog", [50, 10, 40, 50], 0.95)
    for detections in (perfect, [*perfect, on_difficult]):
        metrics = score(content, detections)
        assert [metrics[name] for name in ("AP", "AP50", "AP50_voc07")] == pytest.approx([1, 1, 1])
    elsewhere = result(2, "dog", [50, 0, 20, 8], 0.95)
    assert score(content, [*perfect, elsewhere])["AP50_voc07"] < 1


def test_the_eleven_point_precision_is_that_of_vocs_development_kit():
    """The formula of VOC 2007: the mean over t = 0, .1 ... 1 of the best precision at a recall of at least t."""
    rng = np.random.default_rng(3)
    boxes = [[20.0 * i, 0.0, 10.0, 10.0] for i in range(13)]
    truth = [
        {"id": i + 1, "image_id": 1, "category_id": 1, "bbox": b, "area": 100, "iscrowd": 0}
        for i, b in enumerate(boxes)
    ]
    content = {"images": [{"id": 1}], "annotations": truth, "categories": [{"id": 1, "name": "dog"}], "info": {}}
    hits = rng.permutation([True] * 9 + [False] * 8)
    places = iter(boxes)
    detections = []
    for rank, hit in enumerate(hits):
        box = next(places) if hit else [20.0 * rank, 500.0, 10.0, 10.0]
        detections.append({"image_id": 1, "category_id": 1, "bbox": box, "score": 1 - rank / 100})
    recall, precision = np.cumsum(hits) / 13, np.cumsum(hits) / np.arange(1, len(hits) + 1)
    best = [max(precision[recall >= t - 1e-9], default=0.0) for t in np.arange(0, 1.1, 0.1)]
    assert score(content, detections)["AP50_voc07"] == pytest.approx(np.mean(best))


def test_without_annotations_that_count_there_is_no_precision():
    row = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [0, 0, 9, 9], "area": 81, "iscrowd": 1}
    content = {"images": [{"id": 1}], "annotations": [row], "categories": [{"id": 1, "name": "dog"}], "info": {}}
    assert score(content, [])["AP50_voc07"] == -1


@pytest.mark.parametrize("bits", ["w8a8", "w6a6", "w4a8", "w4a4"])
def test_the_example_configuration_evaluates_on_the_test_set_of_2007(bits):
    config = load_config(CONFIGS / "maskrcnn_r50_voc.yaml", [f"bits={bits}"])
    assert config.family == "resnet"
    assert (config.data.dataset.name, config.data.split) == ("VOC2007", "test")
    assert f"w{config.quantization.weight_bits}a{config.quantization.activation_bits}" == bits


def test_boxes_of_voc_become_boxes_of_coco_and_difficult_objects_crowds(annotations):
    content = read_json(annotations)
    assert [image["file_name"] for image in content["images"]] == ["000001.jpg", "000002.jpg"]
    names = {c["id"]: c["name"] for c in content["categories"]}
    rows = [(names[a["category_id"]], a["bbox"], a["area"], a["iscrowd"]) for a in content["annotations"]]
    assert rows == [
        ("dog", [0, 0, 40, 40], 1600, 0),
        ("cat", [40, 10, 50, 50], 2500, 0),
        ("dog", [10, 0, 30, 40], 1200, 0),
        ("dog", [50, 10, 40, 50], 2000, 1),
    ]


def test_a_folder_of_voc_without_lists_counts_whole(year, tmp_path):
    data = DataConfig(dataset=year, split="test")
    before = converted(data, tmp_path)
    shutil.rmtree(year / "ImageSets")
    assert converted(data, tmp_path) == before


ENTITIES = '<!DOCTYPE a [<!ENTITY b "c"><!ENTITY d SYSTEM "file:///etc/passwd">]>'
XML = {
    "cut": ("</annotation>", "", "found no XML"),
    "encoding": ("<annotation>", '<?xml version="1.0" encoding="rot13"?><annotation>', "found no XML ("),
    "entities": ("<annotation>", f"{ENTITIES}<annotation>", "found a document type, whose entities are not read"),
    "deep": ("<annotation>", "<annotation>" + "<a>" * 30 + "</a>" * 30, "found elements more than 20 levels deep"),
    "no corner": ("xmin", "left", "object 1: bndbox: found ['', '1', '40', '40']"),
    "not a number": ("<xmin>11", "<xmin>nan", "object 1: bndbox: found ['nan', "),
    "negative": ("<xmax>40", "<xmax>4", "object 1: bndbox: found ['11', '1', '4', '40']"),
    "no class": ("<name>dog", "<name>", "object 1: name: found nothing"),
    "difficult": ("<difficult>1", "<difficult>2", "object 2: difficult: found '2'; allowed: 0 or 1"),
    "two boxes": (
        "<bndbox><xmin>11",
        "<bndbox/><bndbox><xmin>11",
        "object 1: found bndbox 2 times; allowed: each",
    ),
    "two corners": ("<xmin>11", "<xmin>1</xmin><xmin>11", "object 1: found xmin 2 times"),
    "two names": ("<name>dog", "<name>cat</name><name>dog", "object 1: found name 2 times"),
    "two sizes": ("<size>", "<size/><size>", "size: found size 2 times"),
    "broken corner": ("<xmin>11", "<xmin>1<i>1</i>", "object 1: found elements within xmin"),
    "broken name": ("<name>dog", "<name>d<b>og</b>", "object 1: found elements within name"),
    "underscore": ("<xmin>11", "<xmin>1_1", "object 1: bndbox: found ['1_1', "),
    "other case": ("object>", "Object>", "found an element 'Object', where objects are called `object`"),
    "other root": ("annotation>", "annotations>", "found the root 'annotations', where `annotation` is needed"),
    "outside": (
        "<xmin>11</xmin><ymin>1</ymin><xmax>40",
        "<xmin>97</xmin><ymin>1</ymin><xmax>99",
        "object 1: bndbox: fo",
    ),
    "another size": ("<width>96", "<width>192", "size/width: found '192'; allowed: 96, that of"),
}


@pytest.mark.parametrize("name", XML)
def test_an_annotation_that_is_not_vocs_is_named_and_nothing_in_it_is_followed(year, tmp_path, name):
    old, new, message = XML[name]
    path = year / "Annotations/000002.xml"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    lines = refused(DataConfig(dataset=year, split="test"), tmp_path)
    assert lines[0].startswith(f"{path}: {message}")


def test_what_is_no_set_or_has_no_such_part_is_one_line(year, tmp_path):
    cases = {
        (year, "evening"): r"data.split: found evening, but .*evening.txt does not exist; there are: test",
        (year / "JPEGImages", "val"): r"data: .*: found no Annotations and no JPEGImages in it",
        (tmp_path / "gone.yaml", "val"): r"data: found .*gone.yaml, which does not exist",
        (year / "Annotations/000001.xml", "val"): r"allowed are a data.yaml of Ultralytics and a folder of Pascal VOC",
    }
    for (path, split), message in cases.items():
        with pytest.raises(UserError, match=message):
            check_data(DataConfig(dataset=path, split=split))
    (year / "JPEGImages/000001.jpg").unlink()
    lines = refused(DataConfig(dataset=year, split="test"), tmp_path)
    assert len(lines) == 1
    assert f"found no image {year / 'JPEGImages/000001'}.jpg" in lines[0]
