"""Products of attention: mmdet's in float, rounded where marked; the logarithmic quantizer by a reference."""

import copy
import math

import pytest
import torch
from torch import nn

from common.config.schema import QuantizationConfig
from common.detection.attention import AttentionMatmuls
from common.detection.detector import build_detector
from common.distillation.optimizer import parameter_groups
from common.quantization import (
    bits_label,
    calibrate,
    check_average_bits,
    load_quantized,
    plan_layers,
    quantize,
    save_quantized,
)
from common.quantization.layers import rounded_attention_inputs
from common.quantization.quantizers import lsq
from common.quantization.quantizers.logarithmic import Quantizer, logarithmic_range
from common.quantization.ranges import Range, asymmetric_weight_range
from common.runtime.errors import UserError
from tools.shapes.train_vit import micro
from vit.models import Attention

from mmdet.models.backbones.swin import WindowMSA  # isort: skip  (after vit.models)

BASES = (2.0, math.sqrt(2.0))


def started(base, step, bits):
    quantizer = Quantizer(base).double()
    quantizer.start(Range(torch.tensor([step], dtype=torch.float64), 0, 2**bits - 1, torch.zeros(1)))
    return quantizer


def nearest_power(x, step, base, bits):
    """One value: the code nearest in the logarithm of all there are; the last code is zero."""
    powers = [step * base**-i for i in range(2**bits - 1)]
    if x < powers[-1] / math.sqrt(base):
        return 0.0
    return min(powers, key=lambda p: abs(math.log(p) - math.log(x)))


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_value_becomes_the_power_nearest_in_its_logarithm_or_zero(base, bits):
    x = torch.rand(3, 500, generator=torch.Generator().manual_seed(bits), dtype=torch.float64) ** 6
    found = started(base, 0.7, bits)(x)
    wanted = [nearest_power(value, 0.7, base, bits) for value in x.flatten().tolist()]
    torch.testing.assert_close(found.flatten(), torch.tensor(wanted, dtype=torch.float64), rtol=1e-12, atol=0)
    assert len(found.detach().round(decimals=9).unique()) <= 2**bits


@pytest.mark.parametrize("base", BASES)
def test_its_gradients_are_those_of_a_rounding_passed_straight_through(base):
    x = (torch.rand(2, 300, generator=torch.Generator().manual_seed(0), dtype=torch.float64) ** 4).requires_grad_()
    sign = torch.randn(2, 300, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    quantizer = started(base, 0.5, 3)
    (quantizer(x) * sign).sum().backward()
    leaf, step = x.detach().clone().requires_grad_(), torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    code = -torch.log(leaf / step) / math.log(base)
    straight = code + (code.round() - code).detach()  # a rounding whose gradient is 1
    y = torch.where(code.round() < 0, step, torch.where(code.round() >= 7, 0.0, step * base**-straight))
    (y * sign).sum().backward()
    torch.testing.assert_close(x.grad, leaf.grad, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(quantizer.scale.grad[0], step.grad / math.sqrt(300 * 7), rtol=1e-9, atol=1e-12)
    assert step.grad != 0


def test_probabilities_of_zero_stay_zero_and_have_no_gradient():
    x = torch.tensor([[0.0, 0.3, 1.0]], dtype=torch.float64, requires_grad=True)
    y = started(2.0, 1.0, 4)(x)
    y.sum().backward()
    assert y.tolist() == [[0.0, 0.25, 1.0]]
    assert x.grad[0, 0] == 0
    assert torch.isfinite(x.grad).all()


def test_the_range_found_is_the_best_of_many():
    sample = torch.randn(4000, generator=torch.Generator().manual_seed(0)).softmax(0) * 40
    found = logarithmic_range(sample, 3, 2.0)
    quantizer = Quantizer(2.0)

    def error(step):
        quantizer.start(Range(torch.tensor([step]), 0, 7, torch.zeros(1)))
        return float((quantizer(sample[None]) - sample).square().sum().detach())

    others = [error(float(sample.max()) * 2 ** (-i / 100)) for i in range(150)]
    assert error(found.scale.item()) <= 1.02 * min(others)
    assert (found.low, found.high) == (0, 7)


@pytest.mark.parametrize("masked", [False, True])
def test_attention_is_that_of_mmdet(masked):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = WindowMSA(24, 3, (7, 7)).eval()
        theirs.init_weights()
        x = torch.randn(8, 49, 24)
        mask = torch.where(torch.rand(4, 49, 49) < 0.3, -100.0, 0.0) if masked else None
    ours = copy.deepcopy(theirs)
    ours.__class__, ours.matmuls = Attention, AttentionMatmuls()
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    torch.testing.assert_close(ours(x, mask), theirs(x, mask), rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def detector():
    found = build_detector("vit", micro(3))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        found.state = found.build().state_dict()
    return found


@pytest.fixture(scope="module", autouse=True)
def searched_once():
    """The weights are the same in every test and so are their ranges, which take most of a calibration to find."""
    ranges = {}

    def found(weight, *arguments):
        key = weight.detach().numpy().tobytes(), weight.shape, arguments
        if key not in ranges:
            ranges[key] = asymmetric_weight_range(weight, *arguments)
        return ranges[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lsq, "asymmetric_weight_range", found)
        yield


def calibrated(detector, bits=4, **settings):
    config = QuantizationConfig(weight_bits=4, activation_bits=bits, rounding="nearest", **settings)
    teacher = detector.build()
    plan = plan_layers(detector, teacher, config)
    student = quantize(teacher, plan, config)
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    return config, plan, student, calibrate(detector, teacher, student, plan, [images], config)


@pytest.mark.parametrize(
    ("levels", "bits", "of_attention", "of_the_others"),
    [
        ("minifloat", 4, "minifloat", "minifloat"),
        ("minifloat", 8, "unsigned", "asymmetric"),
        ("uniform", 4, "logarithmic", "asymmetric"),
        ("uniform", 5, "unsigned", "asymmetric"),
    ],
)
def test_every_attention_input_is_rounded_to_its_bits_and_reported(detector, levels, bits, of_attention, of_the_others):
    config, plan, student, report = calibrated(detector, bits, activation_levels=levels)
    named = f", {levels} activations" * (of_attention == levels)
    named = ", logarithmic attention" if of_attention == "logarithmic" else named
    assert bits_label(config.model_dump(), report.layers) == f"W4A{bits}{named}"
    inputs = rounded_attention_inputs(student)
    assert len(inputs) == 4 * 8  # blocks
    assert list(inputs) == [entry.name for entry in plan if entry.role == "attention_input"]
    seen = {}
    for name, part in inputs.items():
        part.register_forward_hook(lambda _m, _x, y, name=name: seen.update({name: len(y.unique())}))
    detector.head_output(student, torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(1)))
    assert seen.keys() == inputs.keys()
    assert all(1 < count <= 2**bits for count in seen.values())
    rows = {row["name"]: row for row in report.layers if row["role"] == "attention_input"}
    assert rows.keys() == inputs.keys()
    for name, row in rows.items():
        assert (row["weight_bits"], row["activation_bits"]) == (32, bits)
        assert (of_attention if name.endswith(".attention") else of_the_others) in row["activation_range"]
        assert 0 < row["output_error"] < 1


def test_the_published_preset_leaves_them_in_float(detector):
    config = QuantizationConfig(preset="paper")
    teacher = detector.build()
    assert not rounded_attention_inputs(quantize(teacher, plan_layers(detector, teacher, config), config))


@pytest.mark.parametrize("kind", ["log2", "log_sqrt2"])
def test_a_checkpoint_with_logarithmic_attention_loads_as_it_was(detector, kind, tmp_path):
    config, plan, student, report = calibrated(detector, softmax_quantizer=kind)
    kinds = {row["activation_range"] for row in report.layers if row["name"].endswith(".attention")}
    assert kinds == {"logarithmic"}
    save_quantized(tmp_path, student, plan, "vit", detector.architecture, config)
    loaded = load_quantized(tmp_path)[1]
    images = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    ours, theirs = (detector.head_output(m, images).terms["anchors"].values for m in (loaded, student))
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("quantizer", ["lsq", "lsq+"])
def test_a_rounded_swin_stays_near_its_original_with_both_quantizers(detector, quantizer):
    """All is calibrated; W4A8 gives the finest features with less than 5 % of squared error."""
    _, _, student, report = calibrated(detector, 8, quantizer=quantizer)
    assert all(0 < row["output_error"] < 1 for row in report.layers if row["activation_bits"] == 8)
    assert all(m.initialised for m in student.modules() if hasattr(m, "initialised"))
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        theirs, ours = (m.extract_feat(images * 4 - 2)[0] for m in (detector.build(), student))
    assert (ours - theirs).square().mean() < 0.05 * theirs.square().mean()


@pytest.mark.parametrize("quantizer", ["lsq", "lsq+"])
def test_headroom_widens_ranges_but_not_that_of_attention(detector, quantizer):
    narrow, wide = (calibrated(detector, 4, quantizer=quantizer, range_headroom=m)[3].layers for m in (1.0, 1.5))
    factors = {"attention": [], "others": []}
    for before, after in zip(narrow, wide, strict=True):
        if "activation_scale" in before:
            kind = "attention" if after["activation_range"] == "logarithmic" else "others"
            factors[kind].append(after["activation_scale"] / before["activation_scale"])
            assert after["activation_range"] == before["activation_range"]
    assert set(factors["attention"]) == {1.0}
    assert 1.1 < sum(factors["others"]) / len(factors["others"]) < 1.6


def test_their_scales_train_with_the_other_scales(detector):
    _, _, student, _ = calibrated(detector, softmax_quantizer="log_sqrt2")
    scales = parameter_groups(student)["scales"]
    assert {f"{name}.input_quantizer.scale" for name in rounded_attention_inputs(student)} <= scales.keys()


def test_average_bits_count_layers_alone_since_attention_inputs_have_no_weights(detector):
    module = detector.build()
    plan = plan_layers(detector, module, QuantizationConfig(weight_bits=4, activation_bits=4))
    check_average_bits(plan, module, 4.0, [8])
    with pytest.raises(UserError, match=r"average_bits: 3.9 bits, but the layers have 4.00 on average"):
        check_average_bits(plan, module, 3.9, [8])


@pytest.mark.parametrize("settings", [{"activation_range": "symmetric"}, {"scale_init": "lsq"}])
def test_attention_inputs_take_the_ranges_that_layers_take(detector, settings):
    _, plan, _, report = calibrated(detector, quantizer="lsq", **settings)
    rows = {row["name"]: row for row in report.layers}
    queries = [entry.name for entry in plan if entry.name.endswith(".query")]
    assert {rows[name]["activation_range"] for name in queries} == {"symmetric"}


def test_attention_inputs_that_are_not_calibrated_are_not_saved(detector, tmp_path):
    config, plan, student, _ = calibrated(detector)
    next(iter(rounded_attention_inputs(student).values())).input_quantizer.initialised = False
    with pytest.raises(ValueError, match=r"matmuls\.query: not calibrated"):
        save_quantized(tmp_path, student, plan, "vit", detector.architecture, config)


def test_a_bias_of_several_windows_goes_to_each_image_in_turn():
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 6, 2, 5, 4, generator=generator).unbind()
    bias = torch.randn(3, 2, 5, 5, generator=generator)
    found = AttentionMatmuls()(q, k, v, bias)
    for window in range(6):
        wanted = nn.functional.scaled_dot_product_attention(q[window], k[window], v[window], bias[window % 3], scale=1)
        torch.testing.assert_close(found[window], wanted, rtol=1e-5, atol=1e-6)
