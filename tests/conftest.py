"""What tests of several files start from: a quantized toy, a set, a finished run; a file that must not appear."""

import shutil

import pytest
import torch
from toy.adapter import ToyDetector
from toy.experiment import write_experiment

from common.config.load import load_config
from common.config.schema import QuantizationConfig
from common.pipeline import stages as pipeline
from common.quantization import calibrate, plan_layers, quantize
from common.reporting import figures
from common.synthesis.imageset import IMAGES, ImageRecord, ImageSet, image_name, write_image, write_set

SIZE, COUNT = 32, 8


@pytest.fixture
def student():
    """A toy at 4 bits, calibrated, to be trained."""
    detector = ToyDetector()
    teacher = detector.build()
    config = QuantizationConfig(weight_bits=4, activation_bits=4)
    plan = plan_layers(detector, teacher, config)
    module = quantize(teacher, plan, config)
    batch = torch.rand(4, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    calibrate(detector, teacher, module, plan, [batch], config)
    return module


@pytest.fixture
def images(tmp_path):
    """A small finished set to train it on."""
    folder = tmp_path / "set"
    generator = torch.Generator().manual_seed(2)
    records = []
    for i in range(COUNT):
        pixels = torch.randint(0, 256, (3, SIZE, SIZE), dtype=torch.uint8, generator=generator)
        _, digest = write_image(folder / IMAGES / image_name(i), pixels)
        records.append(ImageRecord(digest, SIZE, SIZE, [[4.0, 4.0, 24.0, 20.0]], [i % 2]))
    write_set(folder, records, ToyDetector().class_names, dict)
    return ImageSet(folder)


@pytest.fixture(scope="module")
def toy_run(tmp_path_factory):
    """A finished run of the toy."""
    return pipeline.run(load_config(write_experiment(tmp_path_factory.mktemp("toy"))))


@pytest.fixture
def run(toy_run, tmp_path):
    """A copy of it, to be changed."""
    return shutil.copytree(toy_run, tmp_path / "run")


@pytest.fixture
def undrawn(monkeypatch):
    """Charts are built but not drawn, for tests that look at other things."""
    monkeypatch.setattr(figures, "image", lambda figure: "data:image/svg+xml;base64,")


@pytest.fixture
def marker(tmp_path):
    """What hostile files would leave behind."""
    return tmp_path / "ran"


@pytest.fixture
def write(tmp_path):
    def to_file(text, name="experiment.yaml"):
        (tmp_path / name).write_text(text)
        return tmp_path / name

    return to_file
