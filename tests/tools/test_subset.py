"""A part of a set as a set of its own: the right images, nothing overwritten, nothing left half done."""

import json
from pathlib import Path

import pytest

from tools import subset


@pytest.fixture
def coco(tmp_path):
    """40 images, listed backwards; class 1 is in all of them, class 2 in three."""
    (tmp_path / "all").mkdir()
    images, annotations = [], []
    for i in reversed(range(40)):
        name = f"{i:03d}.jpg"
        (tmp_path / "all" / name).write_text(name)
        images.append({"id": i, "file_name": name, "width": 10, "height": 10})
        for category in [1] + [2] * (i in (11, 22, 33)):
            row = {"id": len(annotations) + 1, "image_id": i, "category_id": category, "bbox": [0, 0, 1, 1]}
            annotations.append(row)
    content = {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}],
    }
    (tmp_path / "all.json").write_text(json.dumps(content))
    return tmp_path


def make_subset(folder, name, *options):
    command = [str(folder / "all.json"), str(folder / "all"), str(folder / name), "--count", "6", *options]
    assert subset.main(command) == 0
    content = json.loads((folder / name / "annotations.json").read_text())
    names = [image["file_name"] for image in content["images"]]
    assert sorted(path.name for path in (folder / name / "images").iterdir()) == names
    assert {a["image_id"] for a in content["annotations"]} <= {image["id"] for image in content["images"]}
    return names, content


def test_the_first_images_are_the_first_by_name(coco):
    names, content = make_subset(coco, "first")
    assert names == [f"{i:03d}.jpg" for i in range(6)]
    assert len(content["annotations"]) == 6
    link = coco / "first/images/000.jpg"
    assert link.is_symlink()
    assert link.read_text() == "000.jpg"


def test_random_images_depend_on_the_seed_alone(coco):
    options = ("--how", "random", "--seed")
    first, again, other = (make_subset(coco, n, *options, s)[0] for n, s in (("a", "1"), ("b", "1"), ("c", "2")))
    assert first == again != other


def test_a_stratified_subset_has_the_rare_class_as_often_as_the_common_one(coco):
    names, _ = make_subset(coco, "even", "--how", "stratified", "--copy")
    assert {"011.jpg", "022.jpg", "033.jpg"} <= set(names)
    assert not (coco / "even/images/011.jpg").is_symlink()


def test_a_subset_overwrites_nothing_and_an_interrupted_one_is_completed(coco, capsys):
    make_subset(coco, "part")
    command = [str(coco / "all.json"), str(coco / "all"), str(coco / "part"), "--count", "6"]
    assert subset.main(command) == 2
    assert "exists; remove it first" in capsys.readouterr().err
    (coco / "part/annotations.json").unlink()
    (coco / "part/images/003.jpg").unlink()
    assert subset.main([*command[:-1], "5"]) == 2
    assert "contains other images" in capsys.readouterr().err
    make_subset(coco, "part")


def test_too_large_a_subset_and_missing_images_are_one_line(coco, capsys):
    command = [str(coco / "all.json"), str(coco / "all"), str(coco / "out"), "--count"]
    assert subset.main([*command, "41"]) == 2
    (coco / "all/004.jpg").unlink()
    assert subset.main([*command, "6"]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 2
    assert Path(errors[1].split(":")[1].strip()).name == "004.jpg"


@pytest.mark.parametrize("content", ["[]", "{}", '{"images": [{"id": 1}]}'])
def test_a_subset_of_what_is_no_coco_file_is_one_line(coco, capsys, content):
    (coco / "all.json").write_text(content)
    assert subset.main([str(coco / "all.json"), str(coco / "all"), str(coco / "out"), "--count", "1"]) == 2
    assert "not a COCO detection file" in capsys.readouterr().err


def test_an_interrupted_copy_leaves_no_half_image(coco, monkeypatch, capsys):
    def interrupted(source, target):
        Path(target).write_text("00")
        raise KeyboardInterrupt

    command = [str(coco / "all.json"), str(coco / "all"), str(coco / "out"), "--count", "6", "--copy"]
    with monkeypatch.context() as patched:
        patched.setattr(subset.shutil, "copyfile", interrupted)
        assert subset.main(command) == 130
    assert capsys.readouterr().err.endswith("interrupted; rerun the same command to resume\n")
    assert list((coco / "out/images").iterdir()) == []
    assert subset.main(command) == 0
    assert (coco / "out/images/000.jpg").read_text() == "000.jpg"
