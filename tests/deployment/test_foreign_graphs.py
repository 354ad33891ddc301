"""Graphs that `zsqdet export` did not make, or that were damaged since: one line each, and no AP of something else."""

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

from common.checkpoints.read import load_own
from common.cli import main
from common.deployment.runtime import _metadata_file, load_exported
from common.runtime.errors import UserError

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
