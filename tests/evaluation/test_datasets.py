"""A set of Ultralytics' is measured as the same in COCO's format, and its mistakes are named."""

import json
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from toy.experiment import converted, refused

from common.config.schema import DataConfig, EvaluationConfig
from common.detection.detector import load_detector
from common.evaluation import coco
from common.evaluation.datasets import as_coco, check_data
from common.runtime.errors import UserError
from common.runtime.files import read_json
from common.runtime.image_files import image_size, read_image
from tools.shapes.generate import CLASS_NAMES, generate

SHAPES = Path(__file__).parents[2] / "tools/shapes"
CPU = torch.device("cpu")


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


def test_an_image_that_two_links_lead_to_counts_once(mine, tmp_path):
    whole = converted(rewrite(mine), tmp_path)
    (mine / "more").symlink_to(mine / "images")
    lines = [f"{mine / folder / path.name}\n" for folder in ("images", "more") for path in (mine / "images").iterdir()]
    (mine / "list.txt").write_text("".join(sorted(lines)))
    found = converted(rewrite(mine, val="list.txt"), tmp_path)
    assert (len(found["images"]), found["annotations"]) == (len(whole["images"]), whole["annotations"])


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
    "0_1 0.5 0.5 0.1 0.1": "found '0_1 0.5 0.5 0.1 0.1'; allowed: numbers",
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
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".tif"])
def test_the_size_of_an_image_is_that_of_its_pixels_as_they_are_read(tmp_path, orientation, suffix):
    exif = Image.Exif()
    exif[274] = orientation
    Image.new("RGB", (40, 20)).save(tmp_path / f"a{suffix}", exif=exif)
    assert image_size(tmp_path / f"a{suffix}") == tuple(read_image(tmp_path / f"a{suffix}").shape[1:])
