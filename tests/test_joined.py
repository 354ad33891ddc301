"""An input that joins several maps: each map has its own range, and what is computed is a sum of integer layers."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from toy.adapter import ToyDetector

from common.config import QuantizationConfig, TrainingConfig
from common.detector import load_detector
from common.distillation.optimizer import Optimizer, parameter_groups
from common.quantization import calibrate, load_quantized, plan_layers, plan_maps, quantize, save_quantized
from common.quantization.joined import Joined, map_quantizers
from common.quantization.policy import LayerPlan
from common.quantization.ranges import activation_range
from common.reporting.contents import step_changes

SHAPES = Path(__file__).parents[1] / "tools/shapes"
GENERATOR = torch.Generator().manual_seed(0)
IMAGES = torch.rand(8, 3, 16, 16, generator=GENERATOR)


class Joining(nn.Module):
    """Concatenations of unlike maps before layers that pad, do not pad, run twice, or see them from the side."""

    def __init__(self):
        super().__init__()
        self.small, self.large = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 6, 1)
        self.join, self.padded = nn.Conv2d(10, 5, 1), nn.Conv2d(10, 5, 3, padding=1)
        self.shared, self.rows, self.single = nn.Conv2d(10, 5, 1), nn.Conv2d(5, 2, 1), nn.Conv2d(5, 2, 1)
        with torch.no_grad():
            self.large.weight.mul_(30)
            self.large.bias.fill_(50)

    def forward(self, x):
        small, large = F.silu(self.small(x)), F.silu(self.large(x))
        both = torch.cat([small, large], 1)
        shared = self.shared(both) + self.shared(torch.cat((large, small), dim=-3))
        rows = self.rows(torch.cat([shared, shared], 2)) + self.single(torch.cat([shared], 1)).repeat(1, 1, 2, 1)
        return torch.cat([self.join(both), self.padded(both)], 1), rows


def plan(bits=4):
    names = ("join", "padded", "shared", "rows", "single")
    return [LayerPlan("small", "first", 32, 32, ""), *(LayerPlan(name, "body", bits, bits, "") for name in names)]


class Adapter:
    """As much of a detector as calibration needs."""

    def head_output(self, module, images, targets=None, proposals=None):
        return SimpleNamespace(maps=module(images), proposals=None)

    def statistics_layers(self, module):
        return []


def prepared(bits=4, **settings):
    """Teacher, calibrated student, its plan."""
    torch.manual_seed(0)
    teacher, config = Joining().eval(), QuantizationConfig(**settings)
    full = plan_maps(teacher, plan(bits), lambda module: module(IMAGES[:1]))
    if config.activation_granularity == "tensor":
        full = plan(bits)
    student = quantize(teacher, full, config)
    calibrate(Adapter(), teacher, student, full, [IMAGES[:4], IMAGES[4:]], config)
    return teacher, student, full


@torch.no_grad()
def maps_of(teacher):
    """The small map and the large one."""
    return F.silu(teacher.small(IMAGES)), F.silu(teacher.large(IMAGES))


def test_maps_are_those_of_a_concatenation_of_channels_that_a_layer_always_sees():
    found = {entry.name: entry.maps for entry in plan_maps(Joining(), plan(), lambda module: module(IMAGES[:1]))}
    assert found == {"small": (), "join": (4, 6), "padded": (4, 6), "shared": (), "rows": (), "single": ()}


@pytest.mark.parametrize("family", ["yolo11", "yolov5"])
def test_concatenations_of_yolo_are_found(family):
    detector = load_detector(family, SHAPES / f"micro_{family}.safetensors")
    teacher = detector.build()
    layers = plan_layers(detector, teacher, QuantizationConfig())
    image = torch.rand(1, 3, 64, 64)
    found = plan_maps(teacher, layers, lambda module: detector.head_output(module, image))
    maps = {entry.name: entry.maps for entry in found}
    pooled = maps["model.9.cv2.conv"]
    assert len(pooled) == 4
    assert len(set(pooled)) == 1
    for name, channels in maps.items():
        assert not channels or sum(channels) == teacher.get_submodule(name).in_channels
    assert sum(map(bool, maps.values())) >= 10


@pytest.mark.parametrize("quantizer", ["lsq", "lsq+"])
@torch.no_grad()
def test_each_map_has_the_range_that_it_would_have_alone(quantizer):
    teacher, student, _ = prepared(quantizer=quantizer)
    small, large = maps_of(teacher)
    for part, own in zip(map_quantizers(student.join.input_quantizer), (small, large), strict=True):
        alone = activation_range(own.flatten(), 4, "affine", "mse", quantizer == "lsq", with_zero=False)
        assert part.step.item() == pytest.approx(alone.step.item(), rel=0.1)


@torch.no_grad()
def test_the_layer_is_the_sum_of_an_integer_layer_for_each_map():
    teacher, student, _ = prepared()
    layer: nn.Module = student.join
    parts = maps_of(teacher)
    codes = (layer.weight / layer.weight_quantizer.step).round().clamp(-8, 7).long().split([4, 6], 1)
    total = torch.zeros(8, 5, 16, 16, dtype=torch.float64)
    for q, x, w in zip(layer.input_quantizer.maps, parts, codes, strict=True):
        integers = (x / q.step).round().long().clamp(q.low, q.high)
        assert q.high - q.low == 15
        summed = torch.einsum("oi,bihw->bohw", w[:, :, 0, 0], integers)
        assert summed.dtype == torch.int64
        total += summed.double() * q.step.double() * layer.weight_quantizer.step.double().view(-1, 1, 1)
    total += layer.bias.double().view(-1, 1, 1)
    torch.testing.assert_close(layer(torch.cat(parts, 1)).double(), total, rtol=1e-5, atol=1e-4)


def test_zero_keeps_a_code_where_the_layer_pads_with_it_and_only_there():
    _, student, _ = prepared()
    free, padded = (map_quantizers(layer.input_quantizer)[1] for layer in (student.join, student.padded))
    assert free.low > 0  # all values of the large map are far above zero
    assert padded.low == 0
    assert free.step.item() < padded.step.item()


@torch.no_grad()
def test_maps_of_unlike_ranges_are_rounded_better_than_with_one_step():
    errors = {}
    for granularity in ("map", "tensor"):
        teacher, student, _ = prepared(activation_granularity=granularity)
        small, large = maps_of(teacher)
        x = torch.cat([small, large], 1)
        errors[granularity] = (
            (student.join.input_quantizer(x) - x)[:, :4].square().mean() / small.square().mean()
        ).item()
    assert errors["map"] < 0.02
    assert errors["tensor"] > 0.5


def test_one_step_for_all_is_what_was_asked_for():
    _, student, _ = prepared(activation_granularity="tensor")
    assert not any(isinstance(part, Joined) for part in student.modules())
    assert QuantizationConfig(preset="paper").activation_granularity == "tensor"


@pytest.mark.parametrize("quantizer", ["lsq", "lsq+"])
def test_the_steps_of_maps_train_as_steps_with_the_gradient_of_each_map_alone(quantizer):
    teacher, student, _ = prepared(quantizer=quantizer)
    steps = parameter_groups(student)["steps"]
    assert {"join.input_quantizer.maps.0.step", "join.input_quantizer.maps.1.step"} <= set(steps)
    joined = student.join.input_quantizer
    x = torch.cat(maps_of(teacher), 1)
    joined(x).square().sum().backward()
    for part, own in zip(joined.maps, x.split([4, 6], 1), strict=True):
        together, part.step.grad = part.step.grad, None
        part(own).square().sum().backward()
        torch.testing.assert_close(part.step.grad, together)
    before = [part.step.item() for part in joined.maps]
    Optimizer(student, TrainingConfig(step_learning_rate=1e-2)).update(0, 1)
    assert all(part.step.item() != old for part, old in zip(joined.maps, before, strict=True))


def test_a_report_shows_the_steps_of_all_maps_of_a_layer():
    _, student, _ = prepared()
    before = student.state_dict()
    after = {name: value * 2 if name.endswith(".step") else value for name, value in before.items()}
    found = {(change.layer, change.side): change for change in step_changes(["join", "rows"], before, after)}
    assert set(found) == {(layer, side) for layer in ("join", "rows") for side in ("weight", "input")}
    steps = [part.step.item() for part in student.join.input_quantizer.maps]
    assert found["join", "input"].before.tolist() == steps
    assert found["join", "input"].after.tolist() == [2 * step for step in steps]
    assert len(found["rows", "input"].before) == 1


def test_a_checkpoint_comes_back_with_its_maps_and_one_without_them_loads(tmp_path):
    detector = ToyDetector()
    teacher, config = detector.build(), QuantizationConfig()
    width = teacher.get_submodule("blocks.1.conv").in_channels
    layers = plan_layers(detector, teacher, config)
    layers[1] = LayerPlan(layers[1].name, "early", 4, 4, "", maps=(1, width - 1))
    student = quantize(teacher, layers, config)
    images = torch.rand(4, 3, 32, 32, generator=GENERATOR)
    calibrate(detector, teacher, student, layers, [images], config)
    save_quantized(tmp_path / "q", student, layers, "toy", detector.architecture, config)
    loaded = load_quantized(tmp_path / "q")[1]
    with torch.no_grad():
        assert torch.equal(loaded(images), student(images))
    assert len(loaded.get_submodule("blocks.1.conv").input_quantizer.maps) == 2
    plain = plan_layers(detector, teacher, config)
    student = quantize(teacher, plain, config)
    calibrate(detector, teacher, student, plain, [images], config)
    save_quantized(tmp_path / "old", student, plain, "toy", detector.architecture, config)
    file = tmp_path / "old" / "quantization.json"
    description = json.loads(file.read_text())
    for entry in description["layers"]:
        del entry["maps"]
    del description["quantization"]["activation_granularity"]
    file.write_text(json.dumps(description))
    with torch.no_grad():
        assert torch.equal(load_quantized(tmp_path / "old")[1](images), student(images))
