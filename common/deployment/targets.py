"""What each runtime needs of a quantized detector, and what it cannot run."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from common.quantization.attention_inputs import rounded_attention_inputs
from common.quantization.layers import quantized_layers
from common.runtime.errors import UserError


@dataclass(frozen=True)
class Target:
    """A runtime. The facts are in docs/deployment.md, with how they were found."""

    name: str
    profile: str  # `quantization.profile` that it runs fast
    extension: str = ".onnx"
    signed: bool = False  # activations as int8 with zero point 0
    packed: bool = True  # whether it folds weights of 4 bits when it loads a graph


TARGETS = {
    target.name: target
    for target in (
        Target("onnxruntime", "full"),
        Target("openvino", "inputs", ".xml"),
        Target("opencv", "full", packed=False),
        Target("tensorrt", "inputs", signed=True, packed=False),
    )
}


@dataclass(frozen=True)
class Options:
    """Of one export."""

    target: str
    size: tuple[int, int]
    batch: int = 1
    dynamic: bool = False
    opset: int = 17
    container: str = "packed"  # or int8
    activations: int | None = None  # 8: minifloat inputs become uniform ones of 8 bits
    any_profile: bool = False


def check_target(module: nn.Module, target: Target, profile: str, *, any_profile: bool) -> None:
    """Whether the runtime can run the module.

    Args:
        module: from `load_quantized`.
        target: the runtime.
        profile: the placement that the module was quantized with.
        any_profile: whether a placement that is slow there is allowed.

    Raises:
        UserError: it cannot, and what to do instead.
    """
    if profile != target.profile and not any_profile:
        raise UserError(
            f"export: this run has quantization.profile={profile}; {target.name} is fast with {target.profile}; "
            f"run it again with quantization.profile={target.profile} (images are kept), or export with --any-profile"
        )
    found = next(_obstacles(module, target), None)
    if found:
        raise UserError(f"export: {found}")


def _obstacles(module: nn.Module, target: Target) -> Iterator[str]:
    for name, quantizer in _input_quantizers(module):
        if getattr(quantizer, "significand_bits", 0):
            yield (
                f"{name} has minifloat inputs, which no integer engine multiplies; run it again with 8-bit inputs "
                "(bits=w4a8), or export with --activations 8"
            )
        if getattr(quantizer, "offset", None) is not None:
            yield f"{name} has a real offset (lsq+), which ONNX cannot say; run again with quantization.quantizer=lsq"
        if not hasattr(quantizer, "low"):
            yield f"{name} has powers of two, which ONNX cannot say; run again with quantization.softmax_quantizer=same"
        elif target.signed and not -128 <= quantizer.low <= quantizer.high <= 127:
            yield (
                f"{name} has codes {quantizer.low} to {quantizer.high}, and {target.name} has int8 with zero point 0; "
                "run it again with quantization.activation_range=signed"
            )


def _input_quantizers(module: nn.Module) -> Sequence[tuple[str, Any]]:
    parts: dict[str, Any] = {**quantized_layers(module), **rounded_attention_inputs(module)}
    own = [(name, part.input_quantizer) for name, part in parts.items()]
    tensors: Any = getattr(module, "tensor_quantizers", None)
    between = list(tensors.items()) if tensors is not None else []
    return [(name, quantizer) for name, quantizer in [*own, *between] if quantizer is not None]
