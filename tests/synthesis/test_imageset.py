"""Finished sets: damage is noticed and mended, and a set as large as COCO's needs little memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from toy.adapter import ToyDetector

from common.config.schema import SynthesisConfig
from common.detection.coco_json import read_coco
from common.runtime.errors import UserError
from common.synthesis import ImageSet, stage, synthesize
from common.synthesis.imageset import IMAGES, ImageRecord, encoded, image_name, write_image, write_set

CPU = torch.device("cpu")


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


BOOKKEEPING = """
import resource, sys
from pathlib import Path
import torch
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
