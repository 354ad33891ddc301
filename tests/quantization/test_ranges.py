"""The search for ranges against a dense search in float64, and the formula of LSQ."""

import numpy as np
import pytest
import torch

from common.quantization.fake_quant import signed_codes, unsigned_codes, weight_codes
from common.quantization.quantizers import quantizer_class
from common.quantization.ranges import activation_range, affine_weight_range, weight_range, with_headroom

BITS = range(2, 9)


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
    [("signed", "silu"), ("signed", "normal"), ("signed", "shifted"), ("unsigned", "positive"), ("unsigned", "silu")],
)
@pytest.mark.parametrize("bits", BITS)
def test_searched_activation_steps_are_as_good_as_a_dense_search(bits, kind, values):
    x = DRAWN[values](1500).astype(np.float32)
    low, high = signed_codes(bits) if kind == "signed" else unsigned_codes(bits)
    found = activation_range(torch.tensor(x), bits, kind, "mse", integer_offset=True)
    assert (found.low, found.high, found.scale.shape, found.offset.tolist()) == (low, high, (1,), [0])
    x = x.astype(np.float64)
    assert error_of(x[None], found)[0] <= (1.05 if bits < 6 else 1.15) * least_error(x, low, high)


@pytest.mark.parametrize("integer_offset", [True, False])
@pytest.mark.parametrize("values", ["silu", "normal", "heavy tails", "positive", "negative", "shifted"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_searched_affine_ranges_are_as_good_as_a_dense_search(bits, values, integer_offset):
    x = DRAWN[values](400).astype(np.float32)
    found = activation_range(torch.tensor(x), bits, "affine", "mse", integer_offset)
    assert (found.low, found.high, found.scale.shape, found.offset.shape) == (*unsigned_codes(bits), (1,), (1,))
    x = x.astype(np.float64)
    assert error_of(x[None], found)[0] <= (1.1 if bits < 6 else 1.15) * least_affine_error(x, bits, integer_offset)


@pytest.mark.parametrize("values", DRAWN)
@pytest.mark.parametrize("bits", BITS)
def test_zero_has_an_exact_code_where_offsets_are_whole_steps(bits, values):
    sample = torch.tensor(DRAWN[values](700), dtype=torch.float32)
    found = activation_range(sample, bits, "affine", "mse", integer_offset=True)
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


@pytest.mark.parametrize(("kind", "codes"), [("signed", signed_codes), ("unsigned", unsigned_codes)])
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
    for kind in ("signed", "unsigned", "affine"):
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
    for kind in ("signed", "affine"):
        activation_range(sample, 4, kind, "mse", integer_offset=False)
    assert torch.equal(weight.detach(), before[0])
    assert torch.equal(sample, before[1])


@pytest.mark.parametrize("kind", ["signed", "affine"])
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
    found = affine_weight_range(weight, bits, per_channel, axis)
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
