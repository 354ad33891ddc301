"""Second-order rounding against the plain algorithm in float64, and the inputs it works on."""

import copy
import importlib
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from toy.adapter import ToyDetector

from common.config.schema import QuantizationConfig
from common.quantization import gptq, quantize
from common.quantization.calibrate import round_weight
from common.quantization.gptq import DAMPING, _patches, _places, compensate, input_hessians
from common.quantization.hooks import feeds
from common.quantization.layers import quantized_layers
from common.quantization.policy import LayerPlan, plan_layers
from common.quantization.ranges import activation_range, weight_range

calibration = importlib.import_module("common.quantization.calibrate")  # the package has a function of that name
DOUBLE = torch.float64


def codes_of(found):
    return torch.arange(found.low, found.high + 1).to(found.scale)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def correlated(groups, size, rows=400, seed=0):
    """Inputs [groups, rows, size] of which each is mostly a mixture of few, and X^T X / n."""
    causes = torch.randn(groups, rows, max(2, size // 4), generator=seeded(seed), dtype=DOUBLE)
    mixture = torch.randn(groups, causes.shape[2], size, generator=seeded(seed + 1), dtype=DOUBLE)
    x = causes @ mixture + 0.3 * torch.randn(groups, rows, size, generator=seeded(seed + 2), dtype=DOUBLE) + 0.5
    return x, x.transpose(1, 2) @ x / rows


def rounded(weight, found):
    return (weight / found.scale).round().clamp(found.low, found.high) * found.scale


def output_error(x, weight, changed):
    """Squared error of the layer's outputs for the inputs x [groups, n, d]."""
    difference = (changed - weight).reshape(x.shape[0], -1, x.shape[2])
    return (x @ difference.transpose(1, 2)).square().sum().item()


def plain_gptq(weight, step, low, high, product):
    """Optimal brain quantization of one group's rows [out, d]: inverse, eliminate, one column after the other."""
    w, count = weight.clone(), weight.shape[1]
    damped = product + DAMPING * product.diagonal().mean() * torch.eye(count, dtype=DOUBLE)
    inverse = torch.linalg.inv(damped)
    for i in product.diagonal().argsort(descending=True).tolist():
        code = (w[:, i] / step[:, 0]).round().clamp(low, high)
        w -= ((w[:, i] - code * step[:, 0]) / inverse[i, i])[:, None] * inverse[i]
        w[:, i] = code * step[:, 0]
        inverse = inverse - torch.outer(inverse[:, i], inverse[i]) / inverse[i, i]  # without this column
    return w


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize(("groups", "size"), [(1, 27), (1, 200), (3, 18), (8, 9)])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_codes_are_those_of_the_plain_algorithm(bits, groups, size, per_channel):
    _, product = correlated(groups, size)
    weight = torch.randn(groups * 4, size, generator=seeded(), dtype=DOUBLE)
    found = weight_range(weight, bits, per_channel, "mse")  # cuts off the largest weights
    moved = compensate(weight, found.scale, codes_of(found), product)
    assert moved.shape == weight.shape
    wanted = [
        plain_gptq(w, s, found.low, found.high, p)
        for w, s, p in zip(weight.split(4), found.scale.expand(len(weight), 1).split(4), product, strict=True)
    ]
    assert torch.allclose(rounded(moved, found), torch.cat(wanted), atol=1e-9)
    ratio = moved / found.scale
    assert ratio.min() > found.low - 0.5
    assert ratio.max() < found.high + 0.5
    # What was cut off is made up for as well, not only what was rounded.
    assert bits > 3 or (weight / found.scale).max() > found.high + 0.5


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("bits", range(2, 9))
def test_outputs_are_closer_than_with_nearest_rounding_on_correlated_inputs(bits, per_channel):
    x, product = correlated(1, 72)
    fresh, _ = correlated(1, 72, rows=4000)  # other inputs from the same source
    weight = torch.randn(16, 8, 3, 3, generator=seeded(), dtype=DOUBLE)
    found = weight_range(weight, bits, per_channel, "mse")
    moved = compensate(weight, found.scale, codes_of(found), product)
    for inputs in (x, fresh):
        nearest = output_error(inputs, weight, rounded(weight, found))
        assert output_error(inputs, weight, rounded(moved, found)) < 0.5 * nearest


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_inputs_without_correlation_leave_nothing_to_compensate(bits):
    product = torch.rand(2, 150, generator=seeded()).diag_embed()
    weight = torch.randn(6, 150, generator=seeded())
    found = weight_range(weight, bits, True, "mse")
    moved = compensate(weight, found.scale, codes_of(found), product)
    assert torch.equal(rounded(moved, found), rounded(weight, found))
    inside = (weight / found.scale > found.low) & (weight / found.scale < found.high)
    assert torch.equal(moved[inside], weight[inside])


def test_inputs_that_are_always_zero_are_rounded_to_the_nearest():
    _, product = correlated(1, 20)
    product[:, 5] = product[:, :, 5] = 0
    weight = torch.randn(4, 20, generator=seeded(), dtype=DOUBLE)
    found = weight_range(weight, 4, True, "mse")
    moved = compensate(weight, found.scale, codes_of(found), product)
    assert torch.allclose(rounded(moved, found)[:, 5], rounded(weight, found)[:, 5])
    zero = compensate(weight, found.scale, codes_of(found), torch.zeros_like(product))
    assert torch.allclose(rounded(zero, found), rounded(weight, found))


def test_float32_is_as_good_as_float64():
    x, product = correlated(1, 300, rows=2000)
    weight = torch.randn(8, 300, generator=seeded(), dtype=DOUBLE)
    found = weight_range(weight, 4, True, "mse")
    exact = compensate(weight, found.scale, codes_of(found), product)
    single = compensate(weight.float(), found.scale.float(), codes_of(found).float(), product.float()).double()
    wanted = output_error(x, weight, rounded(exact, found))
    assert output_error(x, weight, rounded(single, found)) == pytest.approx(wanted, rel=0.05)


CONVOLUTIONS = {
    "plain": {"kernel_size": 3},
    "pointwise": {"kernel_size": 1},
    "padded": {"kernel_size": 3, "padding": 1},
    "same": {"kernel_size": 5, "padding": "same"},
    "strided": {"kernel_size": 3, "padding": 1, "stride": 2},
    "dilated": {"kernel_size": 3, "padding": 2, "dilation": 2},
    "uneven": {"kernel_size": (1, 5), "padding": (0, 2), "stride": (2, 1), "dilation": (1, 2)},
    "grouped": {"kernel_size": 3, "padding": 1, "groups": 3},
    "depthwise": {"kernel_size": 3, "padding": 1, "stride": 2, "groups": 6},
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_a_patch_times_the_weights_is_an_output_of_the_convolution(name):
    layer = nn.Conv2d(6, 12, bias=False, **CONVOLUTIONS[name]).double()
    x = torch.randn(2, 6, 11, 14, generator=seeded(), dtype=DOUBLE)
    rows = _patches(layer, x, _places(layer, x, 60, seeded(3)))  # [groups, n, d]
    assert rows.shape == (layer.groups, 60, layer.weight[0].numel())
    weight = layer.weight.detach().reshape(layer.groups, -1, rows.shape[2])
    got = (rows @ weight.transpose(1, 2)).permute(1, 0, 2).reshape(2, 30, 12)  # [image, place, channel]
    wanted = layer(x).detach().flatten(2).transpose(1, 2)
    for image in range(2):
        distance = (got[image][:, None] - wanted[image]).abs().amax(-1)
        assert distance.amin(1).max() < 1e-9  # one place gives the outputs of all channels
    places = distance.argmin(1).unique()
    assert len(places) > 10
    assert places.max() < wanted.shape[1]


def test_no_place_is_drawn_twice_and_every_one_where_there_are_few():
    layer = nn.Conv2d(1, 1, 3, padding=1, bias=False)
    x = torch.arange(20.0).reshape(1, 1, 4, 5)
    assert len(_places(layer, x, 15, seeded()).unique()) == 15
    places = _places(layer, x, 2000, seeded())
    centres = _patches(layer, x, places)[0, :, 4]
    assert sorted(centres.tolist()) == list(range(20))
    assert (_patches(layer, x, places)[0] == 0).any()  # the padding belongs to the inputs at the border


@pytest.mark.parametrize("shape", [(50, 7), (2, 25, 7)])
def test_rows_of_a_linear_layer_are_its_inputs(shape):
    x = torch.randn(shape, generator=seeded())
    layer = nn.Linear(7, 3)
    rows = _patches(layer, x, _places(layer, x, 30, seeded()))
    assert rows.shape == (1, 30, 7)
    assert set(map(tuple, rows[0].tolist())) <= set(map(tuple, x.reshape(-1, 7).tolist()))


def test_products_are_the_second_moments_of_the_rounded_inputs():
    detector = ToyDetector()
    teacher = detector.build()
    config = QuantizationConfig(float_roles=(), activation_bits=4)
    student = quantize(teacher, plan_layers(detector, teacher, config), config)
    layers = quantized_layers(student)
    for layer in layers.values():
        layer.input_quantizer.start(activation_range(torch.linspace(-1, 1, 99), 4, "asymmetric", "mse", True))
    batches = [torch.rand(2, 3, 8, 8, generator=seeded(i)) for i in range(3)]
    before = copy.deepcopy(student.state_dict())
    products = input_hessians(student, layers, feeds(detector, teacher, batches))
    # On images of 8 pixels the last layer has one place in each, so that nothing is left to chance.
    seen = []
    handle = student.output.register_forward_pre_hook(lambda layer, x: seen.append(layer.input_quantizer(x[0])))
    with torch.no_grad():
        for images in batches:
            student(images)
    handle.remove()
    x = torch.stack(seen).double()[..., 0, 0].reshape(6, -1)
    wanted = x.T @ x
    scale = products["output"][0].double().diagonal().sum() / wanted.diagonal().sum()
    assert torch.allclose(products["output"][0].double(), wanted * scale, rtol=1e-4, atol=1e-6)
    sizes = {name: (layer.groups, layer.weight[0].numel()) for name, layer in layers.items()}
    assert {name: p.shape for name, p in products.items()} == {n: (g, d, d) for n, (g, d) in sizes.items()}
    assert all(torch.equal(before[key], value) for key, value in student.state_dict().items())
    assert not any(layer._forward_pre_hooks for layer in layers.values())
    again = input_hessians(student, layers, feeds(detector, teacher, batches))
    assert all(torch.equal(products[name], again[name]) for name in products)


def test_a_layers_outputs_on_images_are_closer_after_compensation():
    """The whole way for one strided convolution: products from images, weights moved, outputs compared."""
    detector = ToyDetector()
    teacher = detector.build()
    config = QuantizationConfig(float_roles=("first", "early", "output"), layers={"*": {
        "weight_bits": 3, "activation_bits": 32}})  # fmt: skip
    student = quantize(teacher, plan_layers(detector, teacher, config), config)
    smooth = torch.rand(8, 3, 6, 6, generator=seeded())
    images = F.interpolate(smooth, size=64, mode="bilinear")
    layers = quantized_layers(student)
    products = input_hessians(student, layers, feeds(detector, teacher, images.split(4)))
    for name, layer in layers.items():
        original = layer.weight.detach().clone()
        found = weight_range(original, 3, True, "mse")
        moved = compensate(original, found.scale, codes_of(found), products[name])
        inputs = []
        handle = layer.register_forward_pre_hook(lambda _, x, inputs=inputs: inputs.append(x[0]))
        with torch.no_grad():
            student(images)
        handle.remove()
        errors = [
            (layer._conv_forward(inputs[0], rounded(w, found) - original, None)).square().sum()
            for w in (original, moved)
        ]
        assert errors[1] < 0.6 * errors[0], name


def test_a_transposed_convolution_has_a_step_for_each_output_and_is_closer_after_compensation():
    """The mask head's: 2x2 patches that do not overlap, weight [in, out, 2, 2]."""
    generator = seeded(5)
    layer = nn.ConvTranspose2d(12, 5, 2, 2)
    mixture = torch.randn(12, 3, generator=generator)
    x = torch.einsum("ck,bkhw->bchw", mixture, torch.randn(4, 3, 9, 9, generator=generator)) + 0.1 * torch.randn(
        4, 12, 9, 9, generator=generator
    )
    module = nn.Sequential(layer)
    config = QuantizationConfig(weight_bits=3)
    student = quantize(module, [LayerPlan("0", "head", 3, 32, "")], config)
    quantized = quantized_layers(student)["0"]
    torch.testing.assert_close(student(x), module(x))
    quantized.weight_quantizer.start(weight_range(layer.weight, 3, True, "mse", axis=1))
    assert quantized.weight_quantizer.scale.shape == (1, 5, 1, 1)
    for o in range(5):  # each output has the step of its own weights
        alone = weight_range(layer.weight[:, o].reshape(1, -1), 3, True, "mse")
        torch.testing.assert_close(quantized.weight_quantizer.scale[0, o], alone.scale[0, 0].expand(1, 1))
    product = input_hessians(student, {"0": quantized}, [lambda m: m(x)])["0"]
    before = (student(x) - module(x)).square().mean()
    round_weight(quantized, product, descend=False)
    after = (student(x) - module(x)).square().mean()
    assert product.shape == (1, 12, 12)
    assert after < 0.7 * before


@pytest.mark.parametrize("rounding", ["gptq", "coordinate_descent"])
def test_memory_for_hessians_is_bounded_and_changes_no_weight(rounding, monkeypatch):
    detector, config = ToyDetector(), QuantizationConfig(weight_bits=3, float_roles=(), rounding=rounding)
    batches = [torch.rand(4, 3, 32, 32, generator=seeded(i)) for i in range(2)]
    made, alive = [], []
    original = {name: getattr(calibration, name) for name in ("input_hessians", "round_weight")}

    def measured(*arguments):
        found = original["input_hessians"](*arguments)
        made.extend(map(weakref.ref, found.values()))
        return found

    def counted(*arguments, **options):
        alive.append(sum(held().numel() for held in made if held() is not None))
        original["round_weight"](*arguments, **options)

    def calibrated():
        teacher = detector.build()
        plan = plan_layers(detector, teacher, config)
        student = quantize(teacher, plan, config)
        calibration.calibrate(detector, teacher, student, plan, batches, config)
        return student.state_dict()

    monkeypatch.setattr(calibration, "input_hessians", measured)
    monkeypatch.setattr(calibration, "round_weight", counted)
    wanted = calibrated()
    of_layers = [27**2, 72**2, 72**2, 8**2]
    assert alive == [sum(of_layers[i:]) for i in range(4)]  # each goes after its layer
    alive.clear()
    monkeypatch.setattr(gptq, "HELD", 27**2 + 72**2)
    found = calibrated()
    assert alive == [27**2 + 72**2, 72**2, 72**2 + 8**2, 8**2]
    assert all(torch.equal(found[name], value) for name, value in wanted.items())
