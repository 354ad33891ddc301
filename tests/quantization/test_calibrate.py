"""Which layers get how many bits, what a quantized layer computes, and what calibration sets and reports."""

import copy
import json

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from toy.adapter import ToyDetector

from common.config.schema import QuantizationConfig
from common.quantization import LayerPlan, calibrate, plan_layers, quantize
from common.quantization.hooks import relative_errors
from common.quantization.layers import QuantConv2d, QuantLinear, output_axis, quantized_layer, quantized_layers
from common.quantization.ranges import Range
from common.runtime.errors import UserError

EVERYTHING = {"float_roles": ()}
EXCEPTION = {"weight_bits": 6, "activation_bits": 32}


def planned(**settings):
    detector = ToyDetector()
    return plan_layers(detector, detector.build(), QuantizationConfig(**settings))


def bits(plan):
    return [(entry.weight_bits, entry.activation_bits) for entry in plan]


def images(count=2, size=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(size, 3, 32, 32, generator=generator) for _ in range(count)]


def calibrated(batches=None, **settings):
    """Teacher, student, plan and report of a toy."""
    detector = ToyDetector()
    teacher, config = detector.build(), QuantizationConfig(**settings)
    plan = plan_layers(detector, teacher, config)
    student = quantize(teacher, plan, config)
    return teacher, student, plan, calibrate(detector, teacher, student, plan, batches or images(), config)


@torch.no_grad()
def seen(module, name, batches):
    """Input and output of a layer on each batch."""
    found = []
    handle = module.get_submodule(name).register_forward_hook(lambda _, x, y: found.append((x[0], y)))
    for batch in batches:
        module(batch)
    handle.remove()
    return found


# ----- policy


def test_roles_decide_first_and_output_stay_in_float():
    plan = planned(weight_bits=4, activation_bits=6)
    assert [entry.name for entry in plan] == ["blocks.0.conv", "blocks.1.conv", "blocks.2.conv", "output"]
    assert [entry.role for entry in plan] == ["first", "early", "body", "output"]
    assert bits(plan) == [(32, 32), (4, 6), (4, 6), (32, 32)]
    assert plan[0].reason == "first: sees the image; in float_roles"
    assert plan[1].reason == "early: largest maps"


def test_eight_bit_roles_get_eight_bits_unless_they_are_float():
    plan = planned(weight_bits=4, activation_bits=4, eight_bit_roles=("early", "first"))
    assert bits(plan) == [(32, 32), (8, 8), (4, 4), (32, 32)]
    assert plan[1].reason.endswith("in eight_bit_roles")


def test_patterns_come_before_roles_and_the_last_one_that_matches_counts():
    layers = {"blocks.*": {"weight_bits": 5, "activation_bits": 7}, "*.1.conv": EXCEPTION}
    plan = planned(weight_bits=4, activation_bits=4, eight_bit_roles=("body",), layers=layers)
    assert bits(plan) == [(5, 7), (6, 32), (5, 7), (32, 32)]
    assert plan[0].reason == "first: sees the image; matches 'blocks.*' of layers"
    assert "'*.1.conv'" in plan[1].reason
    reverse = dict(reversed(layers.items()))
    assert bits(planned(weight_bits=4, activation_bits=4, layers=reverse))[1] == (5, 7)


@pytest.mark.parametrize("pattern", ["blocks.9.*", "Blocks.*", "conv", ""])
def test_a_pattern_without_a_layer_is_an_error_that_shows_a_name(pattern):
    with pytest.raises(UserError, match=r"quantization\.layers: no layer matches .*blocks\.2\.conv") as caught:
        planned(layers={"blocks.1.*": EXCEPTION, pattern: EXCEPTION})
    assert repr(pattern) in str(caught.value)


# ----- what a quantized module computes


class Varied(nn.Module):
    """Convolutions of every kind that detectors have, and a linear layer on [B, n, d]."""

    def __init__(self):
        super().__init__()
        self.plain = nn.Conv2d(3, 12, 3, stride=2, padding=1)
        self.deep = nn.Sequential(nn.Conv2d(12, 12, 3, padding=1, groups=12, bias=False), nn.SiLU())
        self.grouped = nn.Conv2d(12, 8, (3, 1), groups=4, padding=(2, 0), dilation=(2, 1))
        self.norm = nn.BatchNorm2d(8)
        self.linear = nn.Linear(8, 5)
        self.untouched = nn.Linear(5, 5)

    def forward(self, x):
        x = self.norm(self.grouped(self.deep(self.plain(x))))
        return self.untouched(self.linear(x.flatten(2).transpose(1, 2)))


VARIED = [LayerPlan(name, "body", 4, 4, "") for name in ("plain", "deep.0", "grouped", "linear")]


def varied():
    torch.manual_seed(0)
    return Varied().eval(), torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "settings", [{}, {"quantizer": "lsq"}, {"quantizer": "lsq+"}, {"weight_granularity": "tensor"}]
)
def test_an_uncalibrated_student_has_the_same_names_and_computes_the_same(settings):
    teacher, x = varied()
    student = quantize(teacher, VARIED, QuantizationConfig(**settings))
    assert torch.equal(student(x), teacher(x))
    assert not set(dict(teacher.named_modules())) - set(dict(student.named_modules()))
    assert not set(teacher.state_dict()) - set(student.state_dict())
    extra = set(dict(student.named_modules())) - set(dict(teacher.named_modules()))
    assert extra == {f"{entry.name}.{side}_quantizer" for entry in VARIED for side in ("weight", "input")}
    assert list(quantized_layers(student)) == [entry.name for entry in VARIED]
    assert isinstance(student.linear, QuantLinear)
    assert isinstance(student.deep[0], QuantConv2d)
    assert type(student.untouched) is nn.Linear
    assert not any(module.training for module in student.modules())


def test_a_student_shares_nothing_with_its_teacher():
    teacher, x = varied()
    before = teacher(x)
    student = quantize(teacher, VARIED, QuantizationConfig())
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(1)
    assert torch.equal(teacher(x), before)
    assert type(teacher.plain) is nn.Conv2d


def test_sides_with_32_bits_have_no_quantizer():
    teacher, _ = varied()
    plan = [LayerPlan("plain", "body", 4, 32, ""), LayerPlan("linear", "body", 32, 8, "")]
    student = quantize(teacher, [*plan, LayerPlan("grouped", "body", 32, 32, "")], QuantizationConfig())
    assert student.plain.input_quantizer is None
    assert student.linear.weight_quantizer is None
    assert set(quantized_layers(student)) == {"plain", "linear"}
    assert type(student.grouped) is nn.Conv2d


def test_only_convolutions_and_linear_layers_can_be_planned():
    for layer in (nn.Conv1d(3, 3, 2), nn.ConvTranspose2d(4, 4, 2, groups=2)):
        with pytest.raises(TypeError, match=f"cannot quantize a {type(layer).__name__}; only Conv2d, Linear and"):
            quantized_layer(layer, None, None)


def integers(x, step, offset, low, high):
    """Codes of n bits as float64 without a fraction, so that sums of their products are exact."""
    codes = np.clip(np.rint(x.double().numpy() / step.double().numpy()) + offset, low, high)
    assert np.array_equal(codes, codes.astype(np.int64))
    return torch.tensor(codes)


@pytest.mark.parametrize("granularity", ["channel", "tensor"])
@pytest.mark.parametrize("input_codes", [(0, 15, 0), (0, 15, 5), (-8, 7, 0), (0, 255, 17)])
@pytest.mark.parametrize("name", ["plain", "deep.0", "grouped", "linear"])
def test_a_quantized_layer_is_integer_arithmetic_times_the_steps(name, input_codes, granularity):
    teacher, _ = varied()
    layer = quantize(teacher, VARIED, QuantizationConfig(weight_granularity=granularity)).get_submodule(name)
    generator = torch.Generator().manual_seed(1)
    shape = (2, 6, 8) if name == "linear" else (2, layer.in_channels, 9, 9)
    x = torch.randn(shape, generator=generator)
    low, high, zero = input_codes
    step_x = torch.tensor([0.11])
    step_w = layer.weight.detach().abs().amax() * (torch.rand(layer.weight_quantizer.scale.shape) + 0.5) / 7
    layer.input_quantizer.start(Range(step_x, low, high, -zero * step_x))
    layer.weight_quantizer.start(Range(step_w, -8, 7, torch.zeros(1)))
    codes_x = integers(x, step_x, zero, low, high) - zero
    codes_w = integers(layer.weight.detach(), step_w, 0, -8, 7)
    if name == "linear":
        product = codes_x @ codes_w.T
        scale = step_w.double().reshape(-1)
    else:
        product = F.conv2d(codes_x, codes_w, None, layer.stride, layer.padding, layer.dilation, layer.groups)
        scale = step_w.double().reshape(-1, 1, 1)
    assert torch.equal(product, product.round())
    wanted = product * scale * step_x.double()
    if layer.bias is not None:
        wanted = wanted + layer.bias.detach().double().reshape(-1 if name == "linear" else (-1, 1, 1))
    assert codes_x.unique().numel() > 5
    assert torch.allclose(layer(x).double(), wanted, rtol=1e-5, atol=1e-5)


def test_gradients_reach_weights_biases_and_steps():
    teacher, student, _, _ = calibrated(weight_bits=4, activation_bits=4, **EVERYTHING)
    student(images()[0]).square().sum().backward()
    for name, layer in quantized_layers(student).items():
        for parameter in (layer.weight, layer.weight_quantizer.scale, layer.input_quantizer.scale):
            assert parameter.grad.abs().sum() > 0, name
    assert all(parameter.grad is None for parameter in teacher.parameters())


# ----- calibration


@pytest.mark.parametrize(
    "levels",
    [{}, {"quantizer": "lsq+"}, {"weight_levels": "codebook"}, {"activation_levels": "minifloat"}],
    ids=["lsq", "lsq+", "codebook", "minifloat"],
)
def test_the_report_has_a_row_for_every_layer_whose_numbers_are_what_was_measured(levels):
    batches = images(3)
    settings = {"weight_bits": 4, "activation_bits": 5, "float_roles": ("output",), **levels}
    teacher, student, plan, report = calibrated(batches, layers={"blocks.2.*": EXCEPTION}, **settings)
    rows = json.loads(json.dumps(report.layers))
    assert [row["name"] for row in rows] == [entry.name for entry in plan]
    for row, entry in zip(rows, plan, strict=True):
        assert (row["weight_bits"], row["activation_bits"]) == (entry.weight_bits, entry.activation_bits)
        assert (row["role"], row["reason"]) == (entry.role, entry.reason)
        assert row["weights"] == teacher.get_submodule(entry.name).weight.numel()
    assert set(rows[3]) == {"name", "role", "weight_bits", "activation_bits", "reason", "weights"}
    kinds = [row.get("activation_range") for row in rows[:2]]
    # Images have no negative values, SiLU has.
    if "activation_levels" in levels:
        assert all(kind.startswith("minifloat of ") for kind in kinds)
    else:
        assert kinds == ["unsigned", "asymmetric"]
    assert "activation_range" not in rows[2]
    for row in rows[:3]:
        layer, original = (m.get_submodule(row["name"]) for m in (student, teacher))
        weight = original.weight.detach().double()
        difference = layer.weight_quantizer(layer.weight).detach().double() - weight
        assert row["weight_error"] == pytest.approx(
            (difference.square().sum() / weight.square().sum()).item(), rel=1e-4
        )
        assert row["weight_scale"] == pytest.approx(layer.weight_quantizer.scale.mean().item())
        pairs = zip(seen(student, row["name"], batches[:1]), seen(teacher, row["name"], batches[:1]), strict=True)
        errors = [((s[1] - t[1]).double().square().sum(), t[1].double().square().sum()) for s, t in pairs]
        wanted = sum(e for e, _ in errors) / sum(p for _, p in errors)
        assert row["output_error"] == pytest.approx(wanted.item(), rel=1e-4)
        assert 0 < row["output_error"] < 0.5


def test_a_layer_whose_weights_are_all_0_has_no_error():
    detector, config = ToyDetector(), QuantizationConfig(weight_bits=4, activation_bits=4)
    teacher = detector.build()
    teacher.blocks[1].conv.weight.detach().zero_()
    plan = plan_layers(detector, teacher, config)
    report = calibrate(detector, teacher, quantize(teacher, plan, config), plan, images(), config)
    json.dumps(report.layers, allow_nan=False)
    assert next(row for row in report.layers if row["name"] == "blocks.1.conv")["weight_error"] == 0


def test_an_output_that_is_overwritten_in_place_is_compared_as_the_layer_gave_it():
    """As torchvision's RPN does, whose convolution runs at several levels besides."""
    torch.manual_seed(0)
    layer = nn.Conv2d(3, 4, 3)
    teacher = nn.Sequential(layer, nn.ReLU(inplace=True))
    student = copy.deepcopy(teacher)
    levels = images(2, size=1)[0], images(2, size=3)[1]

    def run(module):
        return [module(level) for level in levels]

    assert relative_errors(teacher, student, ["0"], [run]) == {"0": 0.0}
    with torch.no_grad():
        student[0].weight.mul_(1.1)
        student[0].bias.mul_(1.1)
    assert relative_errors(teacher, student, ["0"], [run])["0"] == pytest.approx(0.01, rel=1e-4)


def test_every_quantizer_is_started_with_the_bits_of_its_layer():
    exception = {"output": {"weight_bits": 7, "activation_bits": 6}}
    _, student, plan, _ = calibrated(
        weight_bits=3, activation_bits=5, float_roles=(), layers=exception, quantizer="lsq"
    )
    for entry in plan:
        layer = student.get_submodule(entry.name)
        for quantizer, n in (
            (layer.weight_quantizer, entry.weight_bits),
            (layer.input_quantizer, entry.activation_bits),
        ):
            assert quantizer.initialised
            assert quantizer.high - quantizer.low == 2**n - 1
            assert (quantizer.scale > 0).all()
        assert layer.weight_quantizer.scale.shape == (len(layer.weight), 1, 1, 1)
        assert layer.weight_quantizer.low == -(2 ** (entry.weight_bits - 1))
        assert layer.input_quantizer(torch.zeros(1, 1)).item() == 0


def test_more_bits_are_closer_to_the_teacher():
    batches, errors = images(), []
    for n in (2, 4, 6, 8):
        teacher, student, _, _ = calibrated(batches, weight_bits=n, activation_bits=n, **EVERYTHING)
        with torch.no_grad():
            wanted = teacher(batches[0])
            errors.append(((student(batches[0]) - wanted).square().sum() / wanted.square().sum()).item())
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-3 < errors[0]


@pytest.mark.parametrize(
    "settings", [{}, {"quantizer": "lsq"}, {"quantizer": "lsq+"}, {"preset": "paper", "float_roles": ()}]
)
def test_calibration_is_deterministic_and_leaves_the_teacher_as_it_was(settings):
    before = ToyDetector().build().state_dict()
    random = torch.get_rng_state()
    (teacher, first, _, report), (_, second, _, again) = (
        calibrated(weight_bits=4, activation_bits=4, **settings) for _ in range(2)
    )
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for x in (teacher, first) for m in x.modules())
    assert not teacher.training
    state = second.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in first.state_dict().items())
    assert report == again


def test_the_paper_preset_is_per_tensor_signed_and_from_the_first_batch():
    batches = images(2, size=8)
    settings = {"preset": "paper", "weight_bits": 4, "activation_bits": 6, "float_roles": ("output",)}
    teacher, student, plan, report = calibrated(batches, **settings)
    other = calibrated([batches[0], batches[1] * 20], **settings)[1].state_dict()
    assert all(torch.equal(value, other[key]) for key, value in student.state_dict().items())
    for entry in plan[:3]:
        layer, original = (m.get_submodule(entry.name) for m in (student, teacher))
        assert torch.equal(layer.weight, original.weight)  # nearest: nothing was moved
        weights, inputs = layer.weight_quantizer, layer.input_quantizer
        assert (weights.low, weights.high, weights.scale.shape) == (-8, 7, (1,))
        assert (inputs.low, inputs.high, inputs.scale.shape) == (-32, 31, (1,))
        wanted = 2 * original.weight.double().abs().mean() / np.sqrt(7)
        assert weights.scale.item() == pytest.approx(wanted.item(), rel=1e-5)
        ((x, _),) = seen(teacher, entry.name, batches[:1])
        wanted = 2 * x.double().abs().mean() / np.sqrt(31)
        assert inputs.scale.item() == pytest.approx(wanted.item(), rel=0.02)  # a sample of the input
    assert {row.get("activation_range") for row in report.layers} == {"symmetric", None}
    for name, value in teacher.state_dict().items():
        assert ".bn." not in name or torch.equal(student.state_dict()[name], value)  # BatchNorm is not corrected


def test_the_paper_preset_keeps_first_late_head_and_output_in_float():
    assert QuantizationConfig(preset="paper").float_roles == ("first", "late", "head", "output", "attention_input")
    assert bits(planned(preset="paper", weight_bits=4, activation_bits=4)) == [(32, 32), (4, 4), (4, 4), (32, 32)]


def test_gptq_and_its_refinement_move_weights_and_nearest_does_not():
    for rounding in ("coordinate_descent", "gptq", "nearest"):
        teacher, student, _, _ = calibrated(weight_bits=3, activation_bits=8, rounding=rounding, **EVERYTHING)
        for name, layer in quantized_layers(student).items():
            weight, quantizer = layer.weight.detach(), layer.weight_quantizer
            assert torch.equal(weight, teacher.get_submodule(name).weight) == (rounding == "nearest")
            if rounding != "nearest":
                rows = (weight / quantizer.scale).transpose(0, output_axis(layer)).flatten(1)
                levels = quantizer.levels().expand(len(rows), -1)
                assert ((rows > levels[:, :1] - 0.5) & (rows < levels[:, -1:] + 0.5)).all()


def test_batch_norm_correction_can_be_left_out():
    for correct in (True, False):
        teacher, student, _, _ = calibrated(weight_bits=3, activation_bits=3, batch_norm_correction=correct)
        same = torch.equal(student.blocks[1].bn.running_var, teacher.blocks[1].bn.running_var)
        assert same == (not correct)
        assert torch.equal(student.blocks[1].bn.weight, teacher.blocks[1].bn.weight)


def test_the_students_copy_of_unplanned_parts_is_not_touched():
    teacher, student, _, _ = calibrated(weight_bits=4, activation_bits=4)
    for name in ("blocks.0.conv.weight", "output.weight", "output.bias"):
        assert torch.equal(student.state_dict()[name], copy.deepcopy(teacher.state_dict()[name]))


def test_the_published_start_keeps_negative_inputs():
    _, student, _, report = calibrated(images(1), scale_init="lsq", float_roles=("output",))
    rows = {row["name"]: row for row in report.layers}
    assert rows["blocks.1.conv"]["activation_range"] == "symmetric"
    assert student.get_submodule("blocks.1.conv").input_quantizer.low < 0
