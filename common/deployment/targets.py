"""What each runtime needs of a quantized detector, and what it cannot run."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import AfterValidator, ConfigDict, Field
from torch import nn

from common.checkpoints.strict_json import Strict, checked, read_strictly, short
from common.deployment.qdq import FLOAT8_BITS, Codes
from common.quantization.layers import quantized_layers, rounded_attention_inputs
from common.quantization.quantizers import logarithmic
from common.quantization.quantizers.minifloat import round_to_minifloat
from common.runtime.errors import UserError


@dataclass(frozen=True)
class Target:
    """A runtime. The facts are in docs/deployment.md, with how they were found."""

    name: str
    profile: str  # `quantization.profile` that it runs fast
    extension: str = ".onnx"
    codes: Codes = "uint8"  # of activations; int8 and float8 have zero point 0
    packed: bool = True  # whether it folds weights of 4 bits when it loads a graph
    strict: bool = False  # whether its graphs are held against the rules of `tensorrt.py`


TARGETS = {
    target.name: target
    for target in (
        Target("onnxruntime", "full"),
        Target("openvino", "inputs", ".xml", codes="either"),
        Target("opencv", "full", packed=False),
        Target("tensorrt", "inputs", codes="int8", packed=False, strict=True),
        Target("fp8", "inputs", codes="float8", packed=False, strict=True),
    )
}


OPSETS = range(17, 21)  # of ONNX, that an export may have
AGAIN = "repeat `zsqdet run` with run_dir=DIR (the synthetic images are used again) and "
FOR_FLOAT8 = "bits=w4a4 quantization.activation_levels=minifloat"
INPUTS_FOR_FLOAT8 = f"{AGAIN}{FOR_FLOAT8}, whose codes have few significand bits"


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


def _known(name: str) -> str:
    if name not in TARGETS:
        raise ValueError(f"found {short(name)}; allowed are {', '.join(TARGETS)}")
    return name


class _Options(Strict):
    """`Options` as export.json holds them; older versions wrote fewer."""

    model_config = ConfigDict(extra="ignore")

    target: Annotated[str, AfterValidator(_known)]
    size: Annotated[list[Annotated[int, Field(ge=1, le=8192)]], Field(min_length=2, max_length=2)]
    batch: Annotated[int, Field(ge=1, le=1024)] = 1
    dynamic: bool = False
    opset: Annotated[int, Field(ge=OPSETS[0], le=OPSETS[-1])] = OPSETS[0]
    container: Literal["packed", "int8"] = "packed"
    activations: Literal[8] | None = None
    any_profile: bool = False


def read_options(folder: Path) -> Options:
    """What the folder of an export was made with.

    Raises:
        UserError: export.json is missing or damaged.
    """
    path = folder / "export.json"
    found = checked(_Options, read_strictly(path), f"{path}: damaged").model_dump()
    return Options(**found | {"size": tuple(found["size"])})


def options_of(target: str, given: Mapping[str, Any]) -> Options:
    """Options from keyword arguments; without `size` it is that which the run evaluates at.

    Raises:
        UserError: one that there is not, or a value that it cannot have.
    """
    names = sorted({field.name for field in fields(Options)} - {"target"})
    unknown = sorted(set(given) - set(names))
    if unknown:
        raise UserError(f"export: found the option {unknown[0]}; allowed are {', '.join(names)}")
    shown = {name: list(value) if isinstance(value, tuple) else value for name, value in given.items()}
    found = checked(_Options, {"target": next(iter(TARGETS)), "size": [1, 1]} | shown, "export").model_dump()
    return Options(**found | {"target": target, "size": tuple(found["size"]) if "size" in given else (0, 0)})


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
        more = f" {FOR_FLOAT8}" if target.codes == "float8" else ""
        raise UserError(
            f"export: this run has quantization.profile={profile}; {target.name} is fast with {target.profile}; "
            f"{AGAIN}quantization.profile={target.profile}{more}, or export with --any-profile"
        )
    found = next(_obstacles(module, target), None)
    if found:
        raise UserError(f"export: {found}")


def _obstacles(module: nn.Module, target: Target) -> Iterator[str]:
    float8 = target.codes == "float8"
    for name, quantizer in _input_quantizers(module):
        if getattr(quantizer, "offset", None) is not None:
            yield f"{name} has a real offset (lsq+), which ONNX cannot say; {AGAIN}quantization.quantizer=lsq"
        if isinstance(quantizer, logarithmic.Quantizer):
            yield f"{name} has powers of two, which ONNX cannot say; {AGAIN}quantization.softmax_quantizer=same"
        elif float8:
            yield from _no_float8(f"the input of {name}", _codes(quantizer), INPUTS_FOR_FLOAT8)
        elif getattr(quantizer, "significand_bits", 0):
            yield (
                f"{name} has minifloat inputs, which no integer engine multiplies; {AGAIN}bits=w4a8 "
                "for 8-bit activations, or export with --activations 8"
            )
        elif target.codes == "int8" and not -128 <= quantizer.low <= quantizer.high <= 127:
            yield (
                f"{name} has codes {quantizer.low} to {quantizer.high}, and {target.name} has int8 with zero point 0; "
                f"{AGAIN}quantization.activation_range=symmetric"
            )
    for name, layer in quantized_layers(module).items():
        weights: Any = layer.weight_quantizer
        if float8 and (weights is None or layer.input_quantizer is None):
            yield f"{name} has a side in float, and FP8 multiplies FP8 only; give it bits for both, or float for both"
        elif float8:
            levels = sorted({round(float(n)) for n in weights.levels().flatten()})
            yield from _no_float8(f"the weight of {name}", levels, f"{AGAIN}uniform weights of 4 bits or codebook=fp8")


def _no_float8(what: str, codes: Iterable[int], advice: str) -> Iterator[str]:
    """Of codes that FLOAT8E4M3 has no number for: it has four significand bits."""
    wide = [n for n in codes if (abs(n) >> FLOAT8_BITS) and abs(n) % (1 << (abs(n).bit_length() - FLOAT8_BITS))]
    if wide:
        yield f"{what} has the code {wide[-1]}, which is no number of FP8 E4M3 (four significand bits); {advice}"


def _codes(quantizer: Any) -> Iterable[int]:
    """All codes of a quantizer of activations, rising."""
    numbers = torch.arange(quantizer.low, quantizer.high + 1, dtype=torch.float64)
    bits = getattr(quantizer, "significand_bits", 0)
    return sorted({int(n) for n in (round_to_minifloat(numbers, bits) if bits else numbers)})


def _input_quantizers(module: nn.Module) -> Sequence[tuple[str, Any]]:
    parts: dict[str, Any] = {**quantized_layers(module), **rounded_attention_inputs(module)}
    own = [(name, part.input_quantizer) for name, part in parts.items()]
    tensors: Any = getattr(module, "tensor_quantizers", None)
    between = list(tensors.items()) if tensors is not None else []
    return [(name, quantizer) for name, quantizer in [*own, *between] if quantizer is not None]
