"""Whether ONNX Runtime computes what the graph says: each node of its optimised graph by itself, in float64.

Codes from end to end can never be equal: one tie that rounds the other way spreads (the same module in a batch of two
agrees with itself in 76 to 95 % of its codes). A node by itself can be held exactly: the runtime's own input codes
through it, in float64, must give the runtime's own output codes.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from common.deployment.benchmark import instruction_sets
from common.deployment.runtime import onnxruntime_session
from common.runtime.environment import needed
from common.runtime.errors import UserError

# Codes that may differ, by one, since float32 in the runtime rounds a tie the other way: a share, and of a small graph,
# where this is less than one, a few. Another computation differs in far more of them.
ALLOWED, FEW = 1e-5, 3
TIE = 2**-15  # of a step: two units of float32 at code 255; nearer to the middle of two codes either one is right
FLOATING = ("Conv", "FusedConv", "ConvTranspose", "Gemm", "FusedGemm", "MatMul", "FusedMatMul")


@dataclass
class Parity:
    """What was compared and what came of it."""

    codes: int = 0
    differing: int = 0
    largest: int = 0  # difference of a code
    nodes: Counter[str] = field(default_factory=Counter)  # checked, by operator
    graph: Counter[str] = field(default_factory=Counter)  # all operators of the optimised graph
    floating: list[str] = field(default_factory=list)  # its nodes that multiply in float

    @property
    def passed(self) -> bool:
        """Whether the runtime computes the graph."""
        return self.codes > 0 and self.largest <= 1 and self.differing <= max(ALLOWED * self.codes, FEW)

    def as_json(self) -> dict[str, Any]:
        """For a file."""
        return asdict(self) | {"passed": self.passed, "nodes": dict(self.nodes), "graph": dict(self.graph)}


def check_nodes(path: Path, images: np.ndarray) -> Parity:
    """Runs ONNX Runtime's optimised graph on images [B, 3, H, W] and each integer node of it again in float64.

    Raises:
        UserError: the runtime cannot load the file.
    """
    onnx: Any = needed("onnx", "export")
    runtime: Any = needed("onnxruntime", "export")
    with TemporaryDirectory() as folder:
        optimised = Path(folder) / "optimised.onnx"
        onnxruntime_session(path, optimized_model_filepath=str(optimised))
        model = onnx.load(optimised)
        nodes = [node for node in model.graph.node if node.op_type in REFERENCES]
        constants = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
        names = list(
            dict.fromkeys(n for node in nodes for n in [*node.input, *node.output] if n and n not in constants)
        )
        given = {value.name for value in model.graph.input}
        own = {value.name for value in model.graph.output}
        asked = [name for name in names if name not in given | own]
        model.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in asked)
        watched = Path(folder) / "watched.onnx"
        onnx.save(model, watched)
        session = onnxruntime_session(watched, graph_optimization_level=runtime.GraphOptimizationLevel.ORT_DISABLE_ALL)
        result = Parity(graph=Counter(node.op_type for node in model.graph.node))
        # At this level the nodes still have names.
        level, fused = runtime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED, Path(folder) / "fused.onnx"
        onnxruntime_session(path, optimized_model_filepath=str(fused), graph_optimization_level=level)
        result.floating += [node.name for node in onnx.load(fused).graph.node if node.op_type in FLOATING]
        feed = {session.get_inputs()[0].name: images}
        found = dict(zip([o.name for o in session.get_outputs()], session.run(None, feed), strict=True))
    values = constants | found | feed
    for node in nodes:
        _compare(node, values, result, onnx)
    return result


def _compare(node: Any, values: Mapping[str, np.ndarray], result: Parity, onnx: Any) -> None:
    inputs = [values[name] if name else None for name in node.input]
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    actual = values[node.output[0]]
    difference = _difference(REFERENCES[node.op_type](inputs, attributes), actual)
    if difference.any() and node.op_type in ELEMENTWISE and actual.dtype.kind in "iu":
        # One input code whose value is a tie counts in each place where it stands, which may be any number of them.
        for shift in (-TIE, TIE):
            moved = REFERENCES[node.op_type](inputs, attributes | {"shift": shift})
            difference = np.where(difference == 1, np.minimum(difference, _difference(moved, actual)), difference)
    result.codes += difference.size
    result.differing += int(np.count_nonzero(difference))
    result.largest = max(result.largest, int(difference.max(initial=0)))
    result.nodes[node.op_type] += 1


def _difference(expected: np.ndarray, actual: np.ndarray) -> np.ndarray:
    found: np.ndarray = np.abs(expected.astype(np.int64) - actual.astype(np.int64))
    return found


def _real(codes: Any, scale: Any, zero: Any) -> np.ndarray:
    return (codes.astype(np.float64) - float(zero)) * np.float64(scale)


def _codes(x: np.ndarray, scale: Any, zero: Any, shift: float = 0.0) -> np.ndarray:
    """The nearest codes, of values that are moved by `shift` steps before."""
    if zero.dtype.kind != "i" and zero.dtype.kind != "u":
        return _float8(x / np.float64(scale))
    limits = np.iinfo(zero.dtype)
    return np.clip(np.rint(x / np.float64(scale) + shift) + float(zero), limits.min, limits.max)


def _float8(x: np.ndarray) -> np.ndarray:
    """The bytes of the nearest numbers of E4M3: four significand bits, from 2^-9 to 448 (arXiv 2209.05433)."""
    gap = np.exp2(np.maximum(np.frexp(np.abs(x))[1] - 1, -6) - 3)
    nearest = np.clip(np.rint(x / gap) * gap, -448, 448)
    return torch.from_numpy(nearest).float().to(torch.float8_e4m3fn).view(torch.uint8).numpy()


def _quantize(inputs: list[Any], attributes: Mapping[str, Any]) -> np.ndarray:
    x, scale, zero = inputs
    return _codes(x.astype(np.float64), scale.reshape(()), zero.reshape(()))


def _convolution(inputs: list[Any], attributes: Mapping[str, Any]) -> np.ndarray:
    x, x_scale, x_zero, w, w_scale, w_zero, y_scale, y_zero = inputs[:8]
    last = bool(attributes.get("channels_last", 0))
    x = np.moveaxis(x, -1, 1) if last else x
    rows = [-1, *[1] * (w.ndim - 1)]
    weight = w.astype(np.float64) - w_zero.astype(np.float64).reshape(rows if w_zero.size > 1 else -1)
    pads = attributes.get("pads", [0, 0, 0, 0])
    codes = F.pad(torch.from_numpy(x.astype(np.float64) - float(x_zero)), (pads[1], pads[3], pads[0], pads[2]))
    bias = torch.from_numpy(inputs[8].astype(np.float64)) if len(inputs) > 8 and inputs[8] is not None else None
    out = F.conv2d(
        codes,
        torch.from_numpy(weight),
        bias,
        tuple(attributes.get("strides", (1, 1))),
        0,
        tuple(attributes.get("dilations", (1, 1))),
        attributes.get("group", 1),
    ).numpy()
    scale = np.float64(x_scale) * w_scale.astype(np.float64).reshape([1, -1, 1, 1])
    y = _codes(out * scale, y_scale.reshape(()), y_zero.reshape(()))
    return np.moveaxis(y, 1, -1) if last else y


def _sigmoid(inputs: list[Any], attributes: Mapping[str, Any]) -> np.ndarray:
    x = _real(*inputs[:3])
    return _codes(1 / (1 + np.exp(-x)), inputs[3], inputs[4], attributes.get("shift", 0.0))


def _product(inputs: list[Any], attributes: Mapping[str, Any]) -> np.ndarray:
    return _codes(_real(*inputs[:3]) * _real(*inputs[3:6]), inputs[6], inputs[7], attributes.get("shift", 0.0))


def _sum(inputs: list[Any], attributes: Mapping[str, Any]) -> np.ndarray:
    return _codes(_real(*inputs[:3]) + _real(*inputs[3:6]), inputs[6], inputs[7], attributes.get("shift", 0.0))


def _concatenation(inputs: list[Any], attributes: Mapping[str, Any]) -> np.ndarray:
    scale, zero, *rest = inputs
    parts = [_real(*rest[i : i + 3]) for i in range(0, len(rest), 3)]
    return _codes(np.concatenate(parts, attributes["axis"]), scale, zero, attributes.get("shift", 0.0))


REFERENCES = {
    "QuantizeLinear": _quantize,
    "QLinearConv": _convolution,
    "QLinearSigmoid": _sigmoid,
    "QLinearMul": _product,
    "QLinearAdd": _sum,
    "QLinearConcat": _concatenation,
}
ELEMENTWISE = {"QLinearSigmoid", "QLinearMul", "QLinearAdd", "QLinearConcat"}


NO_VNNI = "this processor has no VNNI: use quantization.weight_bits=7 'quantization.eight_bit_roles=[]'"


def require(parity: Parity, path: Path) -> None:
    """Raises a UserError where the runtime computes something else."""
    if not parity.passed:
        share = parity.differing / max(parity.codes, 1)
        saturates = not {"avx512_vnni", "avx_vnni", "asimddp"} & set(instruction_sets())
        raise UserError(
            f"{path}: in ONNX Runtime {parity.differing} of {parity.codes} codes ({share:.1e}, allowed {ALLOWED:.0e}) "
            f"differ from the float64 reference, by up to {parity.largest} (allowed 1); "
            + (NO_VNNI if saturates else "try another size: --size")
        )
