"""A calibrated 4-bit toy and a small finished set to train it on."""

import json

import pytest
import torch
from toy.adapter import ToyDetector

from common.config.schema import QuantizationConfig
from common.detection.types import Targets
from common.quantization import calibrate, plan_layers, quantize
from common.synthesis.imageset import IMAGES, ImageSet, coco, image_name, write_image

SIZE, COUNT = 32, 8


@pytest.fixture
def student():
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
    folder = tmp_path / "set"
    generator = torch.Generator().manual_seed(2)
    targets = [Targets(torch.tensor([[4.0, 4.0, 24.0, 20.0]]), torch.tensor([i % 2])) for i in range(COUNT)]
    for i in range(COUNT):
        pixels = torch.randint(0, 256, (3, SIZE, SIZE), dtype=torch.uint8, generator=generator)
        write_image(folder / IMAGES / image_name(i), pixels)
    content = coco(targets, [(SIZE, SIZE)] * COUNT, ToyDetector().class_names)
    (folder / "annotations.json").write_text(json.dumps(content))
    (folder / "set.json").write_text("{}")
    return ImageSet(folder)
