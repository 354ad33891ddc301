"""Image sets: what is made, what is stored, and what happens after an interruption."""

import contextlib
import io
import json

import cv2
import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from toy.adapter import ToyDetector

from common.config.schema import SynthesisConfig
from common.detection.types import Targets
from common.runtime.errors import UserError
from common.synthesis import ImageSet, batch, synthesize
from common.synthesis.optimize import _BestImages
from common.synthesis.pixels import Augmentation, augment_images, augment_targets, sample_augmentation, smooth_noise

CPU = torch.device("cpu")
SMALL = {
    "num_images": 5,
    "batch_size": 2,
    "image_size": 64,
    "low_resolution_size": 32,
    "iterations": 4,
    "low_resolution_iterations": 6,
    "label_sampling": {"every": 2, "confidence": 0.4},
}


def make(directory, detector=None, seed=0, sha256="hash", **changes):
    config = SynthesisConfig(**SMALL | {"directory": directory} | changes)
    return synthesize(detector or ToyDetector(), config, seed=seed, device=CPU, weights_sha256=sha256)


def content(folder):
    """Every file of a set that has to be reproducible, without the times."""
    files = {f.name: f.read_bytes() for f in sorted(folder.glob("images/*.png"))}
    description = json.loads((folder / "set.json").read_text())
    kept = {name: description[name] for name in ("history", "labels_from", "snapshots")}
    return files | {"annotations": (folder / "annotations.json").read_text(), "description": kept}


class SeesImages(ToyDetector):
    """The toy detector with the running statistics of random images, so that its detections depend on the image."""

    def build(self):
        module = super().build().train()
        for block in module.blocks:
            block.bn.momentum = None  # cumulative: the statistics of this one batch
            block.bn.reset_running_stats()
        with torch.no_grad():
            module(smooth_noise(16, 64, torch.Generator().manual_seed(5)))
        return module.eval()


@pytest.mark.parametrize(("image", "rate"), [("pyramid", 0.02), ("pixels", 0.1)])
@pytest.mark.parametrize("loss", ["normalized", "paper"])
@pytest.mark.parametrize("term", ["task", "batch_norm", "first_batch_norm", "total_variation"])
def test_optimisation_brings_each_term_down(tmp_path, image, rate, loss, term):
    weights = dict.fromkeys(("task", "batch_norm", "first_batch_norm", "total_variation"), 0.0) | {term: 1.0}
    changes = {"image": image, "loss": loss, "learning_rate": rate, "low_resolution_iterations": 0, "iterations": 40}
    folder = make(tmp_path, SeesImages(), num_images=2, jitter=0, flip=False, weights=weights, **changes)
    history = ImageSet(folder).description["history"]
    assert history[-1][term] < 0.9 * history[0][term]


def test_statistics_alone_come_down_without_labels_and_report_detections(tmp_path):
    folder = make(tmp_path, source="batch_norm", iterations=60, low_resolution_iterations=0, learning_rate=0.02)
    history = ImageSet(folder).description["history"]
    assert history[-1]["batch_norm"] < 0.95 * history[0]["batch_norm"]
    distance, noise = (ImageSet(f).description["statistics_distance"] for f in (folder, make(tmp_path, source="noise")))
    assert sum(distance.values()) < sum(noise.values())
    assert history[-1]["task"] == 0
    assert ImageSet(folder).description["labels_from"].startswith("detections")


def test_a_resumed_set_equals_one_that_was_never_stopped(tmp_path, monkeypatch):
    whole = make(tmp_path / "whole")
    original, made = batch.write_batch, []

    def interrupted(job, number, *rest):
        if number == 1:
            raise KeyboardInterrupt
        made.append(number)
        original(job, number, *rest)

    monkeypatch.setattr(batch, "write_batch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "stopped")
    folder = tmp_path / "stopped" / whole.name
    assert made == [0]
    assert len(list(folder.glob("images/*.png"))) == 2
    with pytest.raises(UserError, match="run synthesize"):
        ImageSet(folder)
    monkeypatch.setattr(batch, "write_batch", original)
    assert make(tmp_path / "stopped") == folder
    assert content(folder) == content(whole)


@pytest.mark.parametrize("low", [32, SMALL["image_size"]])
def test_a_complete_set_is_found_and_nothing_is_made(tmp_path, monkeypatch, low):
    folder = make(tmp_path, low_resolution_size=low)
    monkeypatch.setattr(ToyDetector, "build", lambda self: pytest.fail("the detector was built"))
    assert make(tmp_path, low_resolution_size=low) == folder


def test_a_batch_depends_on_the_seed_and_its_number_only(tmp_path):
    five, two = make(tmp_path), make(tmp_path, num_images=2)
    assert five != two
    for name in ("000000.png", "000001.png"):
        assert (five / "images" / name).read_bytes() == (two / "images" / name).read_bytes()
    assert (five / "images" / "000000.png").read_bytes() != (five / "images" / "000002.png").read_bytes()
    other = make(tmp_path, seed=1)
    assert (five / "images" / "000000.png").read_bytes() != (other / "images" / "000000.png").read_bytes()


def name(tmp_path, monkeypatch, **changes):
    with monkeypatch.context() as patched:
        patched.setattr("common.synthesis.stage.write_batches", lambda *_: None)
        patched.setattr("common.synthesis.stage._finish", lambda *_: None)
        return make(changes.pop("directory", tmp_path), **changes).name


def test_the_name_depends_on_what_matters_and_on_nothing_else(tmp_path, monkeypatch):
    def named(**changes):
        return name(tmp_path, monkeypatch, **changes)

    base = named()
    assert named(directory=tmp_path / "other") == base
    assert named(real_images=tmp_path) == base
    assert named(annotations=tmp_path / "none.json") == base
    different = [{"seed": 1}, {"sha256": "other"}, {"num_images": 6}, {"iterations": 5}, {"labels": "one_box"}]
    different += [{"source": "noise"}, {"source": "batch_norm"}, {"detector": ToyDetector(("a", "b"))}]
    names = [named(**d) for d in different]
    assert len({base, *names}) == len(names) + 1
    noise = named(source="noise")
    assert named(source="noise", iterations=9, learning_rate=1.0, loss="paper") == noise
    assert named(source="noise", labels="one_box") != noise
    statistics = named(source="batch_norm")
    assert named(source="batch_norm", labels="one_box") == statistics
    assert named(source="batch_norm", weights={"task": 7.0}) == named(source="batch_norm", weights={})
    assert named(source="batch_norm", weights={"batch_norm": 7.0}) != statistics


def test_labels_updated_at_low_resolution_are_saved_with_their_images(tmp_path):
    edited = ImageSet(make(tmp_path))
    drawn = ImageSet(make(tmp_path, label_sampling={"every": 100, "start": 0.5}))
    counts = [[len(s.targets(i).labels) for i in range(5)] for s in (edited, drawn)]
    assert counts[1] == [4] * 5
    assert counts[0] != counts[1]
    boxes = torch.cat([edited.targets(i).boxes for i in range(5)])
    assert boxes.max() > 32  # scaled up to the full size
    assert boxes.max() <= 64


def test_a_set_is_readable_by_other_tools(tmp_path):
    folder = make(tmp_path)
    images = ImageSet(folder)
    assert len(images) == 5
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(folder / "annotations.json")
    assert [c["name"] for c in coco.loadCats([1, 2])] == ["circle", "square"]
    for i, info in enumerate(coco.loadImgs(sorted(coco.getImgIds()))):
        rgb = cv2.cvtColor(cv2.imread(str(folder / "images" / info["file_name"])), cv2.COLOR_BGR2RGB)
        assert np.array_equal(images.image(i).permute(1, 2, 0).numpy(), rgb)
        rows = coco.loadAnns(coco.getAnnIds(info["id"]))
        target = images.targets(i)
        assert target.labels.tolist() == [r["category_id"] - 1 for r in rows]
        corners = [[x, y, x + w, y + h] for x, y, w, h in (r["bbox"] for r in rows)]
        assert torch.allclose(target.boxes, torch.tensor(corners))


def test_batches_follow_the_conventions(tmp_path):
    images = ImageSet(make(tmp_path))
    batch, targets = images.batch([4, 1], CPU)
    assert batch.shape == (2, 3, 64, 64)
    assert batch.dtype == torch.float32
    assert batch.min() >= 0
    assert batch.max() <= 1
    assert torch.equal((batch[1] * 255).round().byte(), images.image(1))
    assert targets[1].labels.dtype == torch.int64
    assert targets[1].boxes.shape == (len(targets[1].labels), 4)


def test_no_weight_of_the_detector_gets_a_gradient(tmp_path, monkeypatch):
    seen = []
    original = ToyDetector.head_output

    def watched(self, module, images, targets=None, proposals=None):
        seen.append(any(p.requires_grad or p.grad is not None for p in module.parameters()))
        return original(self, module, images, targets, proposals)

    monkeypatch.setattr(ToyDetector, "head_output", watched)
    make(tmp_path, num_images=1)
    assert seen
    assert not any(seen)


def test_noise_keeps_the_sampled_labels(tmp_path):
    images = ImageSet(make(tmp_path, source="noise"))
    assert images.description["labels_from"] == "sampled at random"
    assert [len(images.targets(i).labels) for i in range(5)] == [4] * 5
    assert images.image(0).float().mean() == pytest.approx(127.5, abs=3)
    assert images.description["data_read"] == []


def write_images(folder):
    folder.mkdir()
    for i, shape in enumerate([(20, 40, 3), (40, 20, 3)]):
        cv2.imwrite(str(folder / f"{i}.png"), np.full(shape, 200, np.uint8))
    return folder


def test_real_images_are_letterboxed_and_recorded(tmp_path):
    folder = write_images(tmp_path / "real")
    images = ImageSet(make(tmp_path / "set", source="real", real_images=folder, num_images=2))
    assert images.description["data_read"] == [str(folder)]
    rows = json.loads((images.directory / "annotations.json").read_text())["images"]
    assert [row["source"] for row in rows] == ["0.png", "1.png"]
    wide, tall = images.image(0)[0], images.image(1)[0]
    assert (wide[:16] == 114).all()
    assert (wide[16:48] == 200).all()
    assert (wide[48:] == 114).all()
    assert torch.equal(wide.T, tall)


def test_images_that_are_not_clipped_keep_their_values_to_16_bits(tmp_path):
    settings = {"image": "pixels", "noise": "normal", "iterations": 1, "low_resolution_iterations": 0, "num_images": 2}
    settings |= {"learning_rate": 1e-6, "batch_size": 2}
    open_, clipped = (ImageSet(make(tmp_path, clip=clip, **settings)) for clip in (False, True))
    assert open_.directory != clipped.directory
    batch, _ = open_.batch([0, 1], torch.device("cpu"))
    assert batch.min() < -3
    assert batch.max() > 3
    assert float(batch.std()) == pytest.approx(1, abs=0.03)
    assert not torch.equal(batch.mul(1000).round(), batch.mul(1000))  # not multiples of a coarse step
    cut, _ = clipped.batch([0, 1], torch.device("cpu"))
    torch.testing.assert_close(batch.clamp(0, 1), cut, rtol=0, atol=1 / 510 + 1e-4)
    assert torch.equal(open_.image(0), (batch[0].clamp(0, 1) * 255).round().to(torch.uint8))
    picture = cv2.imread(str(open_.directory / "images/000000.png"), cv2.IMREAD_UNCHANGED)
    assert picture.dtype == np.uint16
    assert open_.description["statistics_distance"]["deviation"] > 0


def test_real_images_are_read_from_where_they_are_and_found_again_where_they_went(tmp_path):
    folder = write_images(tmp_path / "real")
    settings = {"source": "real", "num_images": 2}
    made = make(tmp_path / "set", real_images=folder, **settings)
    assert not (made / "images").exists()
    batch, _ = ImageSet(made).batch([0, 1], torch.device("cpu"))
    moved = folder.rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"0\.png: the image set is damaged \(No such file"):
        ImageSet(made).image(0)
    assert make(tmp_path / "set", real_images=moved, **settings) == made
    again, _ = ImageSet(made).batch([0, 1], torch.device("cpu"))
    assert torch.equal(batch, again)
    (moved / "1.png").write_bytes((moved / "0.png").read_bytes())
    with pytest.raises(UserError, match=r"1\.png: another file than the one of this set"):
        ImageSet(made).image(1)


def test_bad_real_images_are_a_users_error(tmp_path):
    with pytest.raises(UserError, match="not a folder"):
        make(tmp_path, source="real", real_images=tmp_path / "none")
    folder = write_images(tmp_path / "real")
    with pytest.raises(UserError, match="has 2 images"):
        make(tmp_path, source="real", real_images=folder)
    pixels = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    jpeg = bytearray(cv2.imencode(".jpg", pixels)[1].tobytes())
    jpeg[700:1000] = bytes(300)  # decoded all the same, with pixels that libjpeg made up
    for content, complaint in ((b"\x89PNG broken", ""), (b"", ""), (jpeg, r" \(Corrupt JPEG data: .*\)")):
        (folder / "0.png").write_bytes(content)
        with pytest.raises(UserError, match=rf"0\.png: not a readable image{complaint}; replace"):
            make(tmp_path, source="real", real_images=folder, num_images=2)


def test_true_labels_are_used_and_recorded(tmp_path):
    path = tmp_path / "labels.json"
    annotation = {"image_id": 0, "category_id": 1, "bbox": [0, 0, 50, 50]}
    categories = [{"id": 1, "name": "square"}]
    images = [{"id": 0, "width": 100, "height": 100}]
    path.write_text(json.dumps({"images": images, "categories": categories, "annotations": [annotation]}))
    made = ImageSet(make(tmp_path, labels="true_label", annotations=path, low_resolution_iterations=0))
    assert made.targets(4).boxes.tolist() == [[0, 0, 32, 32]]
    assert made.targets(4).labels.tolist() == [1]
    assert made.description["data_read"] == [str(path)]


def test_sizes_must_fit_the_detector(tmp_path):
    with pytest.raises(UserError, match=r"synthesis\.image_size: 50 .* multiples of 8"):
        make(tmp_path, image_size=50)


def test_a_loss_that_becomes_nan_stops_with_advice(tmp_path, monkeypatch):
    original = ToyDetector.head_output

    def broken(self, module, images, targets=None, proposals=None):
        return original(self, module, images * float("nan"), targets, proposals)

    monkeypatch.setattr(ToyDetector, "head_output", broken)
    with pytest.raises(UserError, match="learning rate"):
        make(tmp_path)
    assert not list(tmp_path.glob("*/set.json"))


def test_each_image_is_taken_where_its_own_loss_was_lowest():
    zero, one, two = (torch.full((3, 1, 1, 1), float(v)) for v in range(3))
    best = _BestImages(zero)
    best.offer(one, torch.tensor([5.0, 1.0, 3.0]))
    best.offer(two, torch.tensor([4.0, 2.0, 3.0]))
    assert best.images.flatten().tolist() == [2, 1, 2]
    best.reset()
    best.offer(zero, torch.tensor([9.0, 9.0, 9.0]))
    assert best.images.flatten().tolist() == [0, 0, 0]


def test_labels_follow_a_flipped_and_shifted_image():
    images = torch.zeros(1, 3, 40, 40)
    images[:, :, 10:20, 4:12] = 1
    target = Targets(torch.tensor([[4.0, 10.0, 12.0, 20.0], [0.0, 0.0, 2.0, 40.0]]), torch.tensor([1, 0]))
    augmentation = Augmentation(flip=True, shift_x=3, shift_y=-3)
    augmented, (labels,) = augment_images(images, augmentation), augment_targets([target], augmentation, 40)
    rows, columns = augmented[0, 0].nonzero(as_tuple=True)
    assert labels.boxes.tolist() == [[columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]]
    assert labels.labels.tolist() == [1]  # the other one left the image


def test_erasing_blackens_a_patch_of_about_every_second_image():
    generator = torch.Generator().manual_seed(0)
    augmentation = sample_augmentation(400, 50, flip=False, jitter=0, erase=True, generator=generator)
    assert (augmentation.flip, augmentation.shift_x, augmentation.shift_y) == (False, 0, 0)
    erased = (augment_images(torch.ones(400, 1, 50, 50), augmentation) == 0).float().mean((1, 2, 3))
    assert 0.4 < (erased > 0).float().mean() < 0.6
    assert erased[erased > 0].min() > 0.015
    assert erased.max() < 0.22


def test_shifts_cover_their_range_evenly():
    generator = torch.Generator().manual_seed(0)
    draws = [sample_augmentation(1, 50, flip=True, jitter=2, erase=False, generator=generator) for _ in range(2000)]
    for axis in ("shift_x", "shift_y"):
        counts = torch.tensor([getattr(d, axis) for d in draws]).add(2).bincount(minlength=5)
        assert len(counts) == 5
        assert counts.min() > 330
    assert 900 < sum(d.flip for d in draws) < 1100


def annotate(path, names):
    """The two real images; a box on the second one, the detector's class 1, in another order than the files."""
    categories = [{"id": 7, "name": "square"}]
    images = [
        {"id": i, "file_name": f"part/{n}", "width": 20 * (2 - i), "height": 20 * (1 + i)} for i, n in names.items()
    ]
    annotation = {"image_id": 1, "category_id": 7, "bbox": [0, 0, 20, 20]}
    content = {"images": images[::-1], "categories": categories, "annotations": [annotation]}
    path.write_text(json.dumps(content))
    return path


def test_real_images_count_by_content_and_with_the_confidence_of_their_labels(tmp_path):
    folder = write_images(tmp_path / "real")
    settings = {"source": "real", "real_images": folder, "num_images": 2}
    names = [make(tmp_path / "set", **settings).name]
    names.append(make(tmp_path / "set", **settings, label_sampling={"confidence": 0.5}).name)
    before = (folder / "1.png").read_bytes()
    (folder / "1.png").write_bytes(before[:-1] + b"?")  # of the same size; what follows the last checksum is not read
    names.append(make(tmp_path / "set", **settings).name)
    assert len(set(names)) == 3
    (folder / "1.png").write_bytes(before)
    assert make(tmp_path / "set", **settings).name == names[0]


def test_real_images_come_with_their_own_labels(tmp_path):
    settings = {
        "source": "real",
        "real_images": write_images(tmp_path / "real"),
        "num_images": 2,
        "labels": "true_label",
    }
    path = annotate(tmp_path / "labels.json", {0: "0.png", 1: "1.png"})
    made = ImageSet(make(tmp_path / "set", annotations=path, **settings))
    assert [len(made.targets(i).labels) for i in range(2)] == [0, 1]
    assert made.targets(1).boxes.tolist() == [[16, 0, 48, 32]]  # 20 x 40 pixels, twice as large in the middle of 64
    assert made.targets(1).labels.tolist() == [1]
    assert made.description["labels_from"] == "the annotations"
    assert str(path) in made.description["data_read"]
    unlabelled = make(tmp_path / "set", **settings | {"labels": "mosaic"})
    assert unlabelled != made.directory
    with pytest.raises(UserError, match=r"has no entry for 1\.png"):
        make(tmp_path / "set", annotations=annotate(tmp_path / "other.json", {0: "0.png", 1: "2.png"}), **settings)
