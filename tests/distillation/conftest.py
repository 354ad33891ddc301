"""A calibrated 4-bit toy and a small finished set to train it on."""

import pytest
import torch
from toy.adapter import ToyDetector

from common.config.schema import QuantizationConfig
from common.quantization import calibrate, plan_layers, quantize
from common.synthesis.imageset import IMAGES, ImageRecord, ImageSet, image_name, write_image, write_set

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
    records = []
    for i in range(COUNT):
        pixels = torch.randint(0, 256, (3, SIZE, SIZE), dtype=torch.uint8, generator=generator)
        _, digest = write_image(folder / IMAGES / image_name(i), pixels)
        records.append(ImageRecord(digest, SIZE, SIZE, [[4.0, 4.0, 24.0, 20.0]], [i % 2]))
    write_set(folder, records, ToyDetector().class_names, dict)
    return ImageSet(folder)
