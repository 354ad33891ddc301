"""What is checked of a graph and its folder: single nodes, foreign or damaged graphs, folders whole or not at all."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import onnx
import onnxslim
import pytest
import torch
from onnx import TensorProto, helper
from PIL import Image
from torch import nn

from common.checkpoints.read import load_own
from common.cli import main
from common.deployment import graph as graphs
from common.deployment import parity
from common.deployment.containers import with_own_zero_points
from common.deployment.folder import new_folder
from common.deployment.graph import Shape, export_graph
from common.deployment.parity import Parity, check_nodes, require
from common.deployment.qdq import _QuantizeDequantize
from common.deployment.runtime import RuntimeModule, _metadata_file, load_exported, open_session
from common.detection.detector import load_detector
from common.runtime.errors import UserError
from common.runtime.files import own_prefix

MICRO = Path(__file__).parents[2] / "tools/shapes/micro_yolo11.safetensors"
IMAGES = [1, 3, 64, 64]


def graph(path, nodes, inputs, outputs, classes=10, constants=()):
    """An ONNX file whose metadata say that it is the micro detector with so many classes."""
    architecture = load_own(MICRO, "yolo11")[1]
    yaml = architecture["yaml"] | {"nc": classes}
    about = {"family": "yolo11", "architecture": {"yaml": yaml, "names": [f"c{i}" for i in range(classes)]}}
    rows = [
        [helper.make_tensor_value_info(f"{kind}{i}", TensorProto.FLOAT, shape) for i, shape in enumerate(shapes)]
        for kind, shapes in (("x", inputs), ("y", outputs))
    ]
    made = helper.make_graph(nodes, "g", *rows, list(constants))
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    helper.set_model_props(model, {"zsqdet": json.dumps(about)})
    onnx.save(model, path)
    return path


def constant(path, values, classes=10):
    """A graph that answers the same to every image."""
    content = onnx.numpy_helper.from_array(values.astype(np.float32), "value")
    nodes = [helper.make_node("Identity", ["value"], ["y0"])]
    return graph(path, nodes, [IMAGES], [list(values.shape)], classes, [content])


def detect(path):
    detector, module = load_exported(path)
    return detector.detect(module, torch.zeros(IMAGES), 0.25, 0.7, 10)


SAME = [helper.make_node("Identity", ["x0"], ["y0"])]
INPUTS = {
    "a vector": [[1, 3]],
    "no axes": [[]],
    "one channel": [[1, 1, 64, 64]],
    "two images": [IMAGES, IMAGES],
}


@pytest.mark.parametrize("shapes", INPUTS.values(), ids=INPUTS)
def test_a_graph_that_takes_something_else_than_images_is_refused(tmp_path, shapes):
    path = graph(tmp_path / "a.onnx", SAME, shapes, shapes[:1])
    with pytest.raises(
        UserError, match=r"a.onnx: found the inputs \[.*; needed is one for images \[B, 3, H, W\]; give"
    ):
        load_exported(path)


def test_what_is_timed_is_a_folder(tmp_path, capsys):
    path = graph(tmp_path / "a.onnx", SAME, [IMAGES], [IMAGES])
    assert main(["benchmark", str(path)]) == 2
    assert capsys.readouterr().err == f"error: {path}: is a file; give the folder that `zsqdet export` made\n"


@pytest.mark.parametrize("batch", [0, 1025, 2**40])
def test_a_fixed_batch_out_of_bounds_is_refused_before_memory_is_taken(tmp_path, batch):
    path = graph(tmp_path / "a.onnx", SAME, [[batch, *IMAGES[1:]]], [IMAGES])
    assert main(["info", str(path)]) == 0
    with pytest.raises(UserError, match=f"a.onnx: found a batch of {batch}; allowed are 1 to 1024, or a dynamic one$"):
        load_exported(path)


def test_a_graph_without_inputs_is_refused_and_described(tmp_path, capsys):
    value = helper.make_node("Constant", [], ["y0"], value=helper.make_tensor("v", TensorProto.FLOAT, [1], [1.0]))
    path = graph(tmp_path / "a.onnx", [value], [], [[1]])
    with pytest.raises(UserError, match=r"a.onnx: found the inputs none; needed is one for images"):
        load_exported(path)
    assert main(["info", str(path)]) == 0
    assert "input            none" in capsys.readouterr().out


def test_an_empty_file_is_no_graph(tmp_path, capsys):
    (tmp_path / "a.onnx").write_bytes(b"")
    assert main(["info", str(tmp_path / "a.onnx")]) == 2
    assert capsys.readouterr().err == f"error: {tmp_path}/a.onnx: damaged, no ONNX graph; export it again\n"


def test_outputs_of_another_network_are_refused(tmp_path):
    path = graph(tmp_path / "a.onnx", SAME, [IMAGES], [IMAGES])
    with pytest.raises(UserError, match=r"graph: its outputs have the shapes \[1, 3, 64, 64\], which are not those"):
        detect(path)


def test_a_class_that_the_metadata_do_not_name_is_refused(tmp_path):
    rows = np.zeros((1, 14, 84))
    rows[0, :4, 0], rows[0, 13, 0] = 20, 0.9
    assert detect(constant(tmp_path / "a.onnx", rows))[0].labels.tolist() == [9]
    with pytest.raises(UserError, match="graph: detects class 9, but its metadata name 5; export it again"):
        detect(constant(tmp_path / "b.onnx", rows, classes=5))


def test_a_graph_that_gives_nan_has_no_ap(tmp_path):
    with pytest.raises(UserError, match="graph: its outputs hold NaN, as of a damaged file; export it again"):
        detect(constant(tmp_path / "a.onnx", np.full((1, 14, 84), np.nan)))


def test_a_graph_that_fails_when_it_runs_is_refused(tmp_path):
    shape = onnx.numpy_helper.from_array(np.array([5, 5]), "shape")
    node = helper.make_node("Reshape", ["x0", "shape"], ["y0"])
    path = graph(tmp_path / "a.onnx", [node], [["B", 3, 64, 64]], [["N", "M"]], constants=[shape])
    with pytest.raises(UserError, match=r"graph: cannot be run \(.*\); export it again"):
        detect(path)


METADATA = {
    "not YAML": (b"a: [\n", "not valid YAML"),
    "no text": (bytes(range(256)), "not valid YAML"),
    "aliases": (b"a: &a [x, x]\nb: [*a, *a]\n", "found the alias"),
    "a tag": (b"zsqdet: !!python/object/apply:os.system [exit]\n", "found the tag"),
}


@pytest.mark.parametrize(("content", "reason"), METADATA.values(), ids=METADATA)
def test_the_metadata_of_an_openvino_pair_are_plain_yaml(tmp_path, content, reason):
    path = tmp_path / "metadata.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"^{path}: .*{reason}"):
        _metadata_file(path)
    path.write_bytes(b"zsqdet: '{}'\nnames: {0: a}\n")
    assert _metadata_file(path) == {"zsqdet": "{}"}


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
    onnx.save(with_own_zero_points(onnxslim.slim(str(path))), path)
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
    with pytest.raises(UserError, match=r"small.onnx: in ONNX Runtime \d+ of \d+ codes .* differ from"):
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


def node_of_products(actual):
    """What is found of a node whose exact products are 8 times 2.5 steps, 0 and 7.5."""
    node = helper.make_node("QLinearMul", list("abcdefgh"), ["y"])
    scales = {name: np.float32(0.5) for name in "be"} | {"g": np.float32(0.1)}
    codes = np.array([1] * 8 + [0, 3], np.uint8)
    values = {"a": codes, "d": np.uint8([1] * 10), "y": np.uint8(actual)} | scales
    result = Parity()
    parity._compare(node, values | {name: np.uint8(0) for name in "cfh"}, result, onnx)
    return result


def test_a_tie_that_the_runtime_rounds_the_other_way_is_no_difference_however_often_it_is_there():
    assert node_of_products([2] * 8 + [0, 8]).differing == 0
    assert node_of_products([3] * 8 + [0, 8]).passed
    assert node_of_products([3] * 4 + [2] * 4 + [0, 7]).differing == 0
    found = node_of_products([4] * 8 + [1, 8])
    assert (found.differing, found.largest, found.passed) == (9, 2, False)
    assert node_of_products([1] * 8 + [0, 8]).differing == 8


@pytest.mark.parametrize(
    ("found", "advice"), [(["avx2"], "no VNNI"), (["avx2", "avx512_vnni"], "--size"), (["asimddp"], "--size")]
)
def test_codes_that_differ_are_told_with_what_is_allowed(found, advice, monkeypatch):
    monkeypatch.setattr(parity, "instruction_sets", lambda: found)
    said = (
        r"500 of 1000 codes \(5\.0e-01, allowed 1e-05\) differ from the float64 reference, by up to 1 \(allowed 1\).*"
    )
    with pytest.raises(UserError, match=said + advice):
        require(Parity(1000, 500, 1), Path("a.onnx"))


def test_each_weight_has_a_zero_point_of_its_own_and_activations_share_theirs():
    make = onnx.helper.make_node
    values = {"z": np.zeros(4, np.int8), "zero": np.int8(0), "w5": np.ones(4, np.int8)}
    constants = [onnx.numpy_helper.from_array(np.asarray(value), name) for name, value in values.items()]
    points = ["z", "z", "zero", "zero", "z", "zero"]
    nodes = [make("DequantizeLinear", [f"w{i}", "s", point], [f"v{i}"]) for i, point in enumerate(points)]
    model = onnx.helper.make_model(onnx.helper.make_graph(nodes, "graph", [], [], constants))
    made = with_own_zero_points(model).graph
    assert [node.input[2] for node in made.node] == ["z", "v1_zero_point", "zero", "zero", "v4_zero_point", "zero"]
    found = {tensor.name: onnx.numpy_helper.to_array(tensor).tolist() for tensor in made.initializer}
    assert found == {"z": [0] * 4, "zero": 0, "w5": [1] * 4, "v1_zero_point": [0] * 4, "v4_zero_point": [0] * 4}


def test_of_two_at_once_the_first_one_done_has_the_name_and_neither_harms_the_other(tmp_path):
    out = tmp_path / "export"

    def slower():
        with new_folder(out) as folder:
            (folder / "a").write_text("slower")
            with new_folder(out) as other:
                (other / "a").write_text("faster")
            assert (folder / "a").read_text() == "slower"

    with pytest.raises(UserError, match="export: exists already; remove it, or give another folder with --out"):
        slower()
    assert (out / "a").read_text() == "faster"
    assert list(tmp_path.iterdir()) == [out]


def test_what_a_killed_process_left_is_removed_and_nothing_else(tmp_path):
    out = tmp_path / "export"
    code = (
        "import os, signal, sys; from pathlib import Path; from common.deployment.folder import new_folder\n"
        "with new_folder(Path(sys.argv[1])) as folder:\n"
        "    (folder / 'a').write_text('half'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(out)], env=os.environ, check=False).returncode == -9
    assert len(list(tmp_path.iterdir())) == 1
    mine, foreign = tmp_path / f"{own_prefix(out)}live.part", tmp_path / ".export.notes.part"
    for folder in (mine, foreign):
        folder.mkdir()
    with new_folder(out) as folder:
        (folder / "a").write_text("whole")
    assert sorted(tmp_path.iterdir()) == sorted([out, mine, foreign])


def test_a_folder_that_fails_leaves_nothing(tmp_path):
    with pytest.raises(ValueError, match="on the way"), new_folder(tmp_path / "export"):
        raise ValueError("on the way")
    assert list(tmp_path.iterdir()) == []


def test_an_onnx_file_of_something_else_is_refused(tmp_path, capsys):
    x = onnx.helper.make_tensor_value_info("images", onnx.TensorProto.FLOAT, [1, 3, 32, 32])
    y = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1, 3, 32, 32])
    graph = onnx.helper.make_graph([onnx.helper.make_node("Relu", ["images"], ["y"])], "g", [x], [y])
    opset = [onnx.helper.make_opsetid("", 17)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opset, ir_version=9), tmp_path / "other.onnx")
    with pytest.raises(Exception, match="not an export of zsqdet"):
        load_exported(tmp_path / "other.onnx")


@pytest.mark.parametrize(
    "words",
    [
        *("export RUN --to onnxruntime --opset 99", "export RUN --to onnxruntime --batch 0"),
        *("export RUN --to onnxruntime --size 64x0", "benchmark FOLDER --threads -3", "benchmark FOLDER --rounds 0"),
    ],
)
def test_numbers_out_of_bounds_are_refused_before_any_work(words, capsys):
    with pytest.raises(SystemExit, match=r"^2$"):
        main(words.split())
    assert re.search(r"found '.*'; allowed: |expected at least one argument", capsys.readouterr().err)


@pytest.mark.parametrize("family", ["yolo11", "yolov5"])
def test_a_dynamic_float_graph_gives_what_the_module_gives_at_other_sizes(family, tmp_path):
    detector = load_detector(family, Path(__file__).parents[2] / f"tools/shapes/micro_{family}.safetensors")
    module = detector.build()
    export_graph(detector, module, tmp_path / "a.onnx", Shape((96, 96), dynamic=True))
    graph = RuntimeModule(open_session(tmp_path / "a.onnx"))
    images = torch.rand(2, 3, 64, 128, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = detector.export_module(module)(images)
    for found, own in zip(graph(images), wanted if isinstance(wanted, tuple) else (wanted,), strict=True):
        assert torch.allclose(found, own, atol=2e-3)


def test_a_size_that_no_memory_holds_is_refused_before_it_is_taken(tmp_path, monkeypatch):
    detector = load_detector("yolo11", MICRO)
    monkeypatch.setattr(graphs, "free_memory", lambda: 4 * 2**30)
    with pytest.raises(
        UserError, match=r"1 x 8192 x 8192 pixels take \d+ GiB of memory and more, and 4 are free; give"
    ):
        export_graph(detector, detector.build(), tmp_path / "a.onnx", Shape((8192, 8192)))
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(graphs, "LARGE", 1)
    export_graph(detector, detector.build(), tmp_path / "a.onnx", Shape((64, 64)))


def test_predict_of_a_folder_scales_as_cv2_does_without_smoothing():
    source = (Path(graphs.__file__).parent / "scripts/predict_yolo.py").read_text()
    names = {}
    exec(source[: source.index("def suppress")], names)
    pixels = np.random.default_rng(0).integers(0, 255, (100, 160, 3), dtype=np.uint8)
    found, scale, left, top = names["letterbox"](Image.fromarray(pixels), 64, 96)
    assert (scale, left, top) == (0.6, 0, 2)
    wanted = np.full((64, 96, 3), 114, np.uint8)
    wanted[2:62] = cv2.resize(pixels, (96, 60), interpolation=cv2.INTER_LINEAR)
    np.testing.assert_allclose(found[0].transpose(1, 2, 0), wanted / 255, atol=1.01 / 255)


def test_onnx_runtime_reports_nothing_and_leaves_no_file_in_the_home(tmp_path):
    own = {"HOME": str(tmp_path), "XDG_CACHE_HOME": "", "PYTHONPATH": str(MICRO.parents[2])}
    command = [sys.executable, "-c", "import common, onnxruntime"]
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("ORT_")}
    subprocess.run(command, env=inherited | own, check=True, cwd=tmp_path)
    assert not [*tmp_path.rglob("*")]
