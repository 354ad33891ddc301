"""Pictures of detections: the quantized detector's own boxes, at their place, and mistakes in one line."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from toy.experiment import write_experiment

from common.cli import main
from common.config.load import load_config
from common.config.schema import EvaluationConfig
from common.detection.types import Detections
from common.pipeline import stages as pipeline
from common.quantization import load_quantized
from common.reporting.pictures import draw_detections, hue
from common.reporting.predict import detect, predict
from common.runtime.errors import UserError
from common.runtime.image_files import read_image

NAMES = ("circle", "square")
NOTHING = Detections(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return pipeline.train(load_config(write_experiment(tmp_path_factory.mktemp("toy")), ["training.epochs=0"]))


class Fixed:
    """Sees one box and its mask, at a place of the image it is shown."""

    stride = 32

    def __init__(self, share):
        self.share, self.shown = share, None  # x1, y1, x2, y2 as shares of the shown image

    def detect(self, module, images, confidence, iou, max_detections):
        self.shown = images
        height, width = images.shape[2:]
        x1, y1, x2, y2 = (round(s * side) for s, side in zip(self.share, (width, height) * 2, strict=True))
        mask = torch.zeros(1, 28, 28)
        mask[0, :, 14:] = 0.9  # the right half of the box
        box = torch.tensor([[x1, y1, x2, y2]], dtype=torch.float32)
        return [Detections(box, torch.tensor([0.9]), torch.tensor([1]), mask)]


def test_boxes_and_masks_come_back_to_the_pixels_of_the_image():
    image = torch.zeros(3, 100, 400, dtype=torch.uint8)
    detector = Fixed((0.25, 0.5, 0.5, 1.0))  # of a square of 64 by 64, in which the image is 64 by 16 from row 24 on
    config = EvaluationConfig(image_size=64, rectangular=False)
    found = detect(detector, None, image, config, 0.25, torch.device("cpu"))
    assert detector.shown.shape == (1, 3, 64, 64)
    assert found.boxes[0].tolist() == [100, 50, 200, 100]
    assert found.masks.shape == (1, 100, 400)
    assert found.masks.dtype == torch.bool
    ys, xs = found.masks[0].nonzero(as_tuple=True)
    assert [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1] == pytest.approx([150, 50, 200, 100], abs=4)


def test_a_detector_that_is_measured_by_the_shorter_side_sees_its_images_in_that_size():
    image = torch.zeros(3, 100, 150, dtype=torch.uint8)
    detector = Fixed((0.25, 0.5, 0.5, 1.0))
    config = EvaluationConfig(resize="shorter_side", image_size=200)
    found = detect(detector, None, image, config, 0.25, torch.device("cpu"))
    assert detector.shown.shape == (1, 3, 200, 300)
    assert found.boxes[0].tolist() == [37.5, 50, 75, 100]


def test_a_box_is_drawn_along_its_border_and_a_mask_tints_its_inside():
    image = torch.full((3, 120, 160), 100, dtype=torch.uint8)
    mask = torch.zeros(1, 120, 160, dtype=torch.bool)
    mask[0, 60:80, 60:80] = True
    boxes = torch.tensor([[40.0, 50.0, 120.0, 100.0]])
    drawn = draw_detections(image, Detections(boxes, torch.tensor([0.5]), torch.tensor([1]), mask), NAMES)
    assert drawn.shape == image.shape
    changed = (drawn != image).any(0)
    assert changed[75:95, 40].all()  # left border
    assert changed[100, 40:121].all()  # lower border
    assert changed[60:80, 60:80].all()
    assert not changed[85:95, 50:110].any()
    assert not changed[:, :35].any()
    assert (image == 100).all()


def test_nothing_found_leaves_the_image_as_it_is():
    image = torch.randint(0, 255, (3, 40, 60), dtype=torch.uint8)
    assert torch.equal(draw_detections(image, NOTHING, NAMES), image)


def test_neighbouring_classes_have_different_colours():
    assert len({hue(label) for label in range(80)}) == 80
    assert all(abs(hue(i) - hue(i + 1)) > 90 for i in range(79))


def test_the_pictures_show_what_the_quantized_detector_of_the_run_finds(run, tmp_path, capsys):
    images = run.parent / "images"
    assert main(["predict", str(run), str(images), "--out", str(tmp_path / "out"), "--confidence", "0.4"]) == 0
    written = capsys.readouterr().out.split()
    assert [path.rpartition("/")[2] for path in written] == ["1.png", "2.png", "3.png", "4.png"]
    detector, module = load_quantized(run / "quantized")
    config = load_config(run / "config.yaml").evaluation
    assert config.image_size == 64
    different = 0
    for i, path in enumerate(written, 1):
        image = read_image(images / f"{i}.png")
        found = detect(detector, module, image, config, 0.4, torch.device("cpu"))
        different += len(found.boxes) > 0
        expected = draw_detections(image, found, detector.class_names).permute(1, 2, 0).numpy()
        assert np.array_equal(np.array(Image.open(path)), expected)
    assert different  # else the pictures show nothing


def test_an_image_that_cannot_be_read_is_one_line_before_any_is_drawn(run, tmp_path, capsys):
    copy = shutil.copytree(run.parent / "images", tmp_path / "copy")
    (copy / "last.png").write_bytes((copy / "1.png").read_bytes()[:-20])
    assert main(["predict", str(run), str(copy), "--out", str(tmp_path / "out")]) == 2
    assert "last.png" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_float_checkpoint_is_drawn_with_its_family(run, tmp_path):
    weights = run.parent / "toy.txt"
    written = predict(weights, [run.parent / "images/1.png"], tmp_path / "out", family="toy", confidence=0.1)
    assert Image.open(written[0]).size == (64, 48)


def test_the_settings_are_those_of_the_run_however_it_is_named_and_of_nobody_else(run, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr("common.reporting.predict.detect", lambda *given: seen.append(given[3].image_size) or NOTHING)
    images = [run.parent / "images/1.png"]
    (tmp_path / "link").symlink_to(run / "quantized")
    for weights in (run, tmp_path / "link", tmp_path / "link/model.safetensors"):
        predict(weights, images, tmp_path / "out")
    monkeypatch.chdir(run / "quantized")
    predict(Path("model.safetensors"), images, tmp_path / "out")
    assert seen == [64] * 4
    (tmp_path / "project/weights").mkdir(parents=True)
    weights = Path(shutil.copy(run.parent / "toy.txt", tmp_path / "project/weights"))
    (tmp_path / "project/config.yaml").write_text("lr0: 0.01")  # another tool's
    predict(weights, images, tmp_path / "out", family="toy")
    assert seen[4:] == [640]


def test_a_folder_that_links_to_itself_is_one_line(run, tmp_path):
    (tmp_path / "out").symlink_to("out")
    with pytest.raises(UserError, match=r"out/1.png: cannot be written"):
        predict(run, [run.parent / "images/1.png"], tmp_path / "out")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{run}", "nothing.jpg"], "nothing.jpg: does not exist"),
        (["{run}", "{run}"], "no image in this folder"),
        (["{run}", "{run}/config.yaml"], "not a readable image"),
        (["{run}/missing", "{images}"], "unknown detector|does not exist"),
        (["{run}", "{images}", "{copy}"], "found both"),
        (["{run}", "{images}", "--out", "{images}"], "one of the images; give another folder"),
        (["{run}", "{copy}/photo.jpg", "--out", "{copy}"], "photo.jpg, one of the images; give another folder"),
        (["{run}", "{images}", "--device", "cuda:99"], "device: found 'cuda:99', but torch"),
        (["{run}", "{images}", "--device", "tpu"], "allowed are auto, cpu, cuda and cuda:N"),
        (["{run}/training", "{images}"], "without a finished quantized checkpoint"),
    ],
)
def test_mistakes_are_one_line(run, tmp_path, capsys, arguments, message):
    copy = shutil.copytree(run.parent / "images", tmp_path / "copy")
    (copy / "1.png").rename(copy / "photo.jpg")
    shutil.copy(copy / "2.png", copy / "photo.png")  # the user's own
    (run / "training").mkdir(exist_ok=True)
    places = {"run": run, "images": run.parent / "images", "copy": copy}
    out = [] if "--out" in arguments else ["--out", str(tmp_path / "out")]
    assert main(["predict", *(a.format(**places) for a in arguments), *out]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert any(part in errors[0] for part in message.split("|"))
