"""The check of single nodes: it passes what ONNX Runtime computes, and sees a graph that computes something else."""

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from common.deployment import parity
from common.deployment.parity import Parity, check_nodes, require
from common.deployment.qdq import _QuantizeDequantize
from common.runtime.errors import UserError


class Small(nn.Module):
    """Two branches of a convolution with SiLU, added and joined, every tensor in 8 bits."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, groups=2, stride=1)

    def rounded(self, x, scale, zero):
        return _QuantizeDequantize.apply(x, torch.tensor(scale), torch.tensor(zero, dtype=torch.uint8))

    def convolution(self, layer, x):
        scale = layer.weight.detach().abs().amax((1, 2, 3)) / 127
        codes = (layer.weight.detach() / scale.view(-1, 1, 1, 1)).round().to(torch.int8)
        from common.deployment.qdq import _Dequantize

        weight = _Dequantize.apply(codes, scale, torch.zeros(len(scale), dtype=torch.int8), 0)
        return torch.nn.functional.conv2d(x, weight, layer.bias, layer.stride, layer.padding, 1, layer.groups)

    def silu(self, x):
        x = self.rounded(x, 0.02, 100)
        return self.rounded(x * self.rounded(torch.sigmoid(x), 1 / 256, 0), 0.01, 28)

    def forward(self, images):
        a = self.silu(self.convolution(self.first, self.rounded(images, 1 / 255, 0)))
        b = self.silu(self.convolution(self.second, a))
        return torch.cat([self.rounded(self.rounded(a + b, 0.02, 28), 0.02, 28), a], 1)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    path = tmp_path_factory.mktemp("graph") / "small.onnx"
    example = torch.rand(1, 3, 16, 16)
    torch.onnx.export(Small().eval(), (example,), str(path), input_names=["images"], opset_version=17, dynamo=False)
    return path, example.numpy()


def test_every_integer_node_of_the_runtime_agrees_with_float64(exported):
    found = check_nodes(*exported)
    assert found.passed
    assert found.largest <= 1
    assert found.nodes["QLinearConv"] == 2
    assert {"QLinearSigmoid", "QLinearMul", "QLinearAdd"} <= set(found.nodes)
    require(found, exported[0])


def test_a_runtime_that_rounds_otherwise_is_found(exported, monkeypatch):
    def off(inputs, attributes):
        return parity._sigmoid(inputs, attributes) + 1

    monkeypatch.setitem(parity.REFERENCES, "QLinearSigmoid", off)
    found = check_nodes(*exported)
    assert not found.passed
    with pytest.raises(UserError, match=r"small.onnx: ONNX Runtime gives \d+ of \d+ codes otherwise"):
        require(found, exported[0])


def test_a_graph_without_any_integer_node_is_not_passed(tmp_path):
    x = onnx.helper.make_tensor_value_info("images", onnx.TensorProto.FLOAT, [1, 3, 4, 4])
    y = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1, 3, 4, 4])
    node = onnx.helper.make_node("Relu", ["images"], ["y"])
    opset = [onnx.helper.make_opsetid("", 17)]
    onnx.save(
        onnx.helper.make_model(onnx.helper.make_graph([node], "g", [x], [y]), opset_imports=opset, ir_version=9),
        tmp_path / "a.onnx",
    )
    assert not check_nodes(tmp_path / "a.onnx", np.zeros((1, 3, 4, 4), np.float32)).passed
    assert not Parity().passed


@pytest.mark.parametrize(("codes", "differing", "passed"), [(65536, 1, True), (65536, 4, False), (10**6, 10, True)])
def test_a_tie_in_a_small_graph_is_no_other_computation(codes, differing, passed):
    assert Parity(codes, differing, largest=1).passed is passed
    assert not Parity(codes, differing, largest=2).passed
