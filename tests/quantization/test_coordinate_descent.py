"""Rounding for the least error of outputs, against trying every code, and what a best rounding must satisfy."""

import itertools
from dataclasses import replace

import pytest
import torch
from torch import nn

from common.config.schema import QuantizationConfig
from common.quantization import quantize
from common.quantization.calibrate import round_weight
from common.quantization.coordinate_descent import coordinate_descent
from common.quantization.gptq import compensate, damped, input_hessians
from common.quantization.layers import quantized_layers
from common.quantization.policy import LayerPlan
from common.quantization.ranges import weight_range

DOUBLE = torch.float64


def codes_of(found):
    return torch.arange(found.low, found.high + 1).to(found.scale)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def problem(groups, rows, size, bits, per_channel=True, seed=0):
    """Weights, their range, and products of inputs that are mixtures of few."""
    causes = torch.randn(groups, 300, max(2, size // 3), generator=seeded(seed), dtype=DOUBLE)
    mixture = torch.randn(groups, causes.shape[2], size, generator=seeded(seed + 1), dtype=DOUBLE)
    x = causes @ mixture + 0.3 * torch.randn(groups, 300, size, generator=seeded(seed + 2), dtype=DOUBLE)
    weight = torch.randn(groups * rows, size, generator=seeded(seed + 3), dtype=DOUBLE)
    return weight, weight_range(weight, bits, per_channel, "mse"), x.transpose(1, 2) @ x / 300


def refined(weight, found, product):
    """The rounded weights and their steps."""
    moved, step = coordinate_descent(weight, found.scale, codes_of(found), product)
    return (moved / step).round() * step, step


def errors(weight, changed, product):
    """Squared error of each output, for damped products, [rows]."""
    difference = (changed - weight).view(len(product), -1, product.shape[1])
    return torch.einsum("grd,gde,gre->gr", difference, damped(product), difference).flatten()


def test_small_layers_are_rounded_nearly_as_well_as_any_step_and_codes_can():
    every = torch.tensor(list(itertools.product(range(-4, 4), repeat=4)), dtype=DOUBLE)
    reached = possible = 0.0
    for seed in range(8):
        weight, found, product = problem(1, 4, 4, 3, seed=seed)
        moved, _ = refined(weight, found, product)
        h = damped(product)[0]
        power = ((every @ h) * every).sum(1).clamp(min=1e-12)
        fits = (every @ h @ weight.T / power[:, None]).clamp(min=1e-9)  # the best step for each codes, [codes, rows]
        differences = every[:, None] * fits[..., None] - weight
        least = ((differences @ h) * differences).sum(2).amin(0)
        got = errors(weight, moved, product)
        assert (got > least - 1e-9).all()
        reached, possible = reached + float(got.sum()), possible + float(least.sum())
    assert reached < 1.3 * possible


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize(("groups", "rows", "size"), [(1, 8, 27), (3, 4, 18), (8, 1, 9), (1, 4, 200)])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_outputs_are_closer_than_by_gptq_and_no_other_code_is_better(bits, groups, rows, size, per_channel):
    weight, found, product = problem(groups, rows, size, bits, per_channel)
    moved, step = coordinate_descent(weight, found.scale, codes_of(found), product)
    assert (moved.shape, step.shape) == (weight.shape, found.scale.shape)
    assert (step > 0).all()
    places = moved / step
    assert places.min() > found.low - 0.5
    assert places.max() < found.high + 0.5
    codes = places.round()
    moved = codes * step
    by_gptq = compensate(weight, found.scale, codes_of(found), product)
    by_gptq = (by_gptq / found.scale).round().clamp(found.low, found.high) * found.scale
    before, after = errors(weight, by_gptq, product), errors(weight, moved, product)
    assert after.sum() < before.sum()
    assert not per_channel or (after < before * 1.001).all()
    for place in range(size):
        for sign in (-1, 1):
            other = codes.clone()
            other[:, place] = (other[:, place] + sign).clamp(found.low, found.high)
            assert (errors(weight, other * step, product) > 0.999 * after).all()


@pytest.mark.parametrize("per_channel", [True, False])
def test_no_other_step_is_better_for_the_codes(per_channel):
    weight, found, product = problem(2, 6, 20, 4, per_channel)
    moved, _ = refined(weight, found, product)
    for factor in (0.99, 1.01):
        other, best = (errors(weight, moved * f, product) for f in (factor, 1.0))
        assert (other > best * 0.999).all() if per_channel else other.sum() > best.sum() * 0.999


def test_float32_is_as_good_as_float64():
    weight, found, product = problem(1, 16, 300, 4)
    exact, _ = refined(weight, found, product)
    single, _ = refined(weight.float(), replace(found, scale=found.scale.float()), product.float())
    wanted, got = (float(errors(weight, x, product).sum()) for x in (exact, single.double()))
    assert got == pytest.approx(wanted, rel=0.05)


def test_weights_of_no_input_and_weights_of_nothing_are_kept():
    weight, found, product = problem(1, 4, 12, 4)
    moved, step = coordinate_descent(weight, found.scale, codes_of(found), torch.zeros_like(product))
    assert moved.isfinite().all()
    assert (moved - weight).abs().max() < step.max()
    zero = weight_range(torch.zeros_like(weight), 4, True, "mse")
    moved, step = coordinate_descent(torch.zeros_like(weight), zero.scale, codes_of(zero), product)
    assert torch.equal(moved, torch.zeros_like(weight))
    assert (step > 0).all()


def test_factors_tried_one_after_the_other_give_what_they_give_together(monkeypatch):
    weight, found, product = problem(2, 5, 18, 3)
    together = coordinate_descent(weight, found.scale, codes_of(found), product)
    monkeypatch.setattr("common.quantization.coordinate_descent.AT_A_TIME", 1)
    for got, wanted in zip(coordinate_descent(weight, found.scale, codes_of(found), product), together, strict=True):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("granularity", ["channel", "tensor"])
@pytest.mark.parametrize("kind", ["convolution", "linear", "transposed"])
def test_every_kind_of_layer_is_closer_to_the_float_one_than_by_gptq(kind, granularity):
    torch.manual_seed(5)
    layer = {"convolution": nn.Conv2d(12, 7, 3, padding=1), "linear": nn.Linear(12, 7),
             "transposed": nn.ConvTranspose2d(12, 7, 2, 2)}[kind]  # fmt: skip
    mixture = torch.randn(12, 4)
    shape = (200, 4) if kind == "linear" else (4, 9, 9, 4)
    x = torch.randn(shape) @ mixture.T
    x = x + 0.2 * torch.randn(x.shape)
    x = x if kind == "linear" else x.permute(0, 3, 1, 2)
    module = nn.Sequential(layer)
    error = {}
    for refined in (False, True):
        student = quantize(
            module,
            [LayerPlan("0", "head", 3, 32, "")],
            QuantizationConfig(weight_bits=3, weight_granularity=granularity),
        )
        quantized = quantized_layers(student)["0"]
        axis = 1 if kind == "transposed" else 0
        quantized.weight_quantizer.start(weight_range(layer.weight, 3, granularity == "channel", "mse", axis=axis))
        product = input_hessians(student, {"0": quantized}, [lambda m: m(x)])["0"]
        round_weight(quantized, product, refined)
        with torch.no_grad():
            error[refined] = float((student(x) - module(x)).square().mean())
    assert error[True] < (0.95 if granularity == "channel" else 1) * error[False]
