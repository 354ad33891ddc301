"""Where the placement `full` puts quantizers, on small modules whose answer is known."""

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from common.quantization.tensors import Tensors, followed


class Block(nn.Module):
    def __init__(self, activation):
        super().__init__()
        self.conv, self.bn, self.act = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), activation

    def forward(self, x):
        return self.act(self.bn(self.conv(x)))


class Net(nn.Module):
    """A block, a residual, a split, pooling, upsampling and a join, in the manner of YOLO."""

    def __init__(self, activation=nn.SiLU):
        super().__init__()
        self.a, self.b, self.c = Block(activation()), Block(activation()), nn.Conv2d(2, 4, 1)
        self.head = nn.Conv2d(8, 3, 1)

    def forward(self, x):
        x = self.a(x)
        x = x + self.b(x)
        left, _ = x.chunk(2, 1)
        up = F.interpolate(F.max_pool2d(self.c(left), 2), scale_factor=2, mode="nearest")
        return self.head(torch.cat([up, x], 1)).sigmoid()


def names_of(net, layers):
    seen = []

    def visit(name, x):
        seen.append(name)
        return x

    net.eval()
    with torch.no_grad(), followed(net, set(layers), Tensors(visit)):
        net(torch.rand(1, 4, 8, 8))
    return seen


def test_outputs_activations_sums_and_joins_have_quantizers_and_what_moves_values_keeps_one():
    assert names_of(Net(), ["a.conv", "b.conv", "c"]) == [
        "a.conv/output", "a.act/silu/sigmoid", "a.act/silu",
        "b.conv/output", "b.act/silu/sigmoid", "b.act/silu",
        "/add", "c/output", "/concat",
    ]  # fmt: skip


def test_a_relu_is_part_of_the_convolution_before_it():
    assert names_of(Net(nn.ReLU), ["a.conv", "b.conv", "c"]) == [
        "a.act/relu", "b.act/relu", "/add", "c/output", "/concat"
    ]  # fmt: skip


def test_what_comes_out_of_a_float_layer_has_none():
    assert names_of(Net(), ["b.conv"]) == ["b.conv/output", "b.act/silu/sigmoid", "b.act/silu"]
    assert names_of(Net(), []) == []


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
def test_an_interpolation_that_blends_values_does_not_keep_a_quantizer(mode):
    class Up(Net):
        def forward(self, x):
            return F.interpolate(self.a(x), scale_factor=2, mode=mode) + 1

    assert names_of(Up(), ["a.conv"]) == ["a.conv/output", "a.act/silu/sigmoid", "a.act/silu"]


def test_a_tensor_that_two_read_passes_its_quantizer_once():
    class Twice(Net):
        def forward(self, x):
            x = self.c(x[:, :2])
            return torch.cat([x, x + x], 1)

    assert names_of(Twice(), ["c"]) == ["c/output", "/add", "/concat"]


def test_moved_values_are_visited_again_where_a_graph_is_traced():
    seen = []
    net = Net().eval()
    mode = Tensors(lambda name, x: seen.append(name) or x, repeat=True)
    with torch.no_grad(), followed(net, {"a.conv", "b.conv", "c"}, mode):
        net(torch.rand(1, 4, 8, 8))
    assert seen.count("/add") == 3  # itself and the two parts of the split
    assert seen.count("c/output") == 3  # itself, pooled, upsampled


def test_one_activation_that_many_layers_share_counts_as_one_of_each():
    net = Net()
    net.b.act = net.a.act
    names = names_of(net, ["a.conv", "b.conv"])
    assert {"a.act/silu", "b.act/silu"} <= set(names)


def test_the_quantizers_see_the_same_tensors_in_a_part_that_runs_alone():
    net, seen = Net().eval(), []
    with torch.no_grad(), followed(net, {"a.conv"}, Tensors(lambda name, x: seen.append(name) or x)):
        net.a(torch.rand(1, 4, 8, 8))
    assert seen == ["a.conv/output", "a.act/silu/sigmoid", "a.act/silu"]


OPERATORS = {  # the rows of docs/deployment.md
    "SiLU": F.silu,
    "ReLU": F.relu,
    "addition of two such tensors": lambda x: x + x,
    "concatenation of such tensors": lambda x: torch.cat([x, x], 1),
    "max pooling": lambda x: F.max_pool2d(x, 2),
    "nearest upsampling": lambda x: F.interpolate(x, scale_factor=2, mode="nearest"),
    "slice, split": lambda x: x.chunk(2, 1)[0][:, :1],
    "reshape, transpose": lambda x: x.flatten(2).transpose(1, 2),
    "bilinear upsampling": lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"),
    "sigmoid alone, softmax, matrix product": lambda x: x.sigmoid().softmax(1) @ x,
}
MEANING = {  # names of the tensors with quantizers, and whether what comes out has one
    (
        ("c/output", "/silu/sigmoid", "/silu"),
        True,
    ): "a quantizer before it, behind the sigmoid (1/256, zero point 0) and behind the product",
    (("/relu",), True): "a quantizer behind it",
    (("c/output", "/add"), True): "a quantizer before it and behind it",
    (("c/output", "/concat"), True): "a quantizer before it and behind it",
    (("c/output",), True): "a quantizer before it, kept",
    ((), False): "float",
}


@pytest.mark.parametrize("operator", OPERATORS)
def test_the_table_of_the_page_is_what_the_rules_do(operator):
    class One(nn.Module):
        def __init__(self):
            super().__init__()
            self.c = nn.Conv2d(4, 4, 1)

        def forward(self, x):
            out = OPERATORS[operator](self.c(x))
            kept.append(getattr(out, "_quantizer", None) is not None)
            return out

    kept = []
    full = MEANING[(tuple(names_of(One(), ["c"])), kept[-1])]
    page = (Path(__file__).parents[2] / "docs/deployment.md").read_text(encoding="utf-8")
    assert f"| {operator} | float | {full} |" in page
