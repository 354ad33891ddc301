"""LSQ and LSQ+ against the formulas of their papers in plain float64 numpy, and what a quantizer keeps."""

import copy
import io

import numpy as np
import pytest
import torch

from common.quantization.fake_quant import fake_quantize, lsq_gradient_scale, signed_codes, unsigned_codes
from common.quantization.quantizers import quantizer_class
from common.quantization.ranges import Range

BITS = range(2, 9)
IMAGES, CHANNELS = 3, 4
TYPES = [pytest.param(torch.float32, id="float32"), pytest.param(torch.float64, id="float64")]
CODES = {
    "signed": lambda bits: (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1),
    "unsigned": lambda bits: (0, 2**bits - 1),
    "zero point": lambda bits: (-(2**bits // 3), 2**bits - 1 - 2**bits // 3),
}


def lsq(x, scale, low, high, grad, offset=0.0):
    """Value and gradients by LSQ, eq. 1 to 3 and 5, and LSQ+, eq. 1, 2 and those of its section 3.1.

    The gradients of scale and offset are not yet summed. A value exactly on a bound is inside, as in the code of LSQ's
    appendix, whose clip passes the gradient there; the text of eq. 3 and 5 counts it as outside.
    """
    v = (x - offset) / scale
    code = np.rint(np.clip(v, low, high))  # half to even
    inside = (v >= low) & (v <= high)
    slope = np.select([v < low, v > high], [float(low), float(high)], np.rint(v) - v)
    return code, code * scale + offset, grad * inside, grad * slope, grad * ~inside


def sums(values, shape):
    """`values` summed over the dimensions in which `shape` has one element."""
    axes = tuple(i for i in range(values.ndim) if len(shape) < values.ndim or shape[i] == 1)
    return values.sum(axes).reshape(shape)


def sample(scale, low, high, offset=0.0):
    """[images, channels, n]: all bounds, codes and half scales, values beside them and far outside."""
    codes = np.arange(low - 2, high + 2.5, 0.5)
    spread = np.random.default_rng(0).normal(0, high - low, (IMAGES, CHANNELS, 200)) + (high + low) / 2
    close = np.concatenate([codes, [low - 0.25, low + 0.25, high - 0.25, high + 0.25, 100 * low, 100 * high]])
    close = np.broadcast_to(close, (IMAGES, CHANNELS, len(close)))
    # Thousandths, and none of them close to a half scale, so that float32 and float64 round to the same code.
    spread = np.floor(spread * 1000) / 1000 + 0.0005
    return np.concatenate([close, spread], 2) * scale + offset


def powers_of_two(granularity):
    """Steps by which float32 divides exactly."""
    return np.array([0.25]) if granularity == "tensor" else np.array([0.25, 2.0, 0.0625, 1.0]).reshape(1, CHANNELS, 1)


def weights_like(x, seed=1):
    return np.random.default_rng(seed).normal(size=x.shape).astype(np.float32).astype(np.float64)


def run(function, dtype, x, grad, *parameters):
    """The result of function(x, *parameters) and the gradients of all of them, as float64 numpy."""
    tensors = [torch.tensor(value, dtype=dtype, requires_grad=True) for value in (x, *parameters)]
    result = function(*tensors)
    assert result.dtype == dtype
    result.backward(torch.tensor(grad, dtype=dtype))
    return [value.detach().double().numpy() for value in (result, *(t.grad for t in tensors))]


def assert_sum(got, terms, dtype, shape):
    """`got` is the sum of `terms` up to the rounding of `dtype`."""
    error = np.abs(got - sums(terms, shape))
    assert (error <= 100 * torch.finfo(dtype).eps * sums(np.abs(terms), shape)).all()


@pytest.mark.parametrize("bits", BITS)
def test_n_bits_hold_2_to_the_n_codes(bits):
    assert signed_codes(bits) == CODES["signed"](bits)
    assert unsigned_codes(bits) == CODES["unsigned"](bits)
    for low, high in (signed_codes(bits), unsigned_codes(bits)):
        x = torch.linspace(-1000, 1000, 20001)
        assert fake_quantize(x, torch.tensor([0.5]), low, high).unique().tolist() == [
            code * 0.5 for code in range(low, high + 1)
        ]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize("kind", CODES)
@pytest.mark.parametrize("bits", BITS)
def test_values_codes_and_gradients_are_those_of_the_paper(bits, kind, granularity, dtype):
    low, high = CODES[kind](bits)
    scale = powers_of_two(granularity)
    x = sample(scale, low, high).astype(np.float32).astype(np.float64)
    grad = weights_like(x)
    code, value, grad_x, grad_scale, _ = lsq(x, scale, low, high, grad)
    got, got_x, got_scale = run(lambda x, scale: fake_quantize(x, scale, low, high, 0.125), dtype, x, grad, scale)
    assert np.array_equal(got, value)
    assert np.array_equal(got / scale, code)
    assert set(np.unique(code)) == set(range(low, high + 1))
    assert np.array_equal(got_x, grad_x)
    assert_sum(got_scale, 0.125 * grad_scale, dtype, scale.shape)


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize("kind", CODES)
@pytest.mark.parametrize("bits", BITS)
def test_steps_that_are_no_powers_of_two_change_nothing(bits, kind, granularity):
    low, high = CODES[kind](bits)
    scale = powers_of_two(granularity) * 0.7312
    x = sample(scale, low, high)
    grad = weights_like(x)
    _, value, grad_x, grad_scale, _ = lsq(x, scale, low, high, grad)
    got, got_x, got_scale = run(lambda x, scale: fake_quantize(x, scale, low, high), torch.float64, x, grad, scale)
    assert np.array_equal(got, value)
    assert np.array_equal(got_x, grad_x)
    assert_sum(got_scale, grad_scale, torch.float64, scale.shape)
    single = run(
        lambda x, scale: fake_quantize(x, scale, low, high), torch.float32, x[..., -200:], grad[..., -200:], scale
    )
    scale = scale.astype(np.float32).astype(np.float64)
    x = x[..., -200:].astype(np.float32).astype(np.float64)
    code, value, grad_x, grad_scale, _ = lsq(x, scale, low, high, grad[..., -200:])
    assert np.array_equal(np.rint(single[0] / scale), code)
    assert np.allclose(single[0], value, rtol=1e-6, atol=0)
    assert np.array_equal(single[1], grad_x)
    assert_sum(single[2], grad_scale, torch.float32, scale.shape)


def test_half_steps_are_rounded_to_the_even_code():
    x = torch.tensor([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 6.5, 7.5, -8.5])
    assert fake_quantize(x, torch.ones(1), -8, 7).tolist() == [-2, -2, 0, 0, 2, 2, 6, 7, -8]


@pytest.mark.parametrize("dtype", TYPES)
def test_the_first_and_the_last_code_are_inside_and_the_next_numbers_are_not(dtype):
    bounds = torch.tensor([-8.0, 7.0, 0.0], dtype=dtype)
    beyond = torch.nextafter(bounds, torch.tensor([-9.0, 9.0, -1.0], dtype=dtype))
    for low, high, x, inside in (
        (-8, 7, bounds, [1, 1, 1]),
        (-8, 7, beyond, [0, 0, 1]),
        (0, 7, bounds, [0, 1, 1]),
        (0, 7, beyond, [0, 0, 0]),
    ):
        x = x.clone().requires_grad_()
        fake_quantize(x, torch.ones(1, dtype=dtype), low, high).sum().backward()
        assert x.grad.tolist() == inside


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_memory_layout_and_spread_gradients_change_nothing(layout):
    x = np.random.default_rng(0).normal(0, 3, (2, 5, 6, 7))
    tensor = torch.tensor(x).contiguous(memory_format=layout).requires_grad_()
    scale = torch.full((1,), 0.3, dtype=torch.float64, requires_grad=True)
    fake_quantize(tensor, scale, -8, 7).sum().backward()  # the gradient of a sum is one number with strides of 0
    _, _, grad_x, grad_scale, _ = lsq(x, 0.3, -8, 7, np.ones_like(x))
    assert np.array_equal(tensor.grad.numpy(), grad_x)
    assert scale.grad.item() == pytest.approx(grad_scale.sum(), rel=1e-12)


def test_a_fixed_scale_costs_no_gradient_and_x_still_gets_its_own():
    x = torch.linspace(-2, 2, 9, requires_grad=True)
    fake_quantize(x, torch.full((1,), 0.5), -2, 1).sum().backward()
    assert x.grad.tolist() == [0, 0, 1, 1, 1, 1, 0, 0, 0]


def started(name, scale, low, high, offset, batched, dtype=torch.float64):
    quantizer = quantizer_class(name)(tuple(scale.shape), batched=batched).to(dtype)
    quantizer.start(Range(torch.tensor(scale, dtype=dtype), low, high, torch.tensor([offset], dtype=dtype)))
    return quantizer


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("zero_point", [0, 1, 3])
def test_an_lsq_activation_quantizer_has_an_integer_zero_point(zero_point, bits, dtype):
    scale = np.array([0.25])
    quantizer = started("lsq", scale, 0, 2**bits - 1, -zero_point * 0.25, True, dtype)
    assert (quantizer.low, quantizer.high) == (-zero_point, 2**bits - 1 - zero_point)
    x = sample(scale, quantizer.low, quantizer.high).astype(np.float32).astype(np.float64)
    grad = weights_like(x)
    code, value, grad_x, grad_scale, _ = lsq(x, scale, quantizer.low, quantizer.high, grad)
    got, got_x = run(quantizer, dtype, x, grad)
    assert np.array_equal(got, value)
    assert np.array_equal(got_x, grad_x)
    assert ((code + zero_point >= 0) & (code + zero_point < 2**bits)).all()
    assert quantizer(torch.zeros(1, 1, dtype=dtype)).item() == 0
    factor = 1 / np.sqrt(x[0].size * max(1, quantizer.high))  # LSQ, section 2.2, N of one image
    assert_sum(quantizer.scale.grad.double().numpy(), factor * grad_scale, dtype, (1,))


@pytest.mark.parametrize("name", ["lsq", "lsq+"])
@pytest.mark.parametrize("shape", [(1,), (CHANNELS, 1, 1)])
@pytest.mark.parametrize("bits", BITS)
def test_a_weight_quantizer_is_plain_lsq_whatever_its_name(bits, shape, name):
    low, high = CODES["signed"](bits)
    scale = np.array([0.25, 2.0, 0.0625, 1.0])[: np.prod(shape)].reshape(shape)
    quantizer = started(name, scale, low, high, 0.0, False)
    x = np.moveaxis(sample(scale.reshape(1, -1, 1), low, high), 1, 0)  # [channels out, 3, n]
    grad = weights_like(x)
    _, value, grad_x, grad_scale, _ = lsq(x, scale, low, high, grad)
    got, got_x = run(quantizer, torch.float64, x, grad)
    assert np.array_equal(got, value)
    assert np.array_equal(got_x, grad_x)
    factor = 1 / np.sqrt(x.size / scale.size * high)  # N: the weights that share a scale
    assert_sum(quantizer.scale.grad.numpy(), factor * grad_scale, torch.float64, shape)
    assert [key for key, _ in quantizer.named_parameters()] == ["scale"]


@pytest.mark.parametrize("name", ["lsq", "lsq+"])
@pytest.mark.parametrize("bits", [2, 4, 6])
def test_weights_have_a_zero_point_for_each_scale(bits, name):
    low, high = CODES["signed"](bits)
    zero = np.array([low + 1, -1, 0, high - 1]).reshape(CHANNELS, 1, 1)
    scale = np.array([0.25, 2.0, 0.0625, 1.0]).reshape(CHANNELS, 1, 1)
    quantizer = quantizer_class(name)(scale.shape, batched=False).double()
    quantizer.start(Range(torch.tensor(scale), low, high, torch.tensor(-zero * scale)))
    x = np.moveaxis(sample(scale.reshape(1, -1, 1), 2 * low, 2 * high), 1, 0)
    grad = weights_like(x)
    rows = [lsq(x[c], scale[c], low - int(z), high - int(z), grad[c]) for c, z in enumerate(zero.flatten())]
    got, got_x = run(quantizer, torch.float64, x, grad)
    assert np.array_equal(got, np.stack([row[1] for row in rows]))
    assert np.array_equal(got_x, np.stack([row[2] for row in rows]))
    factor = 1 / np.sqrt(x.size / scale.size * high)  # N: the weights that share a scale
    assert_sum(quantizer.scale.grad.numpy(), factor * np.stack([row[3] for row in rows]), torch.float64, scale.shape)
    assert np.array_equal(quantizer.levels().numpy(), np.arange(low, high + 1) - zero.reshape(-1, 1))
    loaded = quantizer_class(name)(scale.shape, batched=False).double()
    loaded.load_state_dict(quantizer.state_dict())
    assert torch.equal(loaded(torch.tensor(x)), torch.tensor(got))
    older = {**quantizer.state_dict(), "_extra_state": torch.tensor([low, high, 1])}
    loaded.load_state_dict(older)
    assert torch.equal(loaded.levels(), torch.arange(low, high + 1).double())


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("kind", ["signed", "unsigned"])
@pytest.mark.parametrize("offset", [0.0, -0.375, 1.0625])
@pytest.mark.parametrize("bits", BITS)
def test_lsq_plus_learns_scale_and_real_offset(bits, offset, kind, dtype):
    low, high = CODES[kind](bits)
    scale = np.array([0.25])
    quantizer = started("lsq+", scale, low, high, offset, True, dtype)
    assert (quantizer.low, quantizer.high) == (low, high)
    x = sample(scale, low, high, offset)[..., : 2 * (high - low) + 15]  # what float32 holds exactly
    grad = weights_like(x)
    _, value, grad_x, grad_scale, grad_offset = lsq(x, scale, low, high, grad, offset)
    got, got_x = run(quantizer, dtype, x, grad)
    assert np.array_equal(got, value)
    assert np.array_equal(got_x, grad_x)
    factor = 1 / np.sqrt(x[0].size * high)
    assert_sum(quantizer.scale.grad.double().numpy(), factor * grad_scale, dtype, (1,))
    got_offset, terms = quantizer.offset.grad.double().numpy(), factor * grad_offset
    # By way of (grad - grad_x), whose terms inside the range cancel only up to rounding.
    assert abs(got_offset - terms.sum()) < 100 * torch.finfo(dtype).eps * factor * np.abs(grad).sum()
    assert terms.any()


@pytest.mark.parametrize("name", ["lsq", "lsq+", "minifloat"])
def test_the_gradient_of_scale_and_offset_is_a_sum_over_images_whatever_the_batch(name):
    x = torch.randn(6, 4, 5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    quantizer = started(name, np.array([0.3]), 0, 15, -0.6, True)
    quantizer.significand_bits = 3  # of minifloat alone
    found = []
    for size in (1, 2, 6):
        quantizer.zero_grad()
        for part in x.split(size):
            quantizer(part).square().sum().backward()  # accumulates
        found.append([p.grad.item() for p in quantizer.parameters()])
    assert all(value != 0 for value in found[0])
    assert found[1] == pytest.approx(found[0], rel=1e-12)
    assert found[2] == pytest.approx(found[0], rel=1e-12)
    assert lsq_gradient_scale(100, 15) == pytest.approx(1500**-0.5)
    assert lsq_gradient_scale(100, 0) == pytest.approx(0.1)  # a range without positive codes


def test_a_scale_that_training_pushed_below_zero_counts_by_its_magnitude():
    x = np.random.default_rng(0).normal(0, 1, (2, 30))
    values, gradients = [], []
    for sign in (1, -1):
        quantizer = started("lsq", np.array([0.3]), -8, 7, 0.0, True)
        quantizer.scale.data *= sign
        values.append(run(quantizer, torch.float64, x, weights_like(x)))
        gradients.append(quantizer.scale.grad.item())
    assert all(np.array_equal(a, b) for a, b in zip(*values, strict=True))
    assert gradients[0] == -gradients[1]


@pytest.mark.parametrize(
    ("name", "batched"),
    [("lsq", False), ("lsq", True), ("lsq+", False), ("lsq+", True), ("codebook", False), ("minifloat", True)],
)
def test_an_unstarted_quantizer_returns_its_input(name, batched):
    quantizer = quantizer_class(name)((1,), batched=batched)
    assert not quantizer.initialised
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    assert quantizer(x) is x


@pytest.mark.parametrize("name", ["lsq", "lsq+"])
@pytest.mark.parametrize(("shape", "batched"), [((1,), True), ((5, 1, 1), False)])
def test_a_state_returns_exactly_and_nothing_starts_anew(name, shape, batched):
    generator = torch.Generator().manual_seed(0)
    original = quantizer_class(name)(shape, batched=batched)
    scale = torch.rand(shape, generator=generator) + 0.1
    offset = -3 * scale.reshape(-1)[:1] if batched else torch.zeros(1)
    original.start(Range(scale, 0, 15, offset))
    with torch.no_grad():  # as training leaves it, away from where it started
        for parameter in original.parameters():
            parameter.mul_(1.0371)
    stream = io.BytesIO()
    torch.save(original.state_dict(), stream)
    stream.seek(0)
    state = torch.load(stream, weights_only=True)
    loaded = quantizer_class(name)(shape, batched=batched)
    loaded.load_state_dict(state, strict=True)
    assert (loaded.low, loaded.high, loaded.initialised) == (original.low, original.high, True)
    assert all(torch.equal(state[key], value) for key, value in original.state_dict().items())
    x = torch.randn(5, 3, 4, generator=generator)
    for quantizer in (loaded, copy.deepcopy(loaded)):
        for values in (x * 100, x):  # in train mode, and after data of another range
            result = quantizer.train()(values)
        assert torch.equal(result, original(x))
        assert not torch.equal(result, x)
        assert all(torch.equal(state[key], value) for key, value in quantizer.state_dict().items())


def test_the_state_of_an_unstarted_quantizer_is_unstarted():
    quantizer = started("lsq", np.array([0.25]), -8, 7, 0.0, True, torch.float32)
    quantizer.load_state_dict(quantizer_class("lsq")((1,), batched=True).state_dict())
    x = torch.randn(2, 3)
    assert quantizer(x) is x


def test_a_state_of_another_granularity_or_kind_is_refused():
    channels = quantizer_class("lsq")((4, 1), batched=False)
    with pytest.raises(RuntimeError, match="size mismatch"):
        channels.load_state_dict(quantizer_class("lsq")((1,), batched=False).state_dict())
    with pytest.raises(RuntimeError, match="offset"):
        quantizer_class("lsq+")((1,), batched=True).load_state_dict(channels.state_dict())
