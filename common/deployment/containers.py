"""Weights of at most 4 bits stored in 4 bits, and unpacked to the int8 codes that the runtime multiplies.

A runtime folds what only depends on constants when it loads a graph, so the unpacking costs nothing afterwards, and the
file gives bit for bit what the one with int8 codes gives. Uniform codes are INT4 -> Cast(INT8). Codebook codes are
UINT4 indices -> Cast(INT32) -> Add(first entry of the channel's codebook) -> Gather(entries INT8). Both need operators
of opset 21 (ONNX Runtime 1.24 and later, OpenVINO 2025 and later); an INT4 DequantizeLinear would run in float.
OpenVINO's converter folds them as well, so its model is packed anew. Tables of cell centers and strides take a byte
for each number.
"""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from common.runtime.environment import needed

OPSET = 21
LEAST = 256  # weights for which the description of their unpacking takes less than they do
FLOAT8_OPSET = 19  # the first with FLOAT8E4M3
QUANTIZERS = ".tensor_quantizers."  # in the names of their tensors
PLACE = re.compile("^/outputs/module/(.*/(?=[^/]+:))?")  # colons: the path of a module in the name of a quantizer


@dataclass(frozen=True)
class Levels:
    """What the codes of a layer can be."""

    bits: int
    entries: np.ndarray | None  # [outputs, 2^bits] rising int8 of a codebook; None where they are uniform
    axis: int  # that counts the outputs


def pack_weights(model: Any, layers: Mapping[str, Levels]) -> Any:
    """The model with packed weights.

    Args:
        model: ONNX, with int8 initializers.
        layers: by the name of the initializer that holds a layer's codes; those of more than 4 bits stay as they are.
    """
    onnx: Any = needed("onnx", "export")
    model = onnx.version_converter.convert_version(model, OPSET)
    graph, nodes = model.graph, []
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    for name, levels in layers.items():
        if levels.bits > 4:
            continue
        codes = onnx.numpy_helper.to_array(tensors[name])
        graph.initializer.remove(tensors[name])
        made = _uniform(onnx, name, codes) if levels.entries is None else _codebook(onnx, name, codes, levels)
        graph.initializer.extend(made[0])
        nodes += made[1]
    for tensor in list(graph.initializer):
        if tensor.data_type == onnx.TensorProto.FLOAT and (halves := _halves(onnx, tensor)):
            graph.initializer.remove(tensor)
            graph.initializer.extend(halves[0])
            nodes += halves[1]
    for node in reversed(nodes):
        graph.node.insert(0, node)
    onnx.checker.check_model(model)
    return model


def compact(model: Any) -> Any:
    """The model without what costs bytes and says nothing: shapes between nodes, long names of the tensors there and of
    the scales and zero points of activations, and the place in the name of a node that has its quantizer's as well.

    Weights, inputs and outputs keep their names. A tenth of a file with weights of 4 bits.
    """
    graph = model.graph
    kept = {value.name for value in graph.output}
    made = [name for node in graph.node for name in node.output if name and name not in kept]
    short = {name: f"t{i}" for i, name in enumerate(made)}
    short |= {t.name: f"q{i}" for i, t in enumerate(graph.initializer) if QUANTIZERS in t.name}
    _rename(graph, short)
    for tensor in graph.initializer:
        tensor.name = short.get(tensor.name, tensor.name)
    uses: Counter[str] = Counter()
    for node in filter(lambda node: node.name, graph.node):
        name = PLACE.sub("", node.name)
        node.name = name + (f"_{uses[name]}" if uses[name] else "")
        uses[name] += 1
    del graph.value_info[:]
    return model


def with_own_zero_points(model: Any) -> Any:
    """The model with a zero point for each weight where several shared one.

    On a processor without VNNI ONNX Runtime makes UINT8 of the weights, and fails where it meets a zero point twice.
    """
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    met = {node.input[2] for node in model.graph.node if node.op_type == "QuantizeLinear" and len(node.input) > 2}
    for node in model.graph.node:
        if node.op_type != "DequantizeLinear" or len(node.input) < 3 or node.input[2] not in tensors:
            continue
        name = node.input[2]
        if node.input[0] not in tensors and not tensors[name].dims:  # an activation
            continue
        if name in met:
            own = model.graph.initializer.add()
            own.CopyFrom(tensors[name])
            own.name = node.input[2] = f"{node.output[0]}_zero_point"
        met.add(name)
    return model


def _rename(graph: Any, names: Mapping[str, str]) -> None:
    """Also where the graphs inside an If or a Loop read them."""
    for node in graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]
        for attribute in node.attribute:
            for inner in [*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs]:
                _rename(inner, names)
                for value in inner.output:
                    value.name = names.get(value.name, value.name)


def as_float8(model: Any) -> Any:
    """The model with FLOAT8E4M3 in the place of its int8 codes and zero points; every code is one of its numbers."""
    import torch  # here, since what converts for OpenVINO needs no torch and takes no seconds for it

    onnx: Any = needed("onnx", "export")
    model = onnx.version_converter.convert_version(model, FLOAT8_OPSET)
    tensors = list(model.graph.initializer)
    tensors += [node.attribute[0].t for node in model.graph.node if node.op_type == "Constant"]
    for tensor in tensors:
        if tensor.data_type == onnx.TensorProto.INT8:
            codes = torch.tensor(onnx.numpy_helper.to_array(tensor)).float()
            numbers = codes.to(torch.float8_e4m3fn)
            if not torch.equal(numbers.float(), codes):
                raise ValueError(f"{tensor.name}: has codes that FLOAT8E4M3 has not")
            packed = numbers.view(torch.uint8).numpy().tobytes()
            kind = onnx.TensorProto.FLOAT8E4M3FN
            tensor.CopyFrom(onnx.helper.make_tensor(tensor.name, kind, codes.shape, packed, raw=True))
    del model.graph.value_info[:]  # they have the old types
    onnx.checker.check_model(model)
    return model


def _uniform(onnx: Any, name: str, codes: np.ndarray) -> tuple[list[Any], list[Any]]:
    packed = onnx.helper.make_tensor(f"{name}.packed", onnx.TensorProto.INT4, codes.shape, _packed(codes), raw=True)
    return [packed], [onnx.helper.make_node("Cast", [packed.name], [name], to=onnx.TensorProto.INT8)]


def _codebook(onnx: Any, name: str, codes: np.ndarray, levels: Levels) -> tuple[list[Any], list[Any]]:
    assert levels.entries is not None
    entries, book = np.unique(levels.entries, axis=0, return_inverse=True)
    rows = np.moveaxis(codes, levels.axis, 0).reshape(codes.shape[levels.axis], -1)
    found = np.stack([np.searchsorted(e, row) for e, row in zip(levels.entries, rows, strict=True)])
    shape = np.moveaxis(codes, levels.axis, 0).shape
    index = np.moveaxis(found.reshape(shape), 0, levels.axis)
    first = (book.reshape(-1) * entries.shape[1]).astype(np.int32)
    first = first.reshape([-1 if i == levels.axis else 1 for i in range(codes.ndim)])
    helper, kinds = onnx.helper, onnx.TensorProto
    narrow = first.astype(np.min_scalar_type(int(first.max())))  # its own cast takes less than what it saves
    tensors = [
        helper.make_tensor(f"{name}.packed", kinds.UINT4, codes.shape, _packed(index), raw=True),
        onnx.numpy_helper.from_array(narrow, f"{name}.first"),
        onnx.numpy_helper.from_array(entries.astype(np.int8).reshape(-1), f"{name}.entries"),
    ]
    nodes = [
        helper.make_node("Cast", [f"{name}.packed"], [f"{name}.index"], to=kinds.INT32),
        helper.make_node("Cast", [f"{name}.first"], [f"{name}.shift"], to=kinds.INT32),
        helper.make_node("Add", [f"{name}.index", f"{name}.shift"], [f"{name}.place"]),
        helper.make_node("Gather", [f"{name}.entries", f"{name}.place"], [name]),
    ]
    return tensors, nodes


def _halves(onnx: Any, tensor: Any) -> tuple[list[Any], list[Any]] | None:
    """A float constant whose values are halves of bytes, such as the centers of a detector's cells, out of one byte
    each. None for another one, and for a small one."""
    values = onnx.numpy_helper.to_array(tensor)
    codes = (values * 2).astype(np.uint8) if values.size >= LEAST and values.min() >= 0 and values.max() < 128 else None
    if codes is None or not np.array_equal(codes / np.float32(2), values):
        return None
    name, helper = tensor.name, onnx.helper
    tensors = [
        onnx.numpy_helper.from_array(codes, f"{name}.halves"),
        onnx.numpy_helper.from_array(np.float32(0.5), f"{name}.half"),
    ]
    nodes = [
        helper.make_node("Cast", [f"{name}.halves"], [f"{name}.cast"], to=onnx.TensorProto.FLOAT),
        helper.make_node("Mul", [f"{name}.cast", f"{name}.half"], [name]),
    ]
    return tensors, nodes


def _packed(values: np.ndarray) -> bytes:
    """Two 4-bit values to a byte, the first one in the low half (ONNX, onnx.proto: raw_data of INT4)."""
    flat = (values.reshape(-1).astype(np.int64) & 0xF).astype(np.uint8)
    flat = np.append(flat, np.zeros(len(flat) % 2, np.uint8))
    return bytes(flat[::2] | (flat[1::2] << 4))


def save_openvino(graph: str, out: str) -> None:
    """Writes the OpenVINO pair of an ONNX file; int8 weights with at most 16 codes in a channel take 4 bits."""
    openvino: Any = needed("openvino", "export")
    model = openvino.convert_model(graph)
    for constant in model.get_ordered_ops():
        if constant.get_type_name() != "Constant" or constant.get_element_type() != openvino.Type.i8:
            continue
        codes = np.array(constant.data)
        found: Any = _from_4_bits(openvino, codes) if codes.ndim > 1 and codes.size >= LEAST else None
        if found is not None:
            for reader in list(constant.output(0).get_target_inputs()):
                reader.replace_source_output(found.output(0))
    openvino.save_model(model, out, compress_to_fp16=False)


def _from_4_bits(openvino: Any, codes: np.ndarray) -> Any:
    """The node that gives the codes [outputs, ...] out of UINT4, which count from the lowest code of a channel or, of a
    codebook, are indices of its entries. None where a channel has more than 16 codes."""
    ops: Any = openvino.opset8
    rows = codes.reshape(len(codes), -1)
    each = (-1, *[1] * (codes.ndim - 1))
    above = rows.astype(np.int16) - rows.min(1, keepdims=True)

    def stored(values: np.ndarray, kind: str) -> Any:
        tensor = openvino.Tensor(openvino.Type.u4, list(codes.shape))
        tensor.data[:] = np.frombuffer(_packed(values), np.uint8)
        return ops.convert(openvino.op.Constant(tensor), kind)

    if above.max() < 16:
        return ops.add(stored(above, "i8"), ops.constant(rows.min(1).reshape(each)))
    entries = [np.unique(row) for row in rows]
    if max(map(len, entries)) > 16:
        return None
    table = np.stack([np.pad(row, (0, 16 - len(row)), mode="edge") for row in entries])
    index = np.stack([np.searchsorted(own, row) for own, row in zip(entries, rows, strict=True)])
    place = ops.add(stored(index, "i32"), ops.constant(np.arange(len(rows), dtype=np.int32).reshape(each) * 16))
    return ops.gather(ops.constant(table.reshape(-1)), place, ops.constant(np.int64(0)))
