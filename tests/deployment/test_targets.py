"""What each target asks of a graph: TensorRT's rules, FP8, few bits on integer engines, and what is refused."""

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn
from toy.adapter import ToyDetector

from common.config.schema import QuantizationConfig
from common.deployment import parity, tensorrt
from common.deployment.benchmark import Timing, timing_lines
from common.deployment.folder import example_image, export_folder
from common.deployment.graph import Shape, export_graph
from common.deployment.qdq import DequantizedLayer, Float8
from common.deployment.targets import Options, options_of
from common.deployment.tensorrt import RULES, broken_rules
from common.detection.detector import load_detector
from common.quantization import calibrate, load_quantized, plan_layers, quantize, save_quantized
from common.quantization.layers import quantized_layer
from common.quantization.placement import find_placement
from common.quantization.quantizers import lsq, minifloat
from common.quantization.ranges import Range
from common.runtime.errors import UserError

ROOT = Path(__file__).parents[2]
SHAPES = ROOT / "tools/shapes"
SIZE = (64, 64)
UNIFORM_4 = {"weight_bits": 4, "activation_bits": 4}
MINIFLOAT_4 = UNIFORM_4 | {"activation_levels": "minifloat"}


def quantized(folder, family="toy", detector=None, **settings):
    """A quantized detector in a folder, calibrated on one random image."""
    config = QuantizationConfig(rounding="nearest", batch_norm_correction=False, **settings)
    detector = detector or ToyDetector()
    teacher = detector.build()
    plan = plan_layers(detector, teacher, config)
    student = quantize(teacher, plan, config, find_placement(detector, teacher, plan, config.profile))
    calibrate(detector, teacher, student, plan, [torch.from_numpy(example_image(SIZE))], config)
    folder.mkdir()
    save_quantized(folder, student, plan, family, detector.architecture, config)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made, root = {}, tmp_path_factory.mktemp("quantized")

    def of(name, **settings):
        if name not in made:
            made[name] = quantized(root / name, **settings)
        return made[name]

    return of


def export(quantized_folder, out, target, **options):
    about = {"name": "micro", "weights": "micro", "rows": [], "zero_shot": True}
    export_folder(quantized_folder, out, Options(target, SIZE, **options), about, example_image(SIZE))
    return onnx.load(out / "model.onnx") if (out / "model.onnx").is_file() else None


def outputs_of(graph, images):
    session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"images": images})[0]


@pytest.mark.parametrize(("target", "other"), [("tensorrt", "TensorRT"), ("fp8", "TensorRT"), ("opencv", "OpenCV")])
def test_a_time_in_another_runtime_is_not_taken_for_that_of_the_target(target, other):
    timings = [Timing("float", 1, 5.0, 0.1, 1.0), Timing("quantized", 1, 9.0, 0.1, 1.8)]
    lines = [*timing_lines(target, Path("model.onnx"), timings, {}, [])]
    assert lines[0] == f"timed in ONNX Runtime {onnxruntime.__version__} on the CPU; says nothing about {other}"
    assert not any("float is faster" in line for line in lines)
    own = [*timing_lines("onnxruntime", Path("model.onnx"), timings, {}, [])]
    assert any("on this processor float is faster" in line for line in own)


# TensorRT's rules


def good():
    """x -> Q/DQ -> Conv of int8 codes -> SiLU -> Q/DQ -> Concat of one scale -> transposed convolution."""
    constants = {
        "s": np.float32(0.1), "z": np.int8(0), "w": np.ones((2, 2, 1, 1), np.int8), "ws": np.float32([0.1, 0.2]),
        "wz": np.int8([0, 0]), "b": np.float32([0, 0]), "t": np.ones((4, 2, 1, 1), np.int8),
        "other": np.float32(0.3), "u": np.uint8(0), "one": np.int8(1), "below": np.float32(-0.1),
        "b32": np.int32([0, 0]),
    }  # fmt: skip
    rows = [
        ("QuantizeLinear", ["x", "s", "z"], "q"), ("DequantizeLinear", ["q", "s", "z"], "d"),
        ("DequantizeLinear", ["w", "ws", "wz"], "wd"), ("Conv", ["d", "wd", "b"], "c"),
        ("Sigmoid", ["c"], "g"), ("Mul", ["c", "g"], "a"),
        ("QuantizeLinear", ["a", "s", "z"], "aq"), ("DequantizeLinear", ["aq", "s", "z"], "ad"),
        ("Concat", ["ad", "d"], "j"),
        ("DequantizeLinear", ["t", "ws", "wz"], "td"), ("ConvTranspose", ["j", "td"], "y"),
    ]  # fmt: skip
    nodes = [helper.make_node(kind, names, [out], name=out) for kind, names, out in rows]
    nodes[2].attribute.append(helper.make_attribute("axis", 0))
    nodes[8].attribute.append(helper.make_attribute("axis", 1))
    nodes[9].attribute.append(helper.make_attribute("axis", 1))
    given = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 2, 4, 4])]
    made = [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 2, 4, 4])]
    tensors = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "g", given, made, tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def reads(node, place, name):
    """A change of a graph: what the named node reads at this place."""

    def change(model):
        next(n for n in model.graph.node if n.name == node).input[place] = name

    return change


def on_axis(node, axis):
    def change(model):
        next(n for n in model.graph.node if n.name == node).attribute[0].i = axis

    return change


def old_opset(model):
    model.opset_import[0].version = 12


def four_bits(model):
    model.graph.initializer.append(helper.make_tensor("int4", TensorProto.INT4, [2], b"\0", raw=True))


def no_zero_point(model):
    del next(n for n in model.graph.node if n.name == "wd").input[2]


def between(model):
    nodes = [helper.make_node("QuantizeLinear", ["c", "s", "z"], ["cq"], name="cq")]
    nodes += [helper.make_node("DequantizeLinear", ["cq", "s", "z"], ["cd"], name="cd")]
    for node in nodes:
        model.graph.node.append(node)
    reads("g", 0, "cd")(model)


def quantized_bias(model):
    model.graph.node.append(helper.make_node("DequantizeLinear", ["b32", "ws", "wz"], ["bd"], name="bd"))
    reads("c", 2, "bd")(model)


def both_types(model):
    model.opset_import[0].version = 19
    tensor = next(t for t in model.graph.initializer if t.name == "u")
    tensor.CopyFrom(helper.make_tensor("u", TensorProto.FLOAT8E4M3FN, [], b"\0", raw=True))
    reads("q", 2, "u")(model)


BREAKS = [
    ("opset", old_opset, "opset 12; allowed are 13 to 24"),
    ("opset", both_types, "INT8 and FP8 in one graph"),
    ("symmetric codes", reads("q", 2, "u"), "q is UINT8; allowed are INT8 and FLOAT8E4M3FN"),
    ("symmetric codes", reads("aq", 2, "one"), "aq has a zero point that is not 0"),
    ("symmetric codes", no_zero_point, "wd has no constant zero point"),
    ("scales", reads("q", 1, "x"), "q has a scale that is not constant"),
    ("scales", reads("aq", 1, "below"), "aq has a scale that is not positive"),
    ("scales", reads("aq", 1, "ws"), "aq has 2 scales; activations have one"),
    ("weights", on_axis("wd", 1), "wd has scales along axis 1"),
    ("weights", on_axis("td", 0), "td has scales along axis 0"),
    ("weights", four_bits, "int4 is INT4"),
    ("pairs", reads("j", 1, "q"), "q is read by something else"),
    ("pairs", reads("ad", 0, "a"), "ad reads neither a QuantizeLinear nor a constant"),
    ("both sides of a layer", reads("c", 0, "x"), "c has a quantized weight and an input in float"),
    ("both sides of a layer", quantized_bias, "c has a quantized bias"),
    ("nothing between a layer and its activation", between, "cq stands between c and its activation"),
    ("one scale for a concatenation", reads("ad", 1, "other"), "j joins tensors of 2 scales"),
]


def test_a_graph_that_keeps_all_rules_of_tensorrt_breaks_none():
    model = good()
    reads("y", 0, "jd")(model)
    for kind, names, out in (("QuantizeLinear", ["j", "s", "z"], "jq"), ("DequantizeLinear", ["jq", "s", "z"], "jd")):
        model.graph.node.append(helper.make_node(kind, names, [out], name=out))
    assert broken_rules(model) == []


@pytest.mark.parametrize(("rule", "change", "message"), BREAKS)
def test_each_rule_of_tensorrt_finds_what_breaks_it(rule, change, message):
    model = good()
    change(model)
    assert any(message in found for name, found in broken_rules(model) if name == rule)
    assert {name for name, *_ in BREAKS} == set(RULES)


def test_tensorrt_gets_only_graphs_that_keep_its_rules(folders, tmp_path, monkeypatch):
    symmetric = folders("symmetric", activation_range="symmetric")
    assert broken_rules(export(symmetric, tmp_path / "a", "tensorrt")) == []
    with pytest.raises(UserError, match=r"tensorrt has int8 with zero point 0; [^\n]*activation_range=symmetric"):
        export(folders("w8a8"), tmp_path / "b", "tensorrt")
    monkeypatch.setitem(tensorrt.RULES, "opset", lambda graph: iter(["opset 0"]))
    with pytest.raises(UserError, match=r"rule 'opset' is broken: opset 0 \(1 places"):
        export(symmetric, tmp_path / "c", "tensorrt")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_openvino_gets_int8_around_zero_where_codes_are(folders, tmp_path):
    export(folders("symmetric", activation_range="symmetric"), tmp_path / "a", "openvino")
    assert 'element_type="u8"' not in (tmp_path / "a/model_openvino_model/model.xml").read_text()


# FP8


@pytest.mark.parametrize(
    ("bits", "low", "high"), [(1, -4, 128), (2, -24, 192), (3, 0, 224), (4, -15, 240), (0, -16, 15)]
)
def test_float8_rounds_as_the_quantizer_does(bits, low, high):
    quantizer = minifloat.Quantizer((1,), True) if bits else lsq.Quantizer((1,), True)
    quantizer.start(Range(torch.tensor([0.037]), low, high, torch.zeros(1)))
    quantizer.significand_bits = bits
    x = torch.linspace(low * 0.05, high * 0.05, 20_001)
    with torch.no_grad():
        assert torch.allclose(Float8(quantizer)(x), quantizer(x), atol=1e-6)


def test_an_fp8_graph_has_fp8_codes_and_gives_what_the_module_gives(folders, tmp_path):
    model = export(folders("minifloat", **MINIFLOAT_4), tmp_path / "a", "fp8")
    kinds = {t.data_type for t in model.graph.initializer}
    assert TensorProto.FLOAT8E4M3FN in kinds
    assert not kinds & {TensorProto.INT8, TensorProto.UINT8}
    assert model.opset_import[0].version >= 19
    images = example_image(SIZE)
    detector, module = load_quantized(folders("minifloat"))
    with torch.no_grad():
        wanted = detector.export_module(module)(torch.from_numpy(images)).numpy()
    assert np.allclose(outputs_of(model, images), wanted, atol=1e-3)
    assert broken_rules(model) == []


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("w8a8", {}, r"input of \S+ has the code \d+, which is no number of FP8 E4M3"),
        ("codebook", MINIFLOAT_4 | {"weight_levels": "codebook"}, r"weight of \S+ has the code 127, [^\n]*uniform"),
    ],
)
def test_codes_that_fp8_has_not_are_refused(folders, tmp_path, name, settings, message):
    with pytest.raises(UserError, match=message):
        export(folders(name, **settings), tmp_path / "a", "fp8")
    assert not list(tmp_path.iterdir())


# Fewer bits than 8 on integer engines


def test_four_uniform_bits_are_clipped_codes_of_eight(folders, tmp_path):
    graph = export(folders("uniform", **UNIFORM_4), tmp_path / "a", "onnxruntime", any_profile=True)
    makers = {name: node for node in graph.graph.node for name in node.output}
    rounded = [node for node in graph.graph.node if node.op_type == "QuantizeLinear"]
    assert rounded
    assert all(makers[node.input[0]].op_type == "Clip" for node in rounded)
    assert np.isfinite(outputs_of(graph, example_image(SIZE))).all()


def test_minifloat_inputs_are_refused_by_integer_engines_or_become_eight_uniform_bits(folders, tmp_path):
    few = folders("minifloat", **MINIFLOAT_4)
    with pytest.raises(
        UserError, match=r"has minifloat inputs, which no integer engine multiplies; [^\n]*activations 8"
    ):
        export(few, tmp_path / "a", "openvino")
    assert not list(tmp_path.iterdir())
    graph = export(few, tmp_path / "b", "onnxruntime", any_profile=True, activations=8)
    assert np.isfinite(outputs_of(graph, example_image(SIZE))).all()


# Codes and their negatives; a check that fails


def layer_and_norm(low):
    """A layer of 8-bit codes -low and 127, and a BatchNorm of negative scale behind it."""
    layer, norm = nn.Conv2d(1, 2, 1, bias=False), nn.BatchNorm2d(2).eval()
    layer.weight.data = torch.tensor([low, 127.0]).view(2, 1, 1, 1) * 0.01
    norm.weight.data = torch.tensor([-1.5, -0.5])
    quantizer = lsq.Quantizer((2, 1, 1, 1), False)
    quantizer.start(Range(torch.full((2, 1, 1, 1), 0.01), int(low), 127, torch.zeros(1)))
    return quantized_layer(layer, quantizer, None), norm


def test_a_batch_norm_of_negative_scale_turns_eight_bit_codes_round_exactly():
    layer, norm = layer_and_norm(-127.0)
    x = torch.randn(1, 1, 3, 3, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.allclose(DequantizedLayer("a", layer, norm, None)(x), norm(layer(x)), atol=1e-6)


def test_a_channel_that_batch_norm_makes_constant_has_a_bias_of_32_bits():
    layer, norm = layer_and_norm(-127.0)
    norm.weight.data, norm.bias.data = torch.tensor([1e-9, 0.5]), torch.tensor([3.0, 0.5])
    x = torch.randn(1, 1, 3, 3, generator=torch.Generator().manual_seed(0))
    exported = DequantizedLayer("a", layer, norm, None)
    assert (exported.bias.abs() / (exported.scale * 1e-4)).max() <= 2**30 * 1.001
    assert torch.equal(exported.codes[1].flatten(), torch.tensor([127], dtype=torch.int8))  # an ordinary one stays
    with torch.no_grad():
        assert torch.allclose(exported(x), norm(layer(x)), atol=1e-4)


def test_a_code_without_a_negative_is_refused():
    with pytest.raises(UserError, match=r"export: a\.conv has the code -128 before a BatchNorm of negative scale"):
        DequantizedLayer("a.conv", *layer_and_norm(-128.0), None)


def test_an_opset_that_the_command_has_not_is_refused_in_python_too():
    assert options_of("onnxruntime", {"opset": 20}).opset == 20
    for opset in (16, 21):
        with pytest.raises(UserError, match=r"export: .*opset"):
            options_of("onnxruntime", {"opset": opset})


def test_a_check_that_fails_is_one_line_and_leaves_no_folder(folders, tmp_path, monkeypatch):
    monkeypatch.setitem(parity.REFERENCES, "QuantizeLinear", lambda inputs, _: np.zeros(inputs[0].shape))
    with pytest.raises(UserError, match=r"^[^\n]*in ONNX Runtime \d+ of \d+ codes .*differ from the float64[^\n]*$"):
        export(folders("w8a8"), tmp_path / "a", "openvino")
    assert not list(tmp_path.iterdir())


# Two stages


def with_one_shifted_block(detector):
    """A Swin of which only the first stage keeps its second block, the one with shifted windows."""
    gone = re.compile(r"backbone\.stages\.[123]\.blocks\.1\.")
    overrides = detector.architecture["overrides"] | {"backbone.depths": [2, 1, 1, 1]}
    state = {name: tensor for name, tensor in detector.state.items() if not gone.match(name)}
    return replace(detector, architecture=detector.architecture | {"overrides": overrides}, state=state)


@pytest.mark.parametrize(("family", "weights"), [("resnet", "micro_mask_rcnn"), ("vit", "micro_vit")])
def test_a_two_stage_detector_detects_in_openvino_what_its_module_detects(family, weights, tmp_path):
    detector = load_detector(family, SHAPES / f"{weights}.safetensors")
    detector = with_one_shifted_block(detector) if family == "vit" else detector
    folder = quantized(tmp_path / "run", family, detector, scale_init="lsq", activation_range="symmetric")
    image = example_image(SIZE)
    theirs, module = load_quantized(folder)
    with torch.no_grad():
        wanted = theirs.export_module(module)(torch.from_numpy(image))
    np.save(tmp_path / "image.npy", image)
    export(folder, tmp_path / "openvino", "openvino")  # its nodes are checked in ONNX Runtime
    # In a process of its own: OpenVINO and ONNX Runtime in one have crashed.
    code = [sys.executable, "-c", DETECT, str(tmp_path), "openvino"]
    done = subprocess.run(code, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    boxes, _, scores, masks = (np.load(tmp_path / f"openvino{i}.npy") for i in range(4))
    assert len(boxes) == len(scores) == len(masks) > 0
    assert abs(len(scores) - len(wanted[2])) <= 0.2 * len(scores) + 2
    # What is in float runs in bfloat16 on processors with AMX.
    assert np.allclose(scores[:3], wanted[2][:3], atol=0.1)


DETECT = """
import sys, numpy, torch
from pathlib import Path
from common.deployment.runtime import load_exported
folder, target = Path(sys.argv[1]), sys.argv[2]
_, graph = load_exported(folder / target)
for i, out in enumerate(graph(torch.from_numpy(numpy.load(folder / "image.npy")))):
    numpy.save(folder / f"{target}{i}.npy", out.numpy())
"""


def test_a_swin_has_one_size(tmp_path):
    detector = load_detector("vit", SHAPES / "micro_vit.safetensors")
    with pytest.raises(UserError, match=r"export: found --dynamic; this detector's graph has one size"):
        export_graph(detector, detector.build(), tmp_path / "a.onnx", Shape(SIZE, dynamic=True))
