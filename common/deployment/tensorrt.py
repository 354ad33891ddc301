"""The rules that TensorRT has for a graph with QuantizeLinear and DequantizeLinear nodes; `--to tensorrt` keeps them.

From NVIDIA's documentation ("Explicit Quantization", "Q/DQ Layer-Placement Recommendations") and the checks of its ONNX
parser (github.com/onnx/onnx-tensorrt, `QuantDequantLinearHelper`). Some a parser refuses, others make a graph slow.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from common.runtime.environment import needed
from common.runtime.errors import UserError

OPSETS = range(13, 25)  # from per-channel scales to what TensorRT 11 reads
FLOAT8_OPSET = 19
QUANTIZE, DEQUANTIZE = "QuantizeLinear", "DequantizeLinear"
WEIGHTED = {"Conv": 0, "Gemm": 0, "ConvTranspose": 1}  # and the axis of the weight that counts its outputs
GATES = {"Relu", "Sigmoid", "Mul", "Clip", "LeakyRelu", "HardSwish", "HardSigmoid"}  # fused with the layer before them


class _Graph:
    def __init__(self, model: Any) -> None:
        onnx: Any = needed("onnx", "export")
        self.kinds = onnx.TensorProto
        self.opset = next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
        self.nodes = list(model.graph.node)
        self.constants = {t.name: t for t in model.graph.initializer}
        self.constants |= {n.output[0]: n.attribute[0].t for n in self.nodes if n.op_type == "Constant"}
        self.maker = {name: node for node in self.nodes for name in node.output}
        self.readers: dict[str, list[Any]] = {}
        for node in self.nodes:
            for name in node.input:
                self.readers.setdefault(name, []).append(node)
        self.pairs = [node for node in self.nodes if node.op_type in (QUANTIZE, DEQUANTIZE)]
        self.value = onnx.numpy_helper.to_array
        self.type_name = onnx.TensorProto.DataType.Name

    def made_by(self, name: str, kind: str) -> Any | None:
        """The node of this kind that a tensor comes out of."""
        node = self.maker.get(name)
        return node if node is not None and node.op_type == kind else None

    def array(self, name: str) -> np.ndarray:
        return np.asarray(self.value(self.constants[name])).astype(np.float64)

    def axis(self, node: Any) -> int:
        return next((a.i for a in node.attribute if a.name == "axis"), 1)


def _opset(graph: _Graph) -> Iterator[str]:
    if graph.opset not in OPSETS:
        yield f"opset {graph.opset}; allowed are {OPSETS[0]} to {OPSETS[-1]}"
    kinds = {graph.constants[n.input[2]].data_type for n in graph.pairs if _has_zero_point(graph, n)}
    if graph.kinds.FLOAT8E4M3FN in kinds and graph.opset < FLOAT8_OPSET:
        yield f"FP8 with opset {graph.opset}; it needs {FLOAT8_OPSET}"
    if {graph.kinds.FLOAT8E4M3FN, graph.kinds.INT8} <= kinds:
        yield "INT8 and FP8 in one graph"


def _zero_points(graph: _Graph) -> Iterator[str]:
    for node in graph.pairs:
        if not _has_zero_point(graph, node):
            yield f"{node.name} has no constant zero point"
            continue
        zero = graph.constants[node.input[2]]
        if zero.data_type not in (graph.kinds.INT8, graph.kinds.FLOAT8E4M3FN):
            yield f"{node.name} is {graph.type_name(zero.data_type)}; allowed are INT8 and FLOAT8E4M3FN"
        elif graph.array(node.input[2]).any():
            yield f"{node.name} has a zero point that is not 0"


def _scales(graph: _Graph) -> Iterator[str]:
    for node in graph.pairs:
        if node.input[1] not in graph.constants:
            yield f"{node.name} has a scale that is not constant"
            continue
        scale = graph.array(node.input[1])
        if not (np.isfinite(scale).all() and (scale > 0).all()):
            yield f"{node.name} has a scale that is not positive"
        elif scale.size > 1 and node.input[0] not in graph.constants:
            yield f"{node.name} has {scale.size} scales; activations have one"


def _weights(graph: _Graph) -> Iterator[str]:
    for name, tensor in graph.constants.items():
        if tensor.data_type in (graph.kinds.INT4, graph.kinds.UINT4):
            yield f"{name} is {graph.type_name(tensor.data_type)}, which TensorRT has for matrix products only"
    for node in graph.nodes:
        weight = graph.made_by(node.input[1], DEQUANTIZE) if node.op_type in WEIGHTED else None
        if weight is None or weight.input[1] not in graph.constants or graph.array(weight.input[1]).size == 1:
            continue
        if graph.axis(weight) != WEIGHTED[node.op_type]:
            yield f"{weight.name} has scales along axis {graph.axis(weight)}; {node.op_type} has its outputs on another"


def _pairs(graph: _Graph) -> Iterator[str]:
    for node in graph.pairs:
        if node.op_type == QUANTIZE and any(r.op_type != DEQUANTIZE for r in graph.readers.get(node.output[0], [])):
            yield f"{node.name} is read by something else than DequantizeLinear"
        stored = node.op_type == QUANTIZE or node.input[0] in graph.constants
        if not stored and graph.made_by(node.input[0], QUANTIZE) is None:
            yield f"{node.name} reads neither a QuantizeLinear nor a constant"


def _both_sides(graph: _Graph) -> Iterator[str]:
    for node in graph.nodes:
        if node.op_type not in WEIGHTED:
            continue
        sides = [graph.made_by(name, DEQUANTIZE) is not None for name in node.input[:2]]
        if sides[1] and not sides[0]:
            yield f"{node.name} has a quantized weight and an input in float"
        if len(node.input) > 2 and graph.made_by(node.input[2], DEQUANTIZE) is not None:
            yield f"{node.name} has a quantized bias; biases are float"


def _gates(graph: _Graph) -> Iterator[str]:
    for node in graph.nodes:
        if node.op_type not in WEIGHTED:
            continue
        for quantize in graph.readers.get(node.output[0], []):
            if quantize.op_type != QUANTIZE:
                continue
            behind = [
                r for dq in graph.readers.get(quantize.output[0], []) for r in graph.readers.get(dq.output[0], [])
            ]
            if any(reader.op_type in GATES for reader in behind):
                yield f"{quantize.name} stands between {node.name} and its activation, which are one kernel without it"


def _joins(graph: _Graph) -> Iterator[str]:
    for node in graph.nodes:
        parts = [graph.made_by(name, DEQUANTIZE) for name in node.input] if node.op_type == "Concat" else []
        if parts and all(part is not None and part.input[1] in graph.constants for part in parts):
            scales = {graph.array(part.input[1]).tobytes() for part in parts if part is not None}
            if len(scales) > 1:
                yield f"{node.name} joins tensors of {len(scales)} scales; it needs one"


RULES: dict[str, Callable[[_Graph], Iterator[str]]] = {
    "opset": _opset,
    "symmetric codes": _zero_points,
    "scales": _scales,
    "weights": _weights,
    "pairs": _pairs,
    "both sides of a layer": _both_sides,
    "nothing between a layer and its activation": _gates,
    "one scale for a concatenation": _joins,
}


def broken_rules(model: Any) -> list[tuple[str, str]]:
    """The name of the rule and what breaks it, for each place of an ONNX model; none where TensorRT can take it."""
    graph = _Graph(model)
    return [(name, found) for name, rule in RULES.items() for found in rule(graph)]


def require_rules(model: Any) -> None:
    """Raises a UserError where a graph breaks a rule of TensorRT."""
    broken = broken_rules(model)
    if broken:
        rule, place = broken[0]
        raise UserError(
            f"export: TensorRT's rule '{rule}' is broken: {place} ({len(broken)} places in all); "
            "repeat `zsqdet run` with run_dir=DIR quantization.profile=inputs quantization.activation_range=symmetric"
        )


def _has_zero_point(graph: _Graph, node: Any) -> bool:
    return len(node.input) > 2 and node.input[2] in graph.constants
