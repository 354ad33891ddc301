"""Tables of few entries against brute force in float64 numpy: their entries, rounding, gradients, and the search."""

import copy
import functools

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from common.config.schema import QuantizationConfig
from common.quantization.calibrate import round_weight
from common.quantization.fake_quant import fake_quantize
from common.quantization.layers import output_axis, quantized_layer
from common.quantization.quantizers import quantizer_class
from common.quantization.quantizers.lut import round_to_digits, tables_of

BITS = range(2, 8)
KINDS = ["auto", "affine", "unsigned", "signed"]


def silu(x):
    return x / (1 + np.exp(-x))


DRAWN = {
    "silu": lambda r: silu(r.normal(0, 2, 4000)),
    "normal": lambda r: r.normal(0, 0.3, 4000),
    "heavy tails": lambda r: r.standard_t(3, 4000),
    "positive": lambda r: np.abs(r.normal(0, 3, 4000)),
    "negative": lambda r: -np.abs(r.normal(0, 3, 4000)),
    "uniform": lambda r: r.uniform(0, 1, 4000),
}


def draw(name, seed=0):
    return DRAWN[name](np.random.default_rng(seed)).astype(np.float32)


def codes_between(low, high, digits):
    """All integers whose binary digits, without the zeros at the end, are at most so many."""
    return [n for n in range(low, high + 1) if len(bin(abs(n))[2:].rstrip("0")) <= digits]


def started(values, bits, kind="auto"):
    quantizer = quantizer_class("lut")((1,), batched=True)
    quantizer.start_input(torch.tensor(values), bits, QuantizationConfig(activation_range=kind))
    return quantizer


def squared_error(values, levels):
    return float(np.square(values[:, None] - levels).min(1).sum())


@pytest.mark.parametrize("values", DRAWN)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", BITS)
def test_a_tensor_has_at_most_2_to_the_bits_codes_within_8_bits(bits, kind, values):
    quantizer = started(draw(values), bits, kind)
    x = torch.linspace(-300, 300, 200_001, dtype=torch.float64) * quantizer.step.detach().double()
    found = (quantizer.double()(x[None]) / quantizer.step).unique()
    codes = found.round()
    assert torch.allclose(found, codes, rtol=0, atol=1e-9)
    assert codes.tolist() == codes_between(quantizer.low, quantizer.high, quantizer.digits)
    assert len(codes) <= 2**bits
    assert codes[-1] - codes[0] <= 255
    assert 0 in codes
    if kind == "unsigned":
        assert codes[0] == 0
    if kind == "signed":
        assert codes.tolist() == (-codes.flip(0)).tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("digits", [1, 2, 3, 5])
@pytest.mark.parametrize(("low", "high"), [(-24, 96), (0, 128), (-128, 112)])
def test_values_go_to_the_nearest_code_and_gradients_are_those_of_lsq(low, high, digits, dtype):
    codes = np.array(codes_between(low, high, digits), dtype=float)
    low, high = int(codes[0]), int(codes[-1])
    step = 0.25
    generator = np.random.default_rng(0)
    # Thousandths, none of them half way between two codes, and all codes, also beyond the last ones.
    v = np.floor(generator.uniform(low - 20, high + 20, 3000) * 1000) / 1000 + 0.0005
    v = np.concatenate([v, codes, [low - 1e4, high + 1e4]]).astype(np.float32).astype(float)
    grad = generator.normal(size=v.shape).astype(np.float32).astype(float)
    x = torch.tensor(v * step, dtype=dtype, requires_grad=True)
    s = torch.tensor([step], dtype=dtype, requires_grad=True)
    y = fake_quantize(x, s, low, high, 0.5, functools.partial(round_to_digits, digits=digits))
    y.backward(torch.tensor(grad, dtype=dtype))
    nearest = codes[np.abs(v[:, None] - codes).argmin(1)]
    assert np.array_equal(y.detach().double().numpy(), nearest * step)
    inside = (v >= low) & (v <= high)
    assert np.array_equal(x.grad.double().numpy(), grad * inside)
    slope = nearest - np.where(inside, v, 0)  # LSQ, eq. 3, whose rounding passes the gradient straight through
    assert s.grad.item() == pytest.approx(0.5 * (grad * slope).sum(), rel=1e-4 if dtype == torch.float32 else 1e-9)


def test_half_way_goes_to_the_even_one_of_two_neighbours_and_infinities_to_the_ends():
    two_digits = functools.partial(round_to_digits, digits=2)
    x = torch.tensor([2.5, 3.5, 5.0, 7.0, 10.0, -5.0, 40.0, float("inf"), -float("inf")])
    rounded = fake_quantize(x, torch.ones(1), -8, 24, rounding=two_digits)  # ..., 3, 4, 6, 8, 12, 16, 24
    assert rounded.tolist() == [2, 4, 4, 8, 8, -4, 24, 24, -8]


@pytest.mark.parametrize("digits", [1, 2, 3, 6])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_integers_are_rounded_alike_in_every_precision(dtype, digits):
    x = torch.arange(-255, 256).to(dtype)
    codes = np.array(codes_between(-256, 256, digits))
    got = round_to_digits(x, digits).double().numpy()
    assert set(got) <= set(codes)
    assert np.array_equal(np.abs(got - np.arange(-255, 256)), np.abs(np.arange(-255, 256)[:, None] - codes).min(1))


@pytest.mark.parametrize("values", DRAWN)
@pytest.mark.parametrize("bits", BITS)
def test_the_range_is_as_good_as_a_dense_search(bits, values):
    x = draw(values)[:1000]
    quantizer = started(x, bits)
    error = np.square(quantizer(torch.tensor(x)[None])[0].detach().double().numpy() - x.astype(float)).sum()
    least = float("inf")
    for digits in range(1, bits + 1):
        numbers = codes_between(1, 255, digits)
        for below in range(0, 2**bits, max(1, 2**bits // 8)) if x.min() < 0 else [0]:
            negative = [-n for n in numbers[:below]]
            last = 255 + min(negative, default=0)
            levels = np.sort([*negative, 0, *(n for n in numbers[: 2**bits - 1 - below] if n <= last)])
            ends = [e / c for e, c in ((x.max(), levels[-1]), (x.min(), levels[0])) if c]
            for shrink in np.linspace(1, 0.1, 13):
                least = min(least, squared_error(x.astype(float), levels * max(ends) * shrink))
    assert error <= 1.03 * least


@pytest.mark.parametrize("values", ["silu", "heavy tails", "positive"])
def test_inputs_of_many_small_and_few_large_values_lose_less_than_with_even_levels(values):
    x = torch.tensor(draw(values))
    errors = {}
    for name in ("lsq", "lut"):
        quantizer = quantizer_class(name)((1,), batched=True)
        quantizer.start_input(x, 4, QuantizationConfig())
        errors[name] = (quantizer(x[None])[0] - x).square().sum().item()
    assert errors["lut"] < 0.95 * errors["lsq"]


@pytest.mark.parametrize("method", ["mse", "lsq"])
def test_8_bits_and_the_start_of_lsq_give_what_lsq_gives(method):
    x = torch.tensor(draw("silu"))[None]
    bits = 8 if method == "mse" else 4
    results, rounded = [], []
    for name in ("lsq", "lut"):
        quantizer = quantizer_class(name)((1,), batched=True)
        config = QuantizationConfig(activation_range="affine", scale_init=method)
        assert quantizer.start_input(x[0], bits, config) == ("affine" if method == "mse" else "signed")
        results.append(quantizer(x))
        of_weights = quantizer_class(name)((6, 1, 1, 1), batched=False)
        of_weights.start_weight(weights(), bits, 0, config)
        rounded.append(of_weights(weights()))
    assert torch.equal(*results)
    assert torch.equal(*rounded)


def test_a_convolution_is_one_of_8_bit_integers_read_from_a_table():
    x = np.resize(draw("silu"), (2, 3, 24, 24))
    quantizer = started(x.ravel(), 4)
    table = np.array(codes_between(quantizer.low, quantizer.high, quantizer.digits), dtype=np.int64)
    step = float(quantizer.step)
    stored = np.abs(x[..., None] / np.float32(step) - table).argmin(-1).astype(np.uint8)  # what 4 bits hold
    assert stored.max() < 16
    weight = np.random.default_rng(1).integers(-8, 8, (5, 3, 3, 3))
    exact = F.conv2d(torch.tensor(table[stored]).double(), torch.tensor(weight).double(), padding=1) * step
    ours = F.conv2d(quantizer(torch.tensor(x)).double(), torch.tensor(weight).double(), padding=1)
    assert torch.allclose(ours, exact, rtol=1e-6, atol=1e-6 * float(exact.abs().max()))


def test_a_margin_makes_room_for_inputs_beyond_the_sample():
    largest = []
    for margin in (1.0, 1.5):
        quantizer = quantizer_class("lut")((1,), batched=True)
        quantizer.start_input(torch.tensor(draw("uniform")), 4, QuantizationConfig(range_headroom=margin))
        largest.append(quantizer.high * quantizer.step.item())
    assert 1.2 < largest[1] / largest[0] < 1.6


def test_digits_return_with_the_state():
    original = started(draw("silu"), 4)
    loaded = quantizer_class("lut")((1,), batched=True)
    loaded.load_state_dict(original.state_dict())
    assert (loaded.low, loaded.high, loaded.digits) == (original.low, original.high, original.digits)
    x = torch.tensor(draw("silu", 1))[None]
    assert torch.equal(loaded(x), original(x))


def test_a_sample_of_zeros_stays_zero():
    quantizer = started(np.zeros(50, dtype=np.float32), 4)
    assert not quantizer(torch.zeros(1, 50)).any()


def weights(seed=0, shape=(6, 4, 3, 3)):
    """Channels from even to very uneven."""
    generator = np.random.default_rng(seed)
    spread = [generator.uniform(-1, 1, shape), generator.normal(size=shape), generator.standard_t(3, shape)]
    return torch.tensor(np.stack([spread[i % 3][i] * 2.0 ** (i - 3) for i in range(shape[0])]).astype(np.float32))


def started_weights(weight, bits, axis=0, granularity="channel"):
    channels = tuple(n if i == axis else 1 for i, n in enumerate(weight.shape))
    quantizer = quantizer_class("lut")(channels if granularity == "channel" else (1,), batched=False)
    quantizer.start_weight(weight, bits, axis, QuantizationConfig(weight_granularity=granularity))
    return quantizer


@pytest.mark.parametrize("bits", BITS)
def test_tables_for_weights_are_rising_8_bit_integers_the_same_on_both_sides_of_zero(bits):
    tables = tables_of(bits)
    assert tables.shape == (4, 2**bits)
    assert torch.equal(tables, tables.round())
    assert torch.equal(tables, -tables.flip(1))
    assert (tables.diff(dim=1) >= 0).all()
    assert (tables.amax(1) == 127).all()
    places = np.arange(2**bits) / (2**bits - 1) * 2 - 1
    for curvature, table in enumerate(tables.numpy()):
        exact = 127 * (np.sinh(curvature * places) / np.sinh(curvature) if curvature else places)
        assert np.abs(table - exact).max() <= 0.5 + 1e-9


@pytest.mark.parametrize("granularity", ["channel", "tensor"])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("bits", BITS)
def test_weights_go_to_the_nearest_entry_and_gradients_are_those_of_lsq(bits, axis, granularity):
    weight = weights().transpose(0, axis).contiguous()
    quantizer = started_weights(weight, bits, axis, granularity)
    x = torch.tensor(np.random.default_rng(1).normal(0, 1, weight.shape).astype(np.float32)) * 2 * weight.abs().amax()
    x.requires_grad_()
    grad = torch.tensor(np.random.default_rng(2).normal(size=weight.shape).astype(np.float32))
    y = quantizer(x)
    y.backward(grad)
    steps = quantizer.step.detach().expand_as(weight).double().numpy()
    numbers = quantizer.tables.expand_as(weight).numpy()
    v = x.detach().double().numpy() / steps
    entries = tables_of(bits).numpy()[numbers]  # [..., 2^bits]
    wanted = np.take_along_axis(entries, np.abs(v[..., None] - entries).argmin(-1)[..., None], -1)[..., 0]
    assert np.allclose(y.detach().double().numpy() / steps, wanted, rtol=0, atol=1e-3)
    inside = np.abs(v) <= 127
    assert np.array_equal(x.grad.numpy(), grad.numpy() * inside)
    slope = grad.double().numpy() * (wanted - np.where(inside, v, 0))
    axes = tuple(i for i, n in enumerate(quantizer.step.shape) if n == 1) if granularity == "channel" else None
    scale = 1 / np.sqrt(weight.numel() // quantizer.step.numel() * 127)  # LSQ, section 2.2
    got, exact = quantizer.step.grad.flatten().double().numpy(), scale * slope.sum(axes).flatten()
    assert np.allclose(got, exact, rtol=1e-3, atol=1e-4 * np.abs(slope).sum() * scale)


@pytest.mark.parametrize("bits", BITS)
def test_each_channel_takes_the_table_and_step_of_least_error(bits):
    weight = weights(shape=(6, 64, 3, 3))
    quantizer = started_weights(weight, bits)
    for row, got in zip(weight.flatten(1).double().numpy(), quantizer(weight).detach().flatten(1), strict=True):
        steps = np.abs(row).max() / 127 * np.linspace(1.1, 0.25, 60)
        least = min(squared_error(row, table * step) for table in tables_of(bits).numpy() for step in steps)
        assert np.square(got.double().numpy() - row).sum() <= 1.15 * least
    assert len(quantizer.tables.unique()) > 1  # even and uneven channels


def test_weights_of_most_channels_lose_less_than_with_even_levels():
    weight = weights(shape=(6, 32, 3, 3))
    even = quantizer_class("lsq")((6, 1, 1, 1), batched=False)
    even.start_weight(weight, 4, 0, QuantizationConfig())
    ours, theirs = ((q(weight) - weight).square().flatten(1).sum(1) for q in (started_weights(weight, 4), even))
    assert (ours[2::3] < 0.6 * theirs[2::3]).all()  # heavy tails
    assert (ours[1::3] < 0.95 * theirs[1::3]).all()  # normal
    assert (ours < 1.1 * theirs).all()


@pytest.mark.parametrize("rounding", ["coordinate_descent", "gptq"])
@pytest.mark.parametrize("granularity", ["channel", "tensor"])
@pytest.mark.parametrize("layer", [nn.Conv2d(8, 12, 3, groups=2), nn.Linear(20, 6), nn.ConvTranspose2d(8, 6, 2)])
def test_outputs_are_closer_with_second_order_rounding_than_with_the_nearest_entries(layer, granularity, rounding):
    config = QuantizationConfig(weight_bits=3, weight_granularity=granularity)
    axis = output_axis(layer)
    channels = tuple(n if i == axis else 1 for i, n in enumerate(layer.weight.shape))
    quantizer = quantizer_class("lut")(channels if granularity == "channel" else (1,), batched=False)
    quantized = quantized_layer(copy.deepcopy(layer), quantizer, None)
    original = layer.weight.detach().clone()
    quantizer.start_weight(original, 3, axis, config)
    nearest = quantizer(original).detach()
    painted = isinstance(layer, nn.ConvTranspose2d)
    groups, size = getattr(layer, "groups", 1), layer.in_channels if painted else original[0].numel()
    generator = torch.Generator().manual_seed(0)
    mixed = torch.randn(groups, 400, 3, generator=generator) @ torch.randn(groups, 3, size, generator=generator)
    x = mixed + 0.3 * torch.randn(groups, 400, size, generator=generator)
    round_weight(quantized, x.transpose(1, 2) @ x / 400, refined=rounding == "coordinate_descent")

    def error(weight):
        rows = (weight - original).permute(1, 2, 3, 0) if painted else weight - original
        return (x @ rows.reshape(groups, -1, size).transpose(1, 2)).square().sum().item()

    found = quantizer(quantized.weight).detach()
    assert error(found) < 0.8 * error(nearest)
    codes = (found / quantizer.step.detach()).double().transpose(0, axis).flatten(1)
    entries = quantizer.levels().double().expand(len(codes), -1)
    assert (codes[..., None] - entries[:, None]).abs().amin(-1).max() < 1e-3


def test_tables_return_with_the_state():
    original = started_weights(weights(), 4)
    loaded = quantizer_class("lut")((6, 1, 1, 1), batched=False)
    loaded.load_state_dict(original.state_dict())
    assert torch.equal(loaded(weights(seed=1)), original(weights(seed=1)))
    assert torch.equal(loaded.levels(), original.levels())
    assert loaded.double()(weights().double()).dtype == torch.float64


def test_a_channel_of_zeros_stays_next_to_zero():
    weight = weights()
    weight[2] = 0
    assert started_weights(weight, 4)(weight)[2].abs().max() < 1e-5


@pytest.mark.parametrize("quantizer", [started(draw("silu"), 4), started_weights(weights(), 4)])
def test_one_that_is_switched_off_returns_its_input(quantizer):
    quantizer.initialised = False
    x = weights()
    assert quantizer(x) is x


def test_one_that_is_started_again_forgets_its_bits():
    x, weight = torch.tensor(draw("silu")), weights()
    inputs, again = started(draw("silu"), 4), started_weights(weight, 4)
    inputs.start_input(x, 8, QuantizationConfig())
    again.start_weight(weight, 8, 0, QuantizationConfig())
    assert torch.equal(inputs(x[None]), started(draw("silu"), 8)(x[None]))
    assert torch.equal(again(weight), started_weights(weight, 8)(weight))
