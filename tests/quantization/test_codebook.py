"""Codebooks against brute force in float64 numpy: their entries, rounding, gradients, and the search."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from common.config.schema import QuantizationConfig
from common.quantization.calibrate import round_weight
from common.quantization.layers import output_axis, quantized_layer
from common.quantization.quantizers import quantizer_class, weight_quantizer
from common.quantization.quantizers.codebook import codebooks

BITS = range(2, 8)


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
