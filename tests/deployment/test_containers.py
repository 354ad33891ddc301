"""Weights in 4 bits: the runtime unpacks exactly the int8 codes that were packed."""

import copy

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from common.deployment.containers import Levels, compact, pack_weights


def graph(codes, scale, axis, operator="Conv", **attributes):
    """DequantizeLinear of int8 codes into a convolution without anything else."""
    weights = [numpy_helper.from_array(codes, "codes"), numpy_helper.from_array(scale, "scale")]
    nodes = [
        helper.make_node("DequantizeLinear", ["codes", "scale"], ["weight"], axis=axis),
        helper.make_node(operator, ["x", "weight"], ["y"], **attributes),
    ]
    channels = codes.shape[1 - axis]
    given = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, channels, 6, 6])
    made = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, codes.shape[axis], None, None])
    model = helper.make_model(
        helper.make_graph(nodes, "g", [given], [made], weights), opset_imports=[helper.make_opsetid("", 17)]
    )
    return onnx.version_converter.convert_version(model, 17)


def run(model, x):
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]


@pytest.mark.parametrize("shape", [(5, 3, 3, 3), (8, 4, 1, 1), (1, 1, 1, 1)])
@pytest.mark.parametrize("operator", ["Conv", "ConvTranspose"])
@pytest.mark.parametrize("kind", ["uniform", "codebook"])
def test_four_bit_weights_give_bit_for_bit_what_int8_ones_give(shape, operator, kind):
    random = np.random.default_rng(0)
    axis = int(operator == "ConvTranspose")
    outputs = shape[axis]
    if kind == "uniform":
        entries = None
        codes = random.integers(-8, 8, shape).astype(np.int8)
    else:
        books = np.sort([random.choice(np.arange(-127, 128), 16, replace=False) for _ in range(4)], 1).astype(np.int8)
        entries = books[random.integers(0, 4, outputs)]
        places = random.integers(0, 16, (outputs, int(np.prod(shape)) // outputs))
        moved = (outputs, *np.delete(shape, axis))
        codes = np.moveaxis(np.take_along_axis(entries, places, 1).reshape(moved), 0, axis)
    scale = random.random(outputs, dtype=np.float32) + 0.1
    plain = graph(np.ascontiguousarray(codes), scale, axis, operator)
    packed = pack_weights(copy.deepcopy(plain), {"codes": Levels(4, entries, axis)})
    x = random.random((1, shape[1 - axis], 6, 6), dtype=np.float32)
    assert np.array_equal(run(plain, x), run(packed, x))
    kinds = {t.name: t.data_type for t in packed.graph.initializer}
    assert kinds["codes.packed"] in (TensorProto.INT4, TensorProto.UINT4)
    stored = next(t for t in packed.graph.initializer if t.name == "codes.packed")
    assert len(stored.raw_data) == -(-codes.size // 2)


def test_weights_of_more_than_four_bits_stay_int8():
    plain = graph(np.zeros((2, 2, 1, 1), np.int8), np.ones(2, np.float32), 0)
    packed = pack_weights(copy.deepcopy(plain), {"codes": Levels(5, None, 0)})
    assert [t.data_type for t in packed.graph.initializer if t.name == "codes"] == [TensorProto.INT8]


def test_a_compact_graph_has_short_names_between_its_nodes_and_computes_the_same():
    x = np.random.default_rng(0).random((1, 3, 6, 6), dtype=np.float32)
    plain = graph(np.ones((2, 3, 1, 1), np.int8), np.ones(2, np.float32), 0)
    plain.graph.node[0].name = "dequantize"
    inner = helper.make_graph(  # a branch that reads a tensor around it
        [helper.make_node("Identity", ["weight"], ["w"])], "b", [], [helper.make_empty_tensor_value_info("w")]
    )
    plain.graph.initializer.append(numpy_helper.from_array(np.array(True), "yes"))
    branch = helper.make_node("If", ["yes"], ["chosen"], then_branch=inner, else_branch=copy.deepcopy(inner))
    plain.graph.node.insert(1, branch)
    plain.graph.node[2].input[1] = "chosen"
    small = compact(copy.deepcopy(plain))
    assert [node.output[0] for node in small.graph.node] == ["t0", "t1", "y"]
    assert small.graph.node[0].name == "dequantize"
    assert not small.graph.value_info
    assert np.array_equal(run(plain, x), run(small, x))
