"""Searches against brute force in float64: for ranges, and by coordinate descent for the codes of weights."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from common.config.schema import QuantizationConfig
from common.quantization import quantize, ranges
from common.quantization.calibrate import round_weight
from common.quantization.coordinate_descent import coordinate_descent
from common.quantization.fake_quant import signed_codes, unsigned_codes, weight_codes
from common.quantization.gptq import compensate, damped, input_hessians
from common.quantization.layers import quantized_layers
from common.quantization.policy import LayerPlan
from common.quantization.quantizers import quantizer_class
from common.quantization.ranges import activation_range, asymmetric_weight_range, weight_range, with_headroom

BITS = range(2, 9)

DOUBLE = torch.float64


def rng(seed=0):
    return np.random.default_rng(seed)


def silu(x):
    return x / (1 + np.exp(-x))


DRAWN = {
    "normal": lambda n: rng().normal(0, 0.3, n),
    "uniform": lambda n: rng().uniform(-1, 1, n),
    "heavy tails": lambda n: rng().standard_t(3, n),
    "one outlier": lambda n: np.append(rng().normal(0, 1, n - 1), 25.0),
    "silu": lambda n: silu(rng().normal(0, 2, n)),
    "positive": lambda n: np.abs(rng().normal(0, 3, n)),
    "negative": lambda n: -np.abs(rng().normal(0, 3, n)),
    "shifted": lambda n: rng().normal(5, 1, n),
}


def error(x, step, low, high, offset=0.0):
    """Squared error of rounding each of `x` [..., n], summed over n, in float64."""
    return ((np.clip(np.rint((x - offset) / step), low, high) * step + offset - x) ** 2).sum(-1)


def error_of(x, found):
    step, offset = (value.double().numpy() for value in (found.scale.reshape(-1), found.offset))
    return error(x, step[:, None], found.low, found.high, offset)


def least_error(x, low, high):
    """The least error of a row with a zero in the middle or at the end: 500 steps up to the largest value's."""
    largest = max(x.max() / high, x.min() / low if low else 0.0)
    return min(error(x, largest * 1.05 * i / 500, low, high) for i in range(1, 501))


def least_affine_error(x, bits, integer_offset):
    """The same for any two ends, each in 40 places between zero and the largest value.

    With an integer offset, for every zero point that n bits have and 80 steps.
    """
    high = 2**bits - 1
    bottom, top = min(x.min(), 0.0), max(x.max(), 0.0)
    if integer_offset:
        steps = (top - bottom) * np.linspace(1.2, 0.02, 80)[:, None] / high
        return min(error(x, steps, -zero, high - zero).min() for zero in range(high + 1))
    ends = [(bottom * i / 40, top * k / 40) for i in range(41 if bottom else 1) for k in range(41) if i or k]
    return min(error(x, (last - first) / high, 0, high, first) for first, last in ends if last > first)


@pytest.mark.parametrize("kind", ["normal", "uniform", "heavy tails", "one outlier"])
@pytest.mark.parametrize("bits", BITS)
def test_searched_weight_steps_are_as_good_as_a_dense_search(bits, kind):
    x = np.stack([DRAWN[kind](600), -DRAWN[kind](600) * 0.01, DRAWN[kind](1200)[600:] * 7]).astype(np.float32)
    weight = torch.tensor(x).reshape(3, 24, 5, 5)
    low, high = weight_codes(bits)
    rows = x.astype(np.float64)
    wanted = np.array([least_error(row, low, high) for row in rows])
    found = weight_range(weight, bits, True, "mse")
    assert (found.low, found.high, found.scale.shape, found.offset.tolist()) == (low, high, (3, 1, 1, 1), [0])
    allowed = 1.05 if bits < 6 else 1.15  # with many codes, the place of single values on the grid decides
    assert (error_of(rows, found) <= allowed * wanted).all()
    single = weight_range(weight, bits, False, "mse")
    assert single.scale.shape == (1,)
    assert error_of(rows.reshape(1, -1), single) <= allowed * least_error(rows.ravel(), low, high)


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        ("symmetric", "silu"),
        ("symmetric", "normal"),
        ("symmetric", "shifted"),
        ("unsigned", "positive"),
        ("unsigned", "silu"),
    ],
)
@pytest.mark.parametrize("bits", BITS)
def test_searched_activation_steps_are_as_good_as_a_dense_search(bits, kind, values):
    x = DRAWN[values](1500).astype(np.float32)
    low, high = signed_codes(bits) if kind == "symmetric" else unsigned_codes(bits)
    found = activation_range(torch.tensor(x), bits, kind, "mse", integer_offset=True)
    assert (found.low, found.high, found.scale.shape, found.offset.tolist()) == (low, high, (1,), [0])
    x = x.astype(np.float64)
    assert error_of(x[None], found)[0] <= (1.05 if bits < 6 else 1.15) * least_error(x, low, high)


@pytest.mark.parametrize("integer_offset", [True, False])
@pytest.mark.parametrize("values", ["silu", "normal", "heavy tails", "positive", "negative", "shifted"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_searched_affine_ranges_are_as_good_as_a_dense_search(bits, values, integer_offset):
    x = DRAWN[values](400).astype(np.float32)
    found = activation_range(torch.tensor(x), bits, "asymmetric", "mse", integer_offset)
    assert (found.low, found.high, found.scale.shape, found.offset.shape) == (*unsigned_codes(bits), (1,), (1,))
    x = x.astype(np.float64)
    assert error_of(x[None], found)[0] <= (1.1 if bits < 6 else 1.15) * least_affine_error(x, bits, integer_offset)


@pytest.mark.parametrize("values", DRAWN)
@pytest.mark.parametrize("bits", BITS)
def test_zero_has_an_exact_code_where_offsets_are_whole_steps(bits, values):
    sample = torch.tensor(DRAWN[values](700), dtype=torch.float32)
    found = activation_range(sample, bits, "asymmetric", "mse", integer_offset=True)
    zero = -(found.offset / found.scale).item()
    assert zero == pytest.approx(round(zero), abs=1e-3)
    assert 0 <= round(zero) <= 2**bits - 1
    quantizer = quantizer_class("lsq")((1,), batched=True)
    quantizer.start(found)
    assert quantizer(torch.zeros(1, 4)).tolist() == [[0, 0, 0, 0]]
    assert quantizer.high - quantizer.low == 2**bits - 1
    # What the quantizer computes is the range that was found.
    error = (quantizer(sample[None])[0] - sample).square().sum().item()
    assert error == pytest.approx(error_of(sample.double().numpy()[None], found)[0], rel=1e-3)


@pytest.mark.parametrize("shape", [(4, 3, 3, 3), (4, 1, 5, 5), (6, 10)])
@pytest.mark.parametrize("bits", BITS)
def test_lsq_steps_of_weights_are_two_mean_magnitudes_over_the_root_of_the_largest_code(bits, shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    root = np.sqrt(2 ** (bits - 1) - 1)
    values = np.abs(weight.double().numpy().reshape(shape[0], -1))
    found = weight_range(weight, bits, True, "lsq")
    assert found.scale.shape == (shape[0], *[1] * (len(shape) - 1))
    assert np.allclose(found.scale.numpy().ravel(), 2 * values.mean(1) / root)
    assert weight_range(weight, bits, False, "lsq").scale.item() == pytest.approx(2 * values.mean() / root)
    assert (found.low, found.high) == weight_codes(bits)


def test_every_code_of_a_weight_of_eight_bits_has_a_negative_one():
    assert weight_codes(8) == (-127, 127)
    assert all(weight_codes(bits) == signed_codes(bits) for bits in range(2, 8))


@pytest.mark.parametrize(("kind", "codes"), [("symmetric", signed_codes), ("unsigned", unsigned_codes)])
@pytest.mark.parametrize("bits", BITS)
def test_lsq_steps_of_activations_follow_the_same_formula(bits, kind, codes):
    sample = torch.randn(500, generator=torch.Generator().manual_seed(0))
    found = activation_range(sample, bits, kind, "lsq", integer_offset=True)
    wanted = 2 * np.abs(sample.double().numpy()).mean() / np.sqrt(codes(bits)[1])
    assert found.scale.item() == pytest.approx(wanted)
    assert (found.low, found.high, found.offset.item()) == (*codes(bits), 0)


@pytest.mark.parametrize("method", ["mse", "lsq"])
def test_channels_and_samples_of_zeros_get_a_step_that_keeps_them(method):
    weight = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    weight[1] = 0
    found = weight_range(weight, 4, True, method)
    assert (found.scale > 0).all()
    quantizer = quantizer_class("lsq")((3, 1), batched=False)
    quantizer.start(found)
    rounded = quantizer(weight)
    assert rounded.isfinite().all()
    assert rounded[1].tolist() == [0] * 4
    for kind in ("symmetric", "unsigned", "asymmetric"):
        found = activation_range(torch.zeros(50), 4, kind, method, integer_offset=True)
        assert found.scale > 0
        quantizer = quantizer_class("lsq")((1,), batched=True)
        quantizer.start(found)
        assert quantizer(torch.zeros(1, 3)).tolist() == [[0, 0, 0]]


def test_searching_changes_neither_weights_nor_samples():
    weight = torch.randn(3, 4, 2, 2).requires_grad_()
    sample = torch.randn(100)
    before = weight.detach().clone(), sample.clone()
    assert not weight_range(weight, 4, True, "mse").scale.requires_grad
    for kind in ("symmetric", "asymmetric"):
        activation_range(sample, 4, kind, "mse", integer_offset=False)
    assert torch.equal(weight.detach(), before[0])
    assert torch.equal(sample, before[1])


@pytest.mark.parametrize("kind", ["symmetric", "asymmetric"])
def test_a_margin_makes_room_for_inputs_beyond_the_sample(kind):
    """The range for values in [-1, 1] that may be half as large again ends near 1.5, and near 1 without a margin."""
    sample = torch.rand(2**12, generator=torch.Generator().manual_seed(0)) * 2 - 1
    ends = []
    for margin in (1.0, 1.5):
        found = activation_range(with_headroom(sample, margin), 8, kind, "mse", integer_offset=True)
        ends.append(float(found.scale * found.high + found.offset))
    assert ends == pytest.approx([1.0, 1.5], rel=0.08)


def test_values_are_stretched_by_factors_even_between_one_and_the_largest():
    found = with_headroom(torch.full((80,), 2.0), 3.0).numpy()
    assert sorted(found) == pytest.approx(np.repeat(np.linspace(2, 6, 8), 10))
    assert torch.equal(with_headroom(torch.arange(5.0), 1.0), torch.arange(5.0))


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("bits", range(2, 8))
def test_affine_weights_have_nearly_the_least_error_of_any_zero_point_and_scale(bits, per_channel, axis):
    low, high = signed_codes(bits)
    rows = np.stack([DRAWN[name](300) for name in ("normal", "heavy tails", "silu", "positive", "negative")])
    weight = torch.tensor(rows).view(5, 3, 100).transpose(0, axis).contiguous()
    found = asymmetric_weight_range(weight, bits, per_channel, axis)
    shape = tuple(5 if i == axis else 1 for i in range(3)) if per_channel else (1,)
    assert found.scale.shape == found.offset.shape == shape
    scale, offset = (x.double().numpy().reshape(-1, 1) for x in (found.scale, found.offset))
    zero = -offset / scale
    assert np.allclose(zero, zero.round(), rtol=0, atol=1e-6)
    assert ((low < zero) & (zero < high)).all()
    rows = rows if per_channel else rows.reshape(1, -1)
    got = error(rows, scale, low, high, offset)
    reach = np.abs(rows).max(1)
    for row, value, largest in zip(rows, got, reach, strict=True):
        steps = largest * np.geomspace(0.01, 1, 200)[:, None]
        zeros = range(low + 1, high)
        least = min(error(row, steps, low - z, high - z).min() for z in zeros)
        assert value <= (1.1 if bits < 6 else 1.25) * least  # from 5 bits on only every second to ninth zero is tried


@pytest.mark.parametrize("bits", range(2, 9))
def test_affine_weights_have_one_range_however_their_errors_are_summed(bits, monkeypatch):
    weight = torch.randn(20, 9, generator=torch.Generator().manual_seed(bits)) ** 3
    found = []
    for limit in (0, 10**6):
        monkeypatch.setattr(ranges, "VALUES_PER_CODE", limit)
        found.append(asymmetric_weight_range(weight, bits, per_channel=True))
    assert torch.equal(found[0].scale, found[1].scale)
    assert torch.equal(found[0].offset, found[1].offset)


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
