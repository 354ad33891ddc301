"""Sets of images: damage is noticed and mended, a large one needs little memory; first, true and updated labels."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from toy.adapter import ToyDetector

from common.config.schema import LabelSamplingConfig, SynthesisConfig
from common.detection.coco_json import read_coco
from common.detection.types import Detections, Targets
from common.runtime.errors import UserError
from common.synthesis import ImageSet, stage, synthesize
from common.synthesis.imageset import IMAGES, ImageRecord, encoded, image_name, is_complete, write_image, write_set
from common.synthesis.labels import labels_of_files, read_labels, relabel, sample_labels, scale_labels, take_labels

CONFIG = LabelSamplingConfig(confidence=0.2, overlap=0.35, min_area=0.01, max_area=0.85)
LEFT, RIGHT, BELOW = [0.0, 0.0, 40.0, 40.0], [50.0, 0.0, 90.0, 40.0], [0.0, 50.0, 40.0, 90.0]

CPU = torch.device("cpu")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def stacked(targets):
    return torch.cat([t.boxes for t in targets]), torch.cat([t.labels for t in targets])


def test_one_box_follows_the_published_distribution():
    drawn = sample_labels("one_box", 20000, 100, 7, generator())
    boxes, labels = stacked(drawn)
    assert boxes.shape == (20000, 4)
    sides, centres = boxes[:, 2:] - boxes[:, :2], (boxes[:, 2:] + boxes[:, :2]) / 2
    # Quantiles of U(20, 80) for the sides, and of U(0, 1) for the centre's place between w/2 and 100 - w/2.
    place = (centres - sides / 2) / (100 - sides)
    levels = torch.linspace(0.05, 0.95, 10)
    for axis in (0, 1):
        assert torch.allclose(sides[:, axis].quantile(levels), 20 + 60 * levels, atol=1.5)
        assert torch.allclose(place[:, axis].quantile(levels), levels, atol=0.02)
    # Width, height and the places are independent of each other.
    assert torch.corrcoef(torch.cat([sides, place], 1).T).fill_diagonal_(0).abs().max() < 0.03
    share = labels.bincount(minlength=7) / 20000
    assert torch.allclose(share, torch.full((7,), 1 / 7), atol=0.015)


def test_multi_box_has_1_to_25_boxes_inside_the_image():
    drawn = sample_labels("multi_box", 4000, 64, 3, generator())
    numbers = torch.tensor([len(t.labels) for t in drawn])
    assert numbers.min() == 1
    assert numbers.max() == 25
    assert abs(numbers.float().mean() - 13) < 0.5
    boxes, _ = stacked(drawn)
    assert boxes.min() >= 0
    assert boxes.max() <= 64.0001


def test_mosaic_puts_one_box_into_each_quadrant():
    for target in sample_labels("mosaic", 200, 100, 5, generator()):
        low = torch.tensor([[0.0, 0.0], [50.0, 0.0], [0.0, 50.0], [50.0, 50.0]])
        assert (target.boxes[:, :2] >= low - 1e-3).all()
        assert (target.boxes[:, 2:] <= low + 50.001).all()
        assert (target.boxes[:, 2:] - target.boxes[:, :2]).min() >= 9.999


def test_a_scene_has_2_to_20_small_boxes_of_up_to_four_classes():
    drawn = sample_labels("scene", 4000, 200, 1000, generator())
    numbers = torch.tensor([len(t.labels) for t in drawn])
    assert numbers.aminmax() == (2, 20)
    assert abs(numbers.float().mean() - 11) < 0.4
    assert max(len(t.labels.unique()) for t in drawn) == 4
    boxes, _ = stacked(drawn)
    assert boxes.min() >= 0
    assert boxes.max() <= 200.001
    width, height = (boxes[:, 2:] - boxes[:, :2]).T
    levels = torch.linspace(0.05, 0.95, 10)
    # Logarithms: of the size in fractions of the image between .05 and .35, of the ratio between 1/2 and 2.
    size, ratio = ((width * height).sqrt() / 200).log(), (width / height).log()
    low, high = torch.tensor([0.05, 0.35]).log()
    assert torch.allclose(size[::5].quantile(levels), low + (high - low) * levels, atol=0.05)
    assert torch.allclose(ratio[::5].quantile(levels), (2 * levels - 1) * torch.tensor(2.0).log(), atol=0.05)
    assert torch.corrcoef(torch.stack([size, ratio, boxes[:, 0] / (200 - width)])).fill_diagonal_(0).abs().max() < 0.02


def test_the_same_seed_draws_the_same_labels():
    first, second, other = (sample_labels("multi_box", 5, 64, 9, generator(s)) for s in (3, 3, 4))
    assert all(a.boxes.equal(b.boxes) and a.labels.equal(b.labels) for a, b in zip(first, second, strict=True))
    assert not stacked(first)[0].equal(stacked(other)[0])


def test_labels_scale_with_the_image():
    target = sample_labels("one_box", 1, 640, 9, generator())[0]
    assert torch.allclose(scale_labels([target], 0.25)[0].boxes * 4, target.boxes)


def coco_file(tmp_path, **changes):
    content = {
        "images": [
            {"id": 5, "width": 200, "height": 100},
            {"id": 9, "width": 100, "height": 400},
            {"id": 11, "width": 9, "height": 9},
        ],
        "categories": [{"id": 3, "name": "square"}, {"id": 90, "name": "circle"}, {"id": 4, "name": "unknown"}],
        "annotations": [
            {"image_id": 5, "category_id": 3, "bbox": [20, 10, 50, 80]},
            {"image_id": 5, "category_id": 4, "bbox": [0, 0, 9, 9]},
            {"image_id": 9, "category_id": 90, "bbox": [90, 300, 40, 50]},
            {"image_id": 9, "category_id": 3, "bbox": [0, 0, 50, 50], "iscrowd": 1},
            {"image_id": 9, "category_id": 3, "bbox": [10, 10, 0, 50]},
        ],
    }
    path = tmp_path / "labels.json"
    path.write_text(json.dumps(content | changes))
    return path


def test_true_labels_are_letterboxed_and_matched_by_class_name(tmp_path):
    wide, tall = read_labels(coco_file(tmp_path), ("circle", "square"), 100)
    assert wide.boxes.tolist() == [[10, 30, 35, 70]]  # halved, 25 pixels of border above
    assert wide.labels.tolist() == [1]
    assert tall.boxes.tolist() == [[60, 75, 62.5, 87.5]]  # quartered, 37.5 of border at the left, cut at the image
    assert tall.labels.tolist() == [0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"annotations": []}, "annotations: found .*nothing to measure"),
        ({"categories": [{"id": i, "name": f"zebra {i}"} for i in (3, 4, 90)]}, "no box of the detector's classes"),
        ({"images": []}, "images: found "),
        ({"annotations": [{"image_id": 5, "category_id": 3}]}, r"annotations\[0\]\.bbox: found nothing"),
    ],
)
def test_an_unusable_annotation_file_is_a_users_error(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        read_labels(coco_file(tmp_path, **changes), ("circle", "square"), 100)


def test_true_labels_of_another_size_than_the_image_are_refused(tmp_path):
    """An image that a viewer turns has its sides as they are seen."""
    exif = Image.Exif()
    exif[274] = 6
    Image.new("RGB", (120, 40)).save(tmp_path / "a.jpg", exif=exif)
    content = {"annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [0, 0, 30, 20]}]}
    content |= {"categories": [{"id": 1, "name": "cat"}]}
    for width, height in ((40, 120), (120, 40), (999, 500)):
        images = [{"id": 1, "file_name": "a.jpg", "width": width, "height": height}]
        (tmp_path / "a.json").write_text(json.dumps(content | {"images": images}))
        if width == 40:
            assert len(labels_of_files(tmp_path / "a.json", [tmp_path / "a.jpg"], ["cat"], 64)[0].boxes) == 1
            continue
        with pytest.raises(
            UserError, match=f"a.jpg: 40x120 pixels, but {width}x{height} in .*a.json; boxes of another"
        ):
            labels_of_files(tmp_path / "a.json", [tmp_path / "a.jpg"], ["cat"], 64)


def test_true_labels_are_all_used_before_one_comes_twice():
    pool = sample_labels("one_box", 5, 64, 2, generator())
    taken = take_labels(pool, 0, 3, seed=1) + take_labels(pool, 3, 2, seed=1)
    assert {id(t) for t in taken} == {id(t) for t in pool}
    assert [id(t) for t in take_labels(pool, 5, 5, seed=1)] == [id(t) for t in taken]


def labels(*rows):
    return Targets(torch.tensor([r[0] for r in rows]), torch.tensor([r[1] for r in rows]))


def found(*rows):
    if not rows:
        return Detections(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64))
    return Detections(
        torch.tensor([r[0] for r in rows]), torch.tensor([r[1] for r in rows]), torch.tensor([r[2] for r in rows])
    )


def rows(targets):
    return [(box, label) for box, label in zip(targets.boxes.tolist(), targets.labels.tolist(), strict=True)]


def test_a_confident_detection_elsewhere_becomes_a_label():
    edited = relabel(labels((LEFT, 1)), found((LEFT, 0.9, 1), (RIGHT, 0.5, 7)), 100, CONFIG)
    assert rows(edited) == [(LEFT, 1), (RIGHT, 7)]


def test_a_detection_must_be_above_the_confidence():
    edited = relabel(labels((LEFT, 1)), found((RIGHT, 0.2, 7)), 100, CONFIG)
    assert rows(edited) == [(LEFT, 1)]


def test_a_detection_on_a_label_changes_neither_its_box_nor_its_class():
    shifted = [2.0, 2.0, 42.0, 42.0]
    edited = relabel(labels((LEFT, 1)), found((shifted, 0.9, 5)), 100, CONFIG)
    assert rows(edited) == [(LEFT, 1)]


def test_overlap_is_counted_from_the_threshold_on():
    # IoU of a box with its part of width w is w / 40: .325 is new, .375 is not.
    for width, new in ((13.0, True), (15.0, False)):
        part = [0.0, 0.0, width, 40.0]
        edited = relabel(labels((LEFT, 1)), found((part, 0.9, 2)), 100, CONFIG)
        assert len(edited.labels) == 1 + new


def test_an_unsupported_label_goes_when_the_image_has_others():
    edited = relabel(labels((LEFT, 1), (RIGHT, 2)), found((LEFT, 0.9, 1)), 100, CONFIG)
    assert rows(edited) == [(LEFT, 1)]


def test_support_does_not_ask_for_the_class():
    edited = relabel(labels((LEFT, 1), (RIGHT, 2)), found((LEFT, 0.9, 8), (RIGHT, 0.9, 9)), 100, CONFIG)
    assert rows(edited) == [(LEFT, 1), (RIGHT, 2)]


def test_an_only_label_stays_without_support():
    edited = relabel(labels((LEFT, 1)), found((RIGHT, 0.9, 2)), 100, CONFIG)
    assert rows(edited)[0] == (LEFT, 1)


def test_the_best_supported_label_stays_where_none_is_supported():
    near = [60.0, 0.0, 72.0, 40.0]  # IoU .3 with RIGHT, none with the others
    edited = relabel(labels((LEFT, 1), (RIGHT, 2), (BELOW, 3)), found((near, 0.9, 5)), 100, CONFIG)
    assert rows(edited) == [(RIGHT, 2), (near, 5)]


def test_an_image_without_detections_or_labels_is_left_as_it_is():
    both = labels((LEFT, 1), (RIGHT, 2))
    assert rows(relabel(both, found(), 100, CONFIG)) == rows(both)
    assert rows(relabel(both, found((BELOW, 0.1, 1)), 100, CONFIG)) == rows(both)
    empty = Targets(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))
    assert len(relabel(empty, found((LEFT, 0.9, 1)), 100, CONFIG).labels) == 0


def test_new_labels_lie_strictly_between_the_areas():
    small, least, enough = [60.0, 60.0, 69.0, 69.0], [60.0, 60.0, 70.0, 70.0], [60.0, 60.0, 71.0, 71.0]
    for box, new in ((small, False), (least, False), (enough, True)):
        assert len(relabel(labels((LEFT, 1)), found((box, 0.9, 2)), 100, CONFIG).labels) == 1 + new
    large = [1.0, 1.0, 99.0, 99.0]  # .96 of the image
    assert len(relabel(labels((LEFT, 1)), found((large, 0.9, 2)), 100, CONFIG).labels) == 1


def test_one_new_object_does_not_get_two_classes():
    edited = relabel(labels((LEFT, 1)), found((RIGHT, 0.5, 7), (RIGHT, 0.8, 3), (BELOW, 0.3, 4)), 100, CONFIG)
    assert rows(edited) == [(LEFT, 1), (RIGHT, 3), (BELOW, 4)]


def test_new_labels_are_cut_at_all_borders():
    edited = relabel(labels((LEFT, 1)), found(([60.0, 50.0, 130.0, 110.0], 0.9, 2)), 100, CONFIG)
    assert rows(edited)[1] == ([60.0, 50.0, 100.0, 100.0], 2)


def make(directory, **changes):
    small = {"num_images": 5, "batch_size": 2, "image_size": 64, "low_resolution_size": 32, "iterations": 2}
    config = SynthesisConfig(**small | {"low_resolution_iterations": 2, "directory": directory} | changes)
    return synthesize(ToyDetector(), config, seed=0, device=CPU, weights_sha256="hash")


def content(folder):
    """Every file of a set, without the times."""
    found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for name in list(found):
        if name == "set.json" or name.startswith("batches/"):
            found[name] = {k: v for k, v in json.loads(found[name]).items() if k not in ("seconds", "sha256")}
    return found


def flip(path, place):
    changed = bytearray(path.read_bytes())
    changed[int(len(changed) * place)] ^= 1
    path.write_bytes(changed)


DAMAGE = {
    "gone": Path.unlink,
    "empty": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-5]),
    "other JSON": lambda path: path.write_text("[]"),
    "too deep": lambda path: path.write_text("[" * 100_000),
    "a bit early": lambda path: flip(path, 0.3),
    "a bit late": lambda path: flip(path, 0.8),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", ["annotations.json", "set.json", "images/000003.png", "batches/000001.json"])
def test_what_is_damaged_is_made_again_and_equal_and_the_rest_is_left_alone(tmp_path, name, damage):
    folder = make(tmp_path, source="noise")
    before = content(folder)
    untouched = (folder / "images/000000.png").stat().st_mtime_ns
    DAMAGE[damage](folder / name)
    if not name.startswith("batches/"):
        with pytest.raises(UserError, match=Path(name).stem) as caught:
            ImageSet(folder).batch(range(5), CPU)
        assert "\n" not in str(caught.value)
    assert make(tmp_path, source="noise") == folder
    assert content(folder) == before
    assert (folder / "images/000000.png").stat().st_mtime_ns == untouched


def test_in_a_set_too_large_to_hash_at_once_the_damaged_file_is_named_when_it_is_read(tmp_path, monkeypatch):
    folder = make(tmp_path, source="noise")
    monkeypatch.setattr(stage, "HASHED_AT_START", 0)
    flip(folder / "images/000003.png", 0.5)
    assert make(tmp_path, source="noise") == folder
    with pytest.raises(UserError, match=r"000003\.png: damaged; remove this file and repeat"):
        ImageSet(folder).image(3)
    (folder / "images/000003.png").unlink()
    assert ImageSet(make(tmp_path, source="noise")).image(3).shape == (3, 64, 64)


def test_labels_that_are_damaged_while_the_set_is_being_finished_do_not_count_as_whole(tmp_path):
    def describe():
        path = tmp_path / "annotations.json"
        path.write_bytes(path.read_bytes().replace(b'"id"', b'"ie"', 1))
        return {}

    write_set(tmp_path, [ImageRecord("0" * 64, 8, 8, [(1, 1, 4, 4)], [0])], ("a",), describe)
    assert not is_complete(tmp_path)


def test_new_code_makes_new_sets_where_its_version_was_raised(tmp_path, monkeypatch):
    first = make(tmp_path, source="noise")
    monkeypatch.setattr(stage, "SET_VERSION", stage.SET_VERSION + 1)
    assert make(tmp_path, source="noise") != first


def test_labels_and_masks_come_back_also_of_images_without_any(tmp_path):
    planes = torch.rand(2, 16, 16, generator=torch.Generator().manual_seed(0)) > 0.5
    labelled = ([[1.0, 2.0, 9.5, 12.25], [0.0, 0.0, 16.0, 16.0]], [1, 0], encoded(planes))
    records = []
    for i in range(6):
        _, digest = write_image(tmp_path / IMAGES / image_name(i), torch.full((3, 16, 16), i, dtype=torch.uint8))
        records.append(ImageRecord(digest, 16, 16, *(labelled if i in (1, 4) else ([], []))))
    for some in (records, records[:1], records[1:2]):
        write_set(tmp_path, some, ("a", 'b "c"\n'), dict)
        images = ImageSet(tmp_path)
        assert len(images) == len(some)
        assert images.class_names == ("a", 'b "c"\n')
        for i, record in enumerate(some):
            targets = images.targets(i)
            assert targets.boxes.tolist() == list(record.boxes)
            assert targets.labels.tolist() == list(record.labels)
            assert (targets.masks is None) == (not record.labels)
            if record.labels:
                assert torch.equal(targets.masks, planes)
        read_coco(tmp_path / "annotations.json", masks=True, files=True, may_be_empty=True)


def test_a_detector_without_masks_neither_decodes_nor_keeps_those_of_true_labels(tmp_path, monkeypatch):
    outline = {"segmentation": [[0, 0, 20, 0, 20, 20, 0, 20]]}
    rows = [{"id": i, "image_id": i, "category_id": 1, "bbox": [0, 0, 20, 20]} | outline for i in range(5)]
    images = [{"id": i, "file_name": f"{i}.png", "width": 40, "height": 40} for i in range(5)]
    labels = {"images": images, "annotations": rows, "categories": [{"id": 1, "name": "circle"}]}
    (tmp_path / "labels.json").write_text(json.dumps(labels))
    monkeypatch.setattr("common.synthesis.labels.decode", lambda *_: pytest.fail("a mask was decoded"))
    made = ImageSet(make(tmp_path, source="noise", labels="true_label", annotations=tmp_path / "labels.json"))
    assert [made.targets(i).labels.tolist() for i in range(5)] == [[0]] * 5
    assert "segmentation" not in (made.directory / "annotations.json").read_text()


BOOKKEEPING = """
import resource, sys
from pathlib import Path
import torch
from PIL import Image
from toy.adapter import ToyDetector
from common.config.schema import SynthesisConfig
from common.synthesis import ImageSet, synthesize
folder, count = Path(sys.argv[1]), int(sys.argv[2])
config = SynthesisConfig(source="noise", labels="multi_box", num_images=count, batch_size=64, image_size=32,
                         low_resolution_size=32, directory=folder)
make = lambda: synthesize(ToyDetector(), config, seed=0, device=torch.device("cpu"), weights_sha256="hash")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert make() == make()
images = ImageSet(make())
assert len(images) == count
images.batch([0, count // 2, count - 1], torch.device("cpu"))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


def test_the_memory_that_a_set_takes_hardly_grows_with_its_images(tmp_path):
    """MiB beyond the program itself; with 118,287 images of 32 pixels it is 106."""
    used = []
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (root, root / "tests")))}
    for count in (64, 1000):
        command = [sys.executable, "-c", BOOKKEEPING, str(tmp_path / str(count)), str(count)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        used.append(float(done.stdout))
    assert used[1] - used[0] < 40
