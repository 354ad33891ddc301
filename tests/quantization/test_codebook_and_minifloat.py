"""Codebooks and minifloat grids against brute force in float64 numpy: entries, rounding, gradients, and the search."""

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
from common.quantization.quantizers import input_quantizer, quantizer_class, weight_quantizer
from common.quantization.quantizers.codebook import codebooks
from common.quantization.quantizers.minifloat import minifloat_codes, round_to_minifloat

BITS = range(2, 8)
KINDS = ["auto", "unsigned", "symmetric"]


def weights(seed=0, shape=(6, 4, 3, 3)):
    """Channels from uniform to heavy-tailed."""
    generator = np.random.default_rng(seed)
    spread = [generator.uniform(-1, 1, shape), generator.normal(size=shape), generator.standard_t(3, shape)]
    return torch.tensor(np.stack([spread[i % 3][i] * 2.0 ** (i - 3) for i in range(shape[0])]).astype(np.float32))


def started_weights(weight, bits, axis=0, granularity="channel", **settings):
    channels = tuple(n if i == axis else 1 for i, n in enumerate(weight.shape))
    quantizer = quantizer_class("codebook")(channels if granularity == "channel" else (1,), batched=False)
    config = QuantizationConfig(weight_granularity=granularity, weight_levels="codebook", **settings)
    quantizer.start_weight(weight, bits, axis, config)
    return quantizer


def squared_error(values, levels):
    return float(np.square(values[:, None] - levels).min(1).sum())


def exact_entries(bits, largest):
    """What the entries of each codebook are rounded from, in float64: curve by curve, and shift by shift."""
    for z in [0, 0.5, -0.5, 1, -1, 1.5, -1.5, 2, -2, 2.5, -2.5, 3, -3]:
        places = (np.arange(2**bits) + z) / (2**bits - 1) * 2 - 1
        end = np.abs(places).max()
        if (places < 0).any() and (places > 0).any():
            for c in range(4):
                yield largest * (np.sinh(c * places) / np.sinh(c * end) if c else places / end)


@pytest.mark.parametrize("bits", BITS)
def test_codebooks_are_rising_8_bit_integers_and_each_has_its_mirror_image(bits):
    entries = codebooks(bits)
    exact = np.stack(list(exact_entries(bits, 127)))
    assert entries.shape == exact.shape
    assert len(entries) == (20 if bits == 2 else 52)
    assert np.abs(entries.numpy() - exact).max() <= 0.5 + 1e-9
    assert torch.equal(entries, entries.round())
    assert (entries.diff(dim=1) >= 0).all()
    assert (entries.abs().amax(1) == 127).all()
    assert torch.equal(entries[:4], -entries[:4].flip(1))
    one, other = entries[4:].view(-1, 2, 4, 2**bits).unbind(1)
    assert torch.equal(one, -other.flip(2))


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
    scales = quantizer.scale.detach().expand_as(weight).double().numpy()
    numbers = quantizer.codebook_index.expand_as(weight).numpy()
    v = x.detach().double().numpy() / scales
    entries = codebooks(bits).numpy()[numbers]  # [..., 2^bits]
    wanted = np.take_along_axis(entries, np.abs(v[..., None] - entries).argmin(-1)[..., None], -1)[..., 0]
    assert np.allclose(y.detach().double().numpy() / scales, wanted, rtol=0, atol=1e-3)
    inside = np.abs(v) <= 127
    assert np.array_equal(x.grad.numpy(), grad.numpy() * inside)
    slope = grad.double().numpy() * (wanted - np.where(inside, v, 0))
    axes = tuple(i for i, n in enumerate(quantizer.scale.shape) if n == 1) if granularity == "channel" else None
    scale = 1 / np.sqrt(weight.numel() // quantizer.scale.numel() * 127)  # LSQ, section 2.2
    got, exact = quantizer.scale.grad.flatten().double().numpy(), scale * slope.sum(axes).flatten()
    assert np.allclose(got, exact, rtol=1e-3, atol=1e-4 * np.abs(slope).sum() * scale)


@pytest.mark.parametrize("bits", BITS)
def test_each_channel_takes_the_codebook_and_scale_of_least_error(bits):
    weight = weights(shape=(6, 64, 3, 3))
    quantizer = started_weights(weight, bits)
    for row, got in zip(weight.flatten(1).double().numpy(), quantizer(weight).detach().flatten(1), strict=True):
        scales = np.abs(row).max() / 127 * np.linspace(1.1, 0.25, 60)
        least = min(squared_error(row, table * scale) for table in codebooks(bits).numpy() for scale in scales)
        assert np.square(got.double().numpy() - row).sum() <= 1.15 * least
    assert len(quantizer.codebook_index.unique()) > 1  # uniform and heavy-tailed channels


def test_weights_of_most_channels_lose_less_than_with_uniform_levels():
    weight = weights(shape=(6, 32, 3, 3))
    uniform = quantizer_class("lsq")((6, 1, 1, 1), batched=False)
    uniform.start_weight(weight, 4, 0, QuantizationConfig())
    ours, theirs = ((q(weight) - weight).square().flatten(1).sum(1) for q in (started_weights(weight, 4), uniform))
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
    quantizer = quantizer_class("codebook")(channels if granularity == "channel" else (1,), batched=False)
    quantized = quantized_layer(copy.deepcopy(layer), quantizer, None)
    original = layer.weight.detach().clone()
    quantizer.start_weight(original, 3, axis, config)
    nearest = quantizer(original).detach()
    painted = isinstance(layer, nn.ConvTranspose2d)
    groups, size = getattr(layer, "groups", 1), layer.in_channels if painted else original[0].numel()
    generator = torch.Generator().manual_seed(0)
    mixed = torch.randn(groups, 400, 3, generator=generator) @ torch.randn(groups, 3, size, generator=generator)
    x = mixed + 0.3 * torch.randn(groups, 400, size, generator=generator)
    round_weight(quantized, x.transpose(1, 2) @ x / 400, descend=rounding == "coordinate_descent")

    def error(weight):
        rows = (weight - original).permute(1, 2, 3, 0) if painted else weight - original
        return (x @ rows.reshape(groups, -1, size).transpose(1, 2)).square().sum().item()

    found = quantizer(quantized.weight).detach()
    assert error(found) < 0.8 * error(nearest)
    codes = (found / quantizer.scale.detach()).double().transpose(0, axis).flatten(1)
    entries = quantizer.levels().double().expand(len(codes), -1)
    assert (codes[..., None] - entries[:, None]).abs().amin(-1).max() < 1e-3


@pytest.mark.parametrize("bits", BITS)
def test_entries_for_fp8_are_the_nearest_numbers_that_int8_and_e4m3_both_have(bits):
    both = np.arange(-127, 128)
    both = both[torch.tensor(both).float().to(torch.float8_e4m3fn).double().numpy() == both]
    for entries, exact in zip(codebooks(bits, 4).numpy(), exact_entries(bits, both.max()), strict=True):
        assert np.isin(entries, both).all()
        assert np.allclose(np.abs(entries - exact), np.abs(exact[:, None] - both).min(1), rtol=0, atol=1e-9)
        assert (np.diff(entries) >= 0).all()


def test_4_bit_weights_of_fp8_entries_are_exact_in_e4m3_and_lose_at_most_a_twentieth_more():
    weight = weights(shape=(6, 64, 3, 3))
    plain, fp8 = (started_weights(weight, 4, codebook=entries) for entries in ("int8", "fp8"))
    rounded = fp8(weight).detach()
    codes = (rounded.double() / fp8.scale.detach().double()).round()
    assert torch.equal(codes.float().to(torch.float8_e4m3fn).double(), codes)
    assert torch.equal((codes * fp8.scale.detach()).float(), rounded)
    assert len(fp8.levels()[0].unique()) == 16
    lost = [(q(weight) - weight).square().flatten(1).sum(1) for q in (plain, fp8)]
    assert (lost[1] / lost[0]).mean() < 1.05


@pytest.mark.parametrize("entries", ["int8", "fp8"])
def test_codebooks_return_with_the_state(entries):
    original = started_weights(weights(), 4, codebook=entries)
    loaded = quantizer_class("codebook")((6, 1, 1, 1), batched=False)
    loaded.load_state_dict(original.state_dict())
    assert torch.equal(loaded(weights(seed=1)), original(weights(seed=1)))
    assert torch.equal(loaded.levels(), original.levels())
    assert loaded.double()(weights().double()).dtype == torch.float64


def test_a_detector_of_an_older_version_has_entries_of_int8():
    original = started_weights(weights(), 4)
    state = original.state_dict()
    loaded = quantizer_class("codebook")((6, 1, 1, 1), batched=False)
    loaded.load_state_dict(state | {"_extra_state": state["_extra_state"][:4]})
    assert torch.equal(loaded.levels(), original.levels())


def test_a_channel_of_zeros_stays_next_to_zero():
    weight = weights()
    weight[2] = 0
    assert started_weights(weight, 4)(weight)[2].abs().max() < 1e-5


def test_one_that_is_switched_off_returns_its_input():
    quantizer, x = started_weights(weights(), 4), weights(seed=1)
    quantizer.initialised = False
    assert quantizer(x) is x


@pytest.mark.parametrize(("bits", "own"), [(7, True), (8, False)])
def test_only_weights_of_less_than_8_bits_have_codebooks(bits, own):
    config = QuantizationConfig(weight_bits=4, weight_levels="codebook")
    assert isinstance(weight_quantizer((1,), bits, config), quantizer_class("codebook")) == own


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


def started_minifloat(values, bits, kind="auto"):
    quantizer = quantizer_class("minifloat")((1,), batched=True)
    quantizer.start_input(torch.tensor(values), bits, QuantizationConfig(activation_range=kind))
    return quantizer


@pytest.mark.parametrize("values", DRAWN)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", BITS)
def test_a_tensor_has_at_most_2_to_the_bits_codes_within_8_bits(bits, kind, values):
    quantizer = started_minifloat(draw(values), bits, kind)
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
    if kind == "symmetric":
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
    quantizer = started_minifloat(x, bits)
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
    quantizer = started_minifloat(x.ravel(), 4)
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
    original = started_minifloat(draw("silu"), 4)
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
    quantizer = started_minifloat(np.zeros(50, dtype=np.float32), 4)
    assert not quantizer(torch.zeros(1, 50)).any()


def test_codes_of_4_bits_and_two_significand_bits_are_those_of_fp4_e2m1():
    magnitudes = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    assert [c / 2 for c in minifloat_codes(2, 7, 7) if c >= 0] == magnitudes


@pytest.mark.parametrize("p", [1, 2, 3, 4])
def test_codes_of_up_to_four_significand_bits_are_numbers_of_fp8_e4m3(p):
    codes = torch.tensor(minifloat_codes(p, 100, 200), dtype=torch.float32)
    assert codes.abs().max() > 100
    assert torch.equal(codes.to(torch.float8_e4m3fn).float(), codes)


def test_a_minifloat_grid_that_is_switched_off_returns_its_input():
    quantizer, x = started_minifloat(draw("silu"), 4), torch.tensor(draw("normal"))
    quantizer.initialised = False
    assert quantizer(x) is x


@pytest.mark.parametrize(("bits", "own"), [(7, True), (8, False)])
def test_only_inputs_of_less_than_8_bits_are_minifloats(bits, own):
    config = QuantizationConfig(activation_bits=4, activation_levels="minifloat")
    assert isinstance(input_quantizer(bits, config), quantizer_class("minifloat")) == own
