"""A quantized detector whose quantizers are QuantizeLinear and DequantizeLinear nodes once it is traced to ONNX.

The fake-quantized module is the one source of where quantizers stand. Tracing it with the modules of this file in the
place of its quantizers and layers gives the graph, so that what was calibrated and trained is what is exported.
BatchNorm is folded into scales and biases: with k = gamma / sqrt(variance + eps), a channel's scale becomes scale * k
and its codes stay.
"""

import copy
import math
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.deployment.containers import Levels
from common.detection.detector import Detector
from common.quantization.fake_quant import fake_quantize
from common.quantization.layers import QuantLayer, keep_notes, output_axis, quantized_layers, rounded_attention_inputs
from common.runtime.errors import UserError

Codes = Literal["uint8", "int8", "either", "float8"]  # of activations; either: int8 where codes are symmetric
UNIT = 2.0**9  # FLOAT8E4M3 stores code n as n / 512: its numbers from there on are integers of 4 significand bits
FLOAT8_BITS = 4  # of a significand
# A runtime keeps a bias in 32 bits, in units of the scales of weights and input. Where BatchNorm makes a channel almost
# constant the units are too small for it, so its scale is at least this share of the bias (input scales: above 1e-4).
SHARE_OF_BIAS = 1 / (2.0**30 * 1e-4)
SMALLEST_SCALE = 1e-12  # of a channel that BatchNorm sets to a constant: a scale of 0 divides by zero


class _QuantizeDequantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        low, high = (torch.iinfo(zero_point.dtype).min, torch.iinfo(zero_point.dtype).max)
        codes = (torch.div(x, scale).round_() + zero_point).clamp_(low, high)
        return (codes - zero_point) * scale

    @staticmethod
    def symbolic(g: Any, x: Any, scale: Any, zero_point: Any) -> Any:
        return g.op("DequantizeLinear", g.op("QuantizeLinear", x, scale, zero_point), scale, zero_point)


class _Float8(torch.autograd.Function):
    """Traced as int8 with zero point 0; `containers.as_float8` gives it its type."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        return torch.div(x, scale).to(torch.float8_e4m3fn).to(x.dtype) * scale

    symbolic = _QuantizeDequantize.symbolic


class _Dequantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, codes: Tensor, scale: Tensor, zero_point: Tensor, axis: int) -> Tensor:
        return codes * scale.view([-1 if i == axis else 1 for i in range(codes.ndim)])

    @staticmethod
    def symbolic(g: Any, codes: Any, scale: Any, zero_point: Any, axis: int) -> Any:
        return g.op("DequantizeLinear", codes, scale, zero_point, axis_i=axis)


class QuantizeDequantize(nn.Module):
    """An activation through 8-bit codes: uint8 with a zero point, or symmetric int8.

    Fewer bits are 8-bit codes of values that are clipped before. Scale and zero point are scalars of shape []: with
    vectors of one element ONNX Runtime makes no QLinearMul and QLinearAdd.
    """

    scale: Tensor
    zero_point: Tensor

    def __init__(self, quantizer: Any, *, signed: bool = False) -> None:
        super().__init__()
        low, high = int(quantizer.low), int(quantizer.high)
        self.register_buffer("scale", quantizer.scale.detach().abs().float().reshape(()).clone())
        dtype, zero = (torch.int8, 0) if signed else (torch.uint8, -low)
        self.register_buffer("zero_point", torch.tensor(zero, dtype=dtype))
        full = (-128, 127) if signed else (0, 255)
        self.clipped = (low, high) if (low + zero, high + zero) != full else None

    def forward(self, x: Tensor) -> Tensor:
        if self.clipped:
            x = x.clamp(self.clipped[0] * float(self.scale), self.clipped[1] * float(self.scale))
        return _QuantizeDequantize.apply(x, self.scale, self.zero_point)


class Float8(nn.Module):
    """An activation through FLOAT8E4M3, exact for integers of at most four significand bits (see UNIT)."""

    scale: Tensor
    zero_point: Tensor

    def __init__(self, quantizer: Any) -> None:
        super().__init__()
        self.step = float(quantizer.scale.detach().abs())
        self.low, self.high = int(quantizer.low), int(quantizer.high)
        self.significand_bits = int(getattr(quantizer, "significand_bits", 0)) or FLOAT8_BITS
        self.register_buffer("scale", quantizer.scale.detach().abs().float().reshape(()) * UNIT)
        self.register_buffer("zero_point", torch.tensor(0, dtype=torch.int8))

    def forward(self, x: Tensor) -> Tensor:
        # Two operators: ONNX Runtime 1.32 cannot read a Clip before a QuantizeLinear to FP8.
        x = torch.maximum(torch.minimum(x, torch.tensor(self.high * self.step)), torch.tensor(self.low * self.step))
        if self.significand_bits < FLOAT8_BITS:  # its own rounding would keep more of them
            x = self._rounded(x / self.step) * self.step
        return _Float8.apply(x, self.scale, self.zero_point)

    def _rounded(self, x: Tensor) -> Tensor:
        """As `minifloat.round_to_minifloat`, in operators that ONNX has."""
        gap = torch.ones_like(x)
        for exponent in range(self.significand_bits, max(-self.low, self.high).bit_length()):
            gap = torch.where(x.abs() >= 2.0**exponent, 2.0 ** (exponent - self.significand_bits + 1), gap)
        return (x / gap).round() * gap


def activation(quantizer: Any, codes: Codes) -> nn.Module:
    """The traceable counterpart of a quantizer of activations."""
    if codes == "float8":
        return Float8(quantizer)
    around_zero = -128 <= quantizer.low < 0 and quantizer.high <= 127
    return QuantizeDequantize(quantizer, signed=codes == "int8" or (codes == "either" and around_zero))


class DequantizedLayer(nn.Module):
    """A quantized convolution, transposed convolution or linear layer of int8 codes, with BatchNorm folded in."""

    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    weight: Tensor  # in the place of codes, where it is in float
    bias: Tensor

    def __init__(
        self, name: str, layer: QuantLayer, batch_norm: nn.BatchNorm2d | None, input_quantizer: nn.Module | None
    ) -> None:
        """Raises UserError where a code has no negative, and a BatchNorm asks for it."""
        super().__init__()
        self.axis, self.layer = output_axis(layer), _Shape(layer)
        self.input_quantizer = input_quantizer
        weight = layer.weight.detach()
        factor, shift = _folded(batch_norm, layer.bias, weight.shape[self.axis])
        quantizer: Any = layer.weight_quantizer
        if quantizer is None:
            self.register_buffer("codes", None)
            self.register_buffer("weight", _along(weight, factor, self.axis))
        else:
            scale = quantizer.scale.detach().abs()
            codes = torch.div(quantizer(weight).detach(), scale).round()
            scale = scale.reshape(-1).expand(len(factor)) * factor
            sign = torch.where(scale < 0, -1.0, 1.0)
            self.levels = _levels(quantizer, sign, self.axis)
            codes = _along(codes, sign, self.axis)
            scale = scale.abs().clamp(min=SMALLEST_SCALE)
            wider = torch.maximum(scale, shift.abs() * SHARE_OF_BIAS)
            codes = self._nearest(codes, scale / wider)
            scale = wider
            if codes.max() > 127:
                raise UserError(
                    f"export: {name} has the code -128 before a BatchNorm of negative scale, and 8 bits have no +128; "
                    "run it again (weights of 8 bits are -127 to 127 now)"
                )
            self.register_buffer("codes", codes.to(torch.int8))
            self.register_buffer("scale", scale.float())
            self.register_buffer("zero_point", torch.zeros(len(factor), dtype=torch.int8))  # TensorRT asks for one
        self.register_buffer("bias", shift.float())

    def _nearest(self, codes: Tensor, factor: Tensor) -> Tensor:
        """Codes of channels that are almost constant, as multiples of a larger scale: times `factor`, at most 1."""
        rows, scaled = self.levels.entries, _along(codes, factor, self.axis)
        if rows is None:
            return scaled.round()
        for i in torch.nonzero(factor < 1).flatten().tolist():
            levels = torch.from_numpy(rows[i]).to(codes)
            channel = scaled.select(self.axis, i)
            channel.copy_(levels[(channel[..., None] - levels).abs().argmin(-1)])
        return scaled

    def forward(self, x: Tensor) -> Tensor:
        quantized = self.codes is not None
        weight = _Dequantize.apply(self.codes, self.scale, self.zero_point, self.axis) if quantized else self.weight
        return self.layer.run(x if self.input_quantizer is None else self.input_quantizer(x), weight, self.bias)


class _Shape:
    """What a layer does besides its weight and bias."""

    def __init__(self, layer: Any) -> None:
        self.kind = type(layer).__name__.removeprefix("Quant")
        if not isinstance(layer, nn.Linear):
            self.options = {name: getattr(layer, name) for name in ("stride", "padding", "dilation", "groups")}
        if isinstance(layer, nn.ConvTranspose2d):
            self.options["output_padding"] = layer.output_padding

    def run(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        if self.kind == "Linear":
            return F.linear(x, weight, bias)
        function: Any = F.conv_transpose2d if self.kind == "ConvTranspose2d" else F.conv2d
        return function(x, weight, bias, **self.options)


def traceable(detector: Detector, module: nn.Module, codes: Codes = "uint8") -> nn.Module:
    """A copy of a quantized (or float) module, BatchNorm folded, whose quantizers trace to QuantizeLinear nodes.

    Args:
        detector: the adapter of the module.
        module: in eval mode on the CPU; it is not changed.
        codes: of activations.
    """
    module = copy.deepcopy(module).eval()
    norms = {layer.convolution: layer.batch_norm for layer in detector.statistics_layers(module)}
    made: dict[int, nn.Module] = {}  # layers that read one tensor share one quantizer

    def quantizer_of(part: Any) -> nn.Module | None:
        found = part.input_quantizer
        if found is None:
            return None
        return made.setdefault(id(found), activation(found, codes))

    quantized = quantized_layers(module)
    for name, layer in list(module.named_modules()):
        norm: Any = module.get_submodule(norms[name]) if name in norms else None
        if name in quantized:
            new = DequantizedLayer(name, quantized[name], norm, quantizer_of(layer))
            _replace(module, name, keep_notes(layer, new))
        elif isinstance(layer, nn.Conv2d) and norm is not None:
            _replace(module, name, _folded_convolution(layer, norm))
    for name in norms.values():
        _replace(module, name, nn.Identity())
    for name, part in rounded_attention_inputs(module).items():
        _replace(module, name, quantizer_of(part) or nn.Identity())
    tensors: Any = getattr(module, "tensor_quantizers", None)
    if tensors is not None:
        for key, quantizer in tensors.items():
            tensors[key] = activation(quantizer, codes)
    return module


def weight_levels(module: nn.Module) -> dict[str, Levels]:
    """What the codes of each layer of a traceable module can be, by the name of the layer."""
    layers = ((n, m) for n, m in module.named_modules() if isinstance(m, DequantizedLayer))
    return {name: layer.levels for name, layer in layers if layer.codes is not None}


def as_eight_bits(module: nn.Module) -> None:
    """Gives minifloat inputs uniform codes of 8 bits over the same range, in place."""
    made: dict[int, nn.Module] = {}  # what was shared stays shared
    for layer in quantized_layers(module).values():
        found: Any = layer.input_quantizer
        if getattr(found, "significand_bits", 0):
            layer.input_quantizer = made.setdefault(id(found), _EightBits(found))


class _EightBits(nn.Module):
    """The range of another quantizer in 256 uniform codes, with an integer zero point."""

    def __init__(self, quantizer: Any) -> None:
        super().__init__()
        self.scale = nn.Parameter(quantizer.scale.detach().abs() * (quantizer.high - quantizer.low) / 255)
        zero = round(-quantizer.low * 255 / (quantizer.high - quantizer.low))
        self.low, self.high, self.initialised = -zero, 255 - zero, True

    def forward(self, x: Tensor) -> Tensor:
        return fake_quantize(x, self.scale, self.low, self.high)


def _levels(quantizer: Any, sign: Tensor, axis: int) -> Levels:
    """Of codes whose outputs have these signs [outputs]."""
    levels = quantizer.levels().detach()
    bits = math.ceil(math.log2(levels.shape[-1]))
    if levels.ndim == 1 and bool((levels.diff() == 1).all()):
        # The other sign of codes -8 to 7 is -7 to 8, of which 8 has no code of 4 bits.
        fits = bool((sign > 0).all())
        return Levels(bits if fits else 8, None, axis)
    rows = (levels.expand(len(sign), -1) * sign[:, None]).sort(1).values
    return Levels(bits, rows.round().to(torch.int8).numpy(), axis)


def _folded(norm: nn.BatchNorm2d | None, bias: Tensor | None, outputs: int) -> tuple[Tensor, Tensor]:
    """Factor and shift of each output [out] after BatchNorm."""
    shift = torch.zeros(outputs) if bias is None else bias.detach()
    if norm is None:
        return torch.ones(outputs), shift
    norm_: Any = norm
    factor = norm_.weight.detach().double() / (norm_.running_var.double() + norm_.eps).sqrt()
    return factor, (shift - norm_.running_mean.double()) * factor + norm_.bias.detach().double()


def _folded_convolution(layer: nn.Conv2d, norm: nn.BatchNorm2d) -> nn.Conv2d:
    factor, shift = _folded(norm, layer.bias, layer.out_channels)
    folded = copy.deepcopy(layer)
    folded.weight.data = _along(layer.weight.detach(), factor, 0).float()
    folded.bias = nn.Parameter(shift.float())
    return folded


def _along(x: Tensor, factor: Tensor, axis: int) -> Tensor:
    return x * factor.view([-1 if i == axis else 1 for i in range(x.ndim)])


def _replace(module: nn.Module, name: str, part: nn.Module) -> None:
    parent, _, own = name.rpartition(".")
    setattr(module.get_submodule(parent), own, part)
