"""Sets in other formats than COCO's are measured as what they say in COCO's, and their mistakes are named."""

import json
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from common.checkpoints.read import save_tensors
from common.cli import main
from common.config.load import load_config
from common.config.schema import DataConfig, EvaluationConfig
from common.detection.average_precision import score
from common.detection.detector import build_detector, load_detector
from common.evaluation import coco
from common.evaluation.datasets import as_coco, check_data
from common.runtime.errors import UserError
from common.runtime.files import read_json
from common.runtime.images import image_size, read_image
from tools.shapes.generate import generate
from tools.shapes.outlines import CLASS_NAMES

CONFIGS = Path(__file__).parents[2] / "configs/resnet"
SHAPES = Path(__file__).parents[2] / "tools/shapes"
MICRO = {"model": "maskrcnn_micro", "outputs": 21, "frozen_batch_norm": False}


CPU = torch.device("cpu")


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


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """Sixteen images of shapes with COCO annotations, and the same as Ultralytics has them."""
    folder = tmp_path_factory.mktemp("drawn")
    generate(folder, 16, image_size=96)
    content = read_json(folder / "annotations.json")
    for row in content["annotations"]:
        row["area"] = row["bbox"][2] * row["bbox"][3]
    (folder / "annotations.json").write_text(json.dumps(content))
    (folder / "labels").mkdir()
    files = {image["id"]: folder / "labels" / f"{Path(image['file_name']).stem}.txt" for image in content["images"]}
    for file in files.values():
        file.write_text("")
    for row in content["annotations"]:
        x, y, w, h = (value / 96 for value in row["bbox"])
        with files[row["image_id"]].open("a") as stream:
            stream.write(f"{row['category_id'] - 1} {x + w / 2:.6f} {y + h / 2:.6f} {w:.6f} {h:.6f}\n")
    names = [category["name"] for category in content["categories"]]
    (folder / "data.yaml").write_text(yaml.safe_dump({"train": "images", "val": "images", "names": names}))
    return folder


@pytest.fixture
def mine(drawn, tmp_path):
    """A copy of the set that a test may change."""
    return Path(shutil.copytree(drawn, tmp_path / "mine"))


def rewrite(folder, **changes):
    values = yaml.safe_load((folder / "data.yaml").read_text()) | changes
    (folder / "data.yaml").write_text(yaml.safe_dump({k: v for k, v in values.items() if v is not None}))
    return DataConfig(dataset=folder / "data.yaml")


def converted(data, folder):
    return read_json(as_coco(data, folder / "converted").annotations)


def refused(data, folder):
    """The lines of the refusal; nothing is left behind."""
    with pytest.raises(UserError) as error:
        as_coco(data, folder / "converted")
    assert not list((folder / "converted").glob("*.json"))
    return str(error.value).splitlines()


def test_ap_of_a_data_yaml_is_that_of_the_coco_file_and_that_of_pycocotools(drawn, tmp_path, capsys):
    detector = load_detector("yolo11", SHAPES / "micro_yolo11.safetensors")
    settings, module = EvaluationConfig(image_size=96), detector.build()
    plain = DataConfig(images=drawn / "images", annotations=drawn / "annotations.json")
    yolo = as_coco(DataConfig(dataset=drawn / "data.yaml"), tmp_path)
    keys = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large", "AR100", "AP50_voc07", "per_class")
    ours, theirs = (
        coco.evaluate(detector, module, data, settings, device=CPU, predictions=tmp_path / name)
        for data, name in ((yolo, "a"), (plain, "b"))
    )
    assert ours["AP"] > 0.1
    assert {key: ours[key] for key in keys} == {key: theirs[key] for key in keys}
    known = COCO(str(drawn / "annotations.json"))
    direct = COCOeval(known, known.loadRes(str(tmp_path / "b")), "bbox")
    direct.evaluate(), direct.accumulate(), direct.summarize()
    assert ours["AP"] == direct.stats[0]


def test_boxes_outlines_and_images_without_labels_are_what_ultralytics_makes_of_them(mine, tmp_path):
    first, second, third = sorted((mine / "labels").iterdir())[:3]
    first.write_text("3 0.5 0.5 0.25 0.5\n\n0 0.25 0.25 0.75 0.25 0.75 0.5\n")
    second.write_text("")
    third.unlink()
    content = converted(rewrite(mine), tmp_path)
    assert [image["file_name"] for image in content["images"][:2]] == ["000000.png", "000001.png"]
    assert not {2, 3} & {row["image_id"] for row in content["annotations"]}
    square, outline = content["annotations"][:2]
    assert (square["category_id"], square["bbox"], square["area"]) == (3, [36, 24, 24, 48], 1152)
    assert (outline["category_id"], outline["bbox"], outline["area"]) == (0, [24, 24, 48, 24], 576)
    assert outline["segmentation"] == [[24, 24, 72, 24, 72, 48]]


PLACES = {
    "a folder": {"val": "images"},
    "path beside the file": {"path": ".", "val": "images"},
    "an absolute path": {"path": "{folder}", "val": "images/"},
    "folders": {"val": ["images", "images"]},
    "one folder up, as packed elsewhere": {"val": "../images"},
    "a list": {"val": "list.txt"},
    "another name of the split": {"val": None, "validation": "images"},
    "numbered names": {"names": dict(enumerate(CLASS_NAMES)), "nc": 10},
}


@pytest.mark.parametrize("name", PLACES)
def test_images_are_found_where_ultralytics_looks(drawn, mine, tmp_path, name, monkeypatch):
    reference = converted(DataConfig(dataset=drawn / "data.yaml"), tmp_path)
    files = sorted((mine / "images").iterdir())
    (mine / "list.txt").write_text(
        "\n".join([f"./images/{file.name}" for file in files[:8]] + list(map(str, files[8:])))
    )
    changes = {k: v.format(folder=mine) if isinstance(v, str) else v for k, v in PLACES[name].items()}
    found = converted(rewrite(mine, **changes), tmp_path)
    assert [image["file_name"] for image in found["images"]] == [image["file_name"] for image in reference["images"]]
    assert found["annotations"] == reference["annotations"]


def test_the_path_of_a_data_yaml_may_be_relative_to_the_current_directory(mine, tmp_path, monkeypatch):
    elsewhere = tmp_path / "elsewhere/data.yaml"
    elsewhere.parent.mkdir()
    elsewhere.write_text((mine / "data.yaml").read_text() + f"path: {mine.name}\n")
    monkeypatch.chdir(tmp_path)
    assert len(converted(DataConfig(dataset=elsewhere), tmp_path / "found")["images"]) == 16
    monkeypatch.chdir(elsewhere.parent)
    (line,) = refused(DataConfig(dataset=elsewhere), tmp_path)
    assert line.startswith(f"{elsewhere}: val: found 'images', which does not exist; allowed: a folder or a .txt list;")
    assert f"looked for {elsewhere.parent / mine.name / 'images'}" in line


def test_labels_of_a_linked_folder_of_images_are_found_beside_the_link_or_its_target(mine, tmp_path):
    whole = converted(rewrite(mine), tmp_path)["annotations"]
    other = tmp_path / "other"
    other.mkdir()
    (other / "images").symlink_to(mine / "images")
    shutil.copy(mine / "data.yaml", other)
    assert converted(DataConfig(dataset=other / "data.yaml"), tmp_path)["annotations"] == whole
    (other / "labels").symlink_to(mine / "labels")
    (mine / "images/again").symlink_to(mine / "images")
    assert converted(DataConfig(dataset=other / "data.yaml"), tmp_path)["annotations"] == whole


LABELS = {
    "-1 0.5 0.5 0.1 0.1": "found class -1; allowed: a whole number from 0 to 9",
    "10 0.5 0.5 0.1 0.1": "found class 10; allowed: a whole number from 0 to 9",
    "1.5 0.5 0.5 0.1 0.1": "found class 1.5",
    "nan 0.5 0.5 0.1 0.1": "found class nan",
    "0 0.5 1.01 0.1 0.1": "found coordinate 1.01; allowed: 0 to 1",
    "0 0.5 nan 0.1 0.1": "found coordinate nan",
    "0 0.5 0.5 -0.1 0.1": "found coordinate -0.1",
    "0 0.5 0.5 0.1": "found 4 columns; allowed: `class x_center",
    "0 0.5 0.5 0.1 0.1 0.9": "found 6 columns",
    "0 0.1 0.1 0.2 0.2 0.3 0.3 0.4": "found 8 columns",
    "circle 0.5 0.5 0.1 0.1": "found 'circle 0.5 0.5 0.1 0.1'; allowed: numbers",
}


def test_all_mistakes_of_all_label_files_come_at_once_with_their_lines(mine, tmp_path):
    first, second, third = sorted((mine / "labels").iterdir())[:3]
    first.write_text("0 0.5 0.5 0.1 0.1\n" + "\n".join(LABELS) + "\n")
    second.write_bytes(b"0 0.5 0.5 0.1 0.1\n\xff\xfe\n")
    third.unlink()
    third.mkdir()
    lines = refused(rewrite(mine), tmp_path)
    assert len(lines) == len(LABELS) + 2
    for number, (line, message) in enumerate(zip(lines, LABELS.values(), strict=False), 2):
        assert line.startswith(f"{first}:{number}: {message}")
    assert lines[-2].startswith(f"{second}: found a file that cannot be read")
    assert lines[-1].startswith(f"{third}: found a file that cannot be read")
    (mine / "images/000003.png").write_bytes(b"no image")
    assert any("000003.png: found no readable image" in line for line in refused(rewrite(mine), tmp_path))


YAMLS = {
    "no names": ({"names": None}, "names: found nothing; allowed: a list of the classes' names"),
    "another number": ({"nc": 3}, "nc: found 3, but 10 names; allowed: the same number"),
    "a number too large": ({"names": None, "nc": 10**9}, "nc: found 1000000000; allowed: the number of classes"),
    "a gap": ({"names": {0: "a", 2: "b"}}, "names: found [0, 2]; allowed: the numbers 0, 1, 2"),
    "yes": ({"names": [True, "b"]}, "names[0]: found True; allowed: a text; quote it"),
    "twice": ({"names": ["a", "a"]}, "names: found 'a' twice"),
    "poses": ({"kpt_shape": [17, 3]}, "kpt_shape: found [17, 3]"),
    "no split": ({"val": None}, "val: found nothing; allowed: a folder of images, a .txt list; the file has train"),
    "a number": ({"val": 3}, "val: found 3; allowed: a folder"),
    "a missing folder": ({"val": "gone"}, "val: found 'gone', which does not exist; allowed: a folder"),
    "a path that is none": ({"path": [1]}, "path: found [1]; allowed: a folder"),
}


@pytest.mark.parametrize("name", YAMLS)
def test_a_data_yaml_that_is_wrong_is_refused_before_any_work(mine, name):
    changes, message = YAMLS[name]
    with pytest.raises(UserError, match=re.escape(f"{mine / 'data.yaml'}: {message}")):
        check_data(rewrite(mine, **changes))


def test_nothing_in_a_data_yaml_runs_or_is_fetched(mine, tmp_path, caplog):
    caplog.set_level("INFO", "zsqdet")
    converted(rewrite(mine, download=f"import os; os.mkdir({str(tmp_path / 'made')!r})"), tmp_path)
    assert not (tmp_path / "made").exists()
    assert "`download` is not followed" in caplog.text
    (mine / "data.yaml").write_text(f"names: !!python/object/apply:os.mkdir ['{tmp_path / 'made'}']\n")
    assert "found the tag" in refused(DataConfig(dataset=mine / "data.yaml"), tmp_path / "none")[0]
    assert not (tmp_path / "made").exists()


def test_the_same_set_is_one_file_and_changed_labels_make_another(mine, tmp_path):
    data, folder = rewrite(mine), tmp_path / "converted"
    with ThreadPoolExecutor(4) as pool:
        assert len({pool.submit(as_coco, data, folder).result().annotations for _ in range(4)}) == 1
    before = as_coco(data, folder)
    (mine / "labels/000000.txt").write_text("0 0.5 0.5 0.1 0.1\n")
    after = as_coco(data, folder)
    assert after.annotations != before.annotations
    assert len(list(folder.glob("*.json"))) == 2
    assert as_coco(after.model_copy(update={"images": None, "annotations": None}), folder) == after


def test_a_set_without_any_label_or_image_is_refused(mine, tmp_path):
    shutil.move(mine / "labels", mine / "lables")
    (line,) = refused(rewrite(mine), tmp_path)
    assert line.endswith(f"found no label file of any image; allowed: for the first one {mine / 'labels/000000.txt'}")
    shutil.rmtree(mine / "images")
    (mine / "images").mkdir()
    assert "found no image; allowed: image files" in refused(rewrite(mine), tmp_path)[0]


def test_classes_are_matched_by_name_and_what_has_no_counterpart_is_said(mine, tmp_path, caplog):
    caplog.set_level("INFO", "zsqdet")
    detector = load_detector("yolo11", SHAPES / "micro_yolo11.safetensors")
    module, settings = detector.build(), EvaluationConfig(image_size=96)

    def measure(names):
        data = as_coco(rewrite(mine, names=names), tmp_path / "converted")
        return coco.evaluate(detector, module, data, settings, device=CPU)["AP"]

    names = list(detector.class_names)
    plain = measure(names)
    assert measure([names[0].upper(), f"{names[1]}_", *names[2:]]) == plain
    assert measure([*names, "unused"]) == plain
    assert "no object has 'unused', unknown to the detector; left out" in caplog.text
    with pytest.raises(UserError, match=r"data.yaml: 10 categories, of which 'wheel' is none of the detector's 10"):
        measure(["wheel", *names[1:]])
    for file in (mine / "labels").iterdir():
        file.write_text("\n".join(line for line in file.read_text().splitlines() if line[0] == "1"))
    measure(names[:2])
    assert (
        f"has not the detector's {', '.join(map(repr, names[2:7]))} and 3 more; such detections are left out"
        in caplog.text
    )


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp"])
def test_the_size_of_an_image_is_that_of_its_pixels_as_they_are_read(tmp_path, orientation, suffix):
    exif = Image.Exif()
    exif[274] = orientation
    Image.new("RGB", (40, 20)).save(tmp_path / f"a{suffix}", exif=exif)
    assert image_size(tmp_path / f"a{suffix}") == tuple(read_image(tmp_path / f"a{suffix}").shape[1:])


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
    "entities": ("<annotation>", f"{ENTITIES}<annotation>", "found a document type, whose entities are not read"),
    "deep": ("<annotation>", "<annotation>" + "<a>" * 30 + "</a>" * 30, "found elements more than 20 levels deep"),
    "no corner": ("xmin", "left", "object 1: bndbox: found ['', '1', '40', '40']"),
    "not a number": ("<xmin>11", "<xmin>nan", "object 1: bndbox: found ['nan', "),
    "negative": ("<xmax>40", "<xmax>4", "object 1: bndbox: found ['11', '1', '4', '40']"),
    "no class": ("<name>dog", "<name>", "object 1: name: found nothing"),
    "difficult": ("<difficult>1", "<difficult>2", "object 2: difficult: found '2'; allowed: 0 or 1"),
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
