"""Minifloat grids against brute force in float64 numpy: their codes, rounding, gradients, and the search."""

import functools

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from common.config.schema import QuantizationConfig
from common.quantization.fake_quant import fake_quantize
from common.quantization.quantizers import input_quantizer, quantizer_class
from common.quantization.quantizers.minifloat import minifloat_codes, round_to_minifloat

BITS = range(2, 8)
KINDS = ["auto", "unsigned", "signed"]


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


def codes_between(low, high, p):
    """All integers of at most p binary digits from the first to the last one that is set."""
    return [n for n in range(low, high + 1) if len(bin(abs(n))[2:].rstrip("0")) <= p]


def started(values, bits, kind="auto"):
    quantizer = quantizer_class("minifloat")((1,), batched=True)
    quantizer.start_input(torch.tensor(values), bits, QuantizationConfig(activation_range=kind))
    return quantizer


def squared_error(values, levels):
    return float(np.square(values[:, None] - levels).min(1).sum())


@pytest.mark.parametrize("values", DRAWN)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", BITS)
def test_a_tensor_has_at_most_2_to_the_bits_codes_within_8_bits(bits, kind, values):
    quantizer = started(draw(values), bits, kind)
    x = torch.linspace(-300, 300, 200_001, dtype=torch.float64) * quantizer.scale.detach().double()
    found = (quantizer.double()(x[None]) / quantizer.scale).unique()
    codes = found.round()
    assert torch.allclose(found, codes, rtol=0, atol=1e-9)
    assert codes.tolist() == codes_between(quantizer.low, quantizer.high, quantizer.significand_bits)
    assert len(codes) <= 2**bits
    assert codes[-1] - codes[0] <= 255
    assert 0 in codes
    if kind == "unsigned":
        assert codes[0] == 0
    if kind == "signed":
        assert codes.tolist() == (-codes.flip(0)).tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("p", [1, 2, 3, 5])
@pytest.mark.parametrize(("low", "high"), [(-24, 96), (0, 128), (-128, 112)])
def test_values_go_to_the_nearest_code_and_gradients_are_those_of_lsq(low, high, p, dtype):
    codes = np.array(codes_between(low, high, p), dtype=float)
    low, high = int(codes[0]), int(codes[-1])
    scale = 0.25
    generator = np.random.default_rng(0)
    # Thousandths, none of them half way between two codes, and all codes, also beyond the last ones.
    v = np.floor(generator.uniform(low - 20, high + 20, 3000) * 1000) / 1000 + 0.0005
    v = np.concatenate([v, codes, [low - 1e4, high + 1e4]]).astype(np.float32).astype(float)
    grad = generator.normal(size=v.shape).astype(np.float32).astype(float)
    x = torch.tensor(v * scale, dtype=dtype, requires_grad=True)
    s = torch.tensor([scale], dtype=dtype, requires_grad=True)
    y = fake_quantize(x, s, low, high, 0.5, functools.partial(round_to_minifloat, significand_bits=p))
    y.backward(torch.tensor(grad, dtype=dtype))
    nearest = codes[np.abs(v[:, None] - codes).argmin(1)]
    assert np.array_equal(y.detach().double().numpy(), nearest * scale)
    inside = (v >= low) & (v <= high)
    assert np.array_equal(x.grad.double().numpy(), grad * inside)
    slope = nearest - np.where(inside, v, 0)  # LSQ, eq. 3, whose rounding passes the gradient straight through
    assert s.grad.item() == pytest.approx(0.5 * (grad * slope).sum(), rel=1e-4 if dtype == torch.float32 else 1e-9)


def test_half_way_goes_to_the_even_one_of_two_neighbours_and_infinities_to_the_ends():
    two_digits = functools.partial(round_to_minifloat, significand_bits=2)
    x = torch.tensor([2.5, 3.5, 5.0, 7.0, 10.0, -5.0, 40.0, float("inf"), -float("inf")])
    rounded = fake_quantize(x, torch.ones(1), -8, 24, rounding=two_digits)  # ..., 3, 4, 6, 8, 12, 16, 24
    assert rounded.tolist() == [2, 4, 4, 8, 8, -4, 24, 24, -8]


@pytest.mark.parametrize("p", [1, 2, 3, 6])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_integers_are_rounded_alike_in_every_precision(dtype, p):
    x = torch.arange(-255, 256).to(dtype)
    codes = np.array(codes_between(-256, 256, p))
    got = round_to_minifloat(x, p).double().numpy()
    assert set(got) <= set(codes)
    assert np.array_equal(np.abs(got - np.arange(-255, 256)), np.abs(np.arange(-255, 256)[:, None] - codes).min(1))


@pytest.mark.parametrize("values", DRAWN)
@pytest.mark.parametrize("bits", BITS)
def test_the_range_is_as_good_as_a_dense_search(bits, values):
    x = draw(values)[:1000]
    quantizer = started(x, bits)
    error = np.square(quantizer(torch.tensor(x)[None])[0].detach().double().numpy() - x.astype(float)).sum()
    least = float("inf")
    for p in range(1, bits + 1):
        numbers = codes_between(1, 255, p)
        for below in range(0, 2**bits, max(1, 2**bits // 8)) if x.min() < 0 else [0]:
            negative = [-n for n in numbers[:below]]
            last = 255 + min(negative, default=0)
            levels = np.sort([*negative, 0, *(n for n in numbers[: 2**bits - 1 - below] if n <= last)])
            ends = [e / c for e, c in ((x.max(), levels[-1]), (x.min(), levels[0])) if c]
            for shrink in np.linspace(1, 0.1, 13):
                least = min(least, squared_error(x.astype(float), levels * max(ends) * shrink))
    assert error <= 1.03 * least


@pytest.mark.parametrize("values", ["silu", "heavy tails", "positive"])
def test_inputs_of_many_small_and_few_large_values_lose_less_than_with_uniform_levels(values):
    x = torch.tensor(draw(values))
    errors = {}
    for name in ("lsq", "minifloat"):
        quantizer = quantizer_class(name)((1,), batched=True)
        quantizer.start_input(x, 4, QuantizationConfig())
        errors[name] = (quantizer(x[None])[0] - x).square().sum().item()
    assert errors["minifloat"] < 0.95 * errors["lsq"]


def test_a_convolution_is_one_of_8_bit_integers_read_from_a_table():
    x = np.resize(draw("silu"), (2, 3, 24, 24))
    quantizer = started(x.ravel(), 4)
    table = np.array(codes_between(quantizer.low, quantizer.high, quantizer.significand_bits), dtype=np.int64)
    scale = quantizer.scale.item()
    stored = np.abs(x[..., None] / np.float32(scale) - table).argmin(-1).astype(np.uint8)  # what 4 bits hold
    assert stored.max() < 16
    weight = np.random.default_rng(1).integers(-8, 8, (5, 3, 3, 3))
    exact = F.conv2d(torch.tensor(table[stored]).double(), torch.tensor(weight).double(), padding=1) * scale
    ours = F.conv2d(quantizer(torch.tensor(x)).double(), torch.tensor(weight).double(), padding=1)
    assert torch.allclose(ours, exact, rtol=1e-6, atol=1e-6 * float(exact.abs().max()))


def test_headroom_makes_room_for_inputs_beyond_the_sample():
    largest = []
    for headroom in (1.0, 1.5):
        quantizer = quantizer_class("minifloat")((1,), batched=True)
        quantizer.start_input(torch.tensor(draw("uniform")), 4, QuantizationConfig(range_headroom=headroom))
        largest.append(quantizer.high * quantizer.scale.item())
    assert 1.2 < largest[1] / largest[0] < 1.6


def test_significand_bits_return_with_the_state():
    original = started(draw("silu"), 4)
    loaded = quantizer_class("minifloat")((1,), batched=True)
    loaded.load_state_dict(original.state_dict())
    assert (loaded.low, loaded.high, loaded.significand_bits) == (
        original.low,
        original.high,
        original.significand_bits,
    )
    x = torch.tensor(draw("silu", 1))[None]
    assert torch.equal(loaded(x), original(x))


def test_a_sample_of_zeros_stays_zero():
    quantizer = started(np.zeros(50, dtype=np.float32), 4)
    assert not quantizer(torch.zeros(1, 50)).any()


def test_codes_of_4_bits_and_two_significand_bits_are_those_of_fp4_e2m1():
    magnitudes = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    assert [c / 2 for c in minifloat_codes(2, 7, 7) if c >= 0] == magnitudes


@pytest.mark.parametrize("p", [1, 2, 3, 4])
def test_codes_of_up_to_four_significand_bits_are_numbers_of_fp8_e4m3(p):
    codes = torch.tensor(minifloat_codes(p, 100, 200), dtype=torch.float32)
    assert codes.abs().max() > 100
    assert torch.equal(codes.to(torch.float8_e4m3fn).float(), codes)


def test_one_that_is_switched_off_returns_its_input():
    quantizer, x = started(draw("silu"), 4), torch.tensor(draw("normal"))
    quantizer.initialised = False
    assert quantizer(x) is x


@pytest.mark.parametrize(("bits", "own"), [(7, True), (8, False)])
def test_only_inputs_of_less_than_8_bits_are_minifloats(bits, own):
    config = QuantizationConfig(activation_bits=4, activation_levels="minifloat")
    assert isinstance(input_quantizer(bits, config), quantizer_class("minifloat")) == own
