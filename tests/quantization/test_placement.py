"""Quantizers belong to tensors: what shares one, what `full` adds, and that both come back from a folder."""

import copy
import functools
from pathlib import Path

import pytest
import torch

from common.config.schema import QuantizationConfig, TrainingConfig
from common.detection.detector import load_detector
from common.distillation.optimizer import parameter_groups
from common.quantization import (
    calibrate,
    find_placement,
    load_quantized,
    plan_layers,
    quantize,
    save_quantized,
    with_tensors,
)
from common.quantization.full_placement import Tensors, followed
from common.quantization.layers import quantized_layers
from common.quantization.placement import _joined, tensor_range
from common.runtime.errors import UserError

SHAPES = Path(__file__).parents[2] / "tools/shapes"
MICRO = {
    "yolo11": "micro_yolo11.safetensors",
    "yolov5": "micro_yolov5.safetensors",
    "resnet": "micro_mask_rcnn.safetensors",
}


@functools.cache
def calibrated(family, profile, **settings):
    """A calibrated detector, its student and plan, and what was noted of each layer."""
    detector = with_tensors(load_detector(family, SHAPES / MICRO[family]))
    teacher = detector.build()
    config = QuantizationConfig(profile=profile, rounding="nearest", **settings)
    plan = plan_layers(detector, teacher, config)
    student = quantize(teacher, plan, config, find_placement(detector, teacher, plan, profile, config.concat_scales))
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    rows = calibrate(detector, teacher, student, plan, [images], config).layers
    return detector, student, plan, config, images, rows


def made(family, profile, **settings):
    """A detector, a student of its own, its plan, configuration and images."""
    detector, student, plan, config, images, _ = calibrated(family, profile, **settings)
    return detector, copy.deepcopy(student), plan, config, images


@pytest.mark.parametrize("family", MICRO)
def test_layers_that_read_one_tensor_share_one_quantizer(family):
    _, student, _, _, _ = made(family, "inputs")
    layers = quantized_layers(student)
    readers = {}
    with torch.no_grad():
        for name, layer in layers.items():
            layer.register_forward_pre_hook(lambda _, x, name=name: readers.setdefault(id(x[0]), [x[0]]).append(name))
        load_detector(family, SHAPES / MICRO[family]).head_output(student, torch.rand(1, 3, 96, 96))
    groups = [names for _, *names in readers.values() if len(names) > 1]
    assert groups
    for names in groups:
        assert len({id(layers[name].input_quantizer) for name in names}) == 1


def test_yolo11_has_as_many_input_quantizers_as_tensors_that_are_read():
    _, student, _, _, _ = made("yolo11", "inputs")
    layers = quantized_layers(student).values()
    found = {id(layer.input_quantizer) for layer in layers}
    # The head's box and class branches of a level, and the two branches of a C3k read one tensor.
    assert len(found) < len(layers)


@pytest.mark.parametrize("family", MICRO)
@pytest.mark.parametrize("profile", ["inputs", "full"])
def test_a_placement_comes_back_from_its_folder_bit_by_bit(tmp_path, family, profile):
    detector, student, plan, config, images = made(family, profile)
    save_quantized(tmp_path, student, plan, family, detector.architecture, config)
    loaded_detector, loaded = load_quantized(tmp_path)
    with torch.no_grad():
        ours, theirs = detector.head_output(student, images), loaded_detector.head_output(loaded, images)
    for name, term in ours.terms.items():
        assert torch.equal(term.values, theirs.terms[name].values), name
    assert loaded.placement == student.placement


def test_full_rounds_tensors_between_layers_to_their_grids():
    detector, student, _, _, images = made("yolo11", "full")
    name = "model.1.act/silu"
    assert {"model.1.conv/output", f"{name}/sigmoid", name} <= set(student.placement.tensors)
    seen = {}
    tensors = student.tensor_quantizers
    visit = type(tensors).visit

    def look(own, x):
        out = tensors.of(own)(x)
        seen.setdefault(own, out)
        return out

    tensors.observe = look
    detector.head_output(student, images)
    tensors.observe = None
    assert type(tensors).visit is visit
    quantizer = tensors.of(name)
    codes = seen[name] / quantizer.scale
    assert torch.allclose(codes, codes.round(), atol=1e-3)
    assert codes.round().unique().numel() <= 256
    gate = seen[f"{name}/sigmoid"] * 256
    assert torch.equal(gate, gate.round())


def test_full_is_closer_to_float_than_noise_and_is_not_float():
    detector, student, _, _, images = made("yolo11", "full")
    teacher = detector.build()
    with torch.no_grad():
        wanted = detector.head_output(teacher, images).terms["classes"].values
        found = detector.head_output(student, images).terms["classes"].values
    error = float((found - wanted).square().mean() / wanted.var())
    assert 0 < error < 0.1


def test_scales_of_tensors_are_trained_with_the_other_scales_but_for_the_sigmoids():
    detector, student, _, _, images = made("yolo11", "full")
    twin = copy.deepcopy(student)  # as the average of training is made
    groups = parameter_groups(twin)
    trained = {name for name in groups["scales"] if name.startswith("tensor_quantizers.")}
    kinds = student.placement.tensors
    assert len(trained) == sum(kind != "sigmoid" for kind in kinds.values())
    assert not any(name.startswith("tensor_quantizers.") for name in (*groups["weights"], *groups["affine"]))
    detector.head_output(twin, images).terms["boxes"].values.square().mean().backward()
    with_gradient = [name for name in trained if groups["scales"][name].grad is not None]
    assert len(with_gradient) > 0.8 * len(trained)  # those of the class branch have none here
    assert TrainingConfig().log_scale


def test_the_range_of_a_tensor_before_a_silu_has_the_least_error_behind_it():
    torch.manual_seed(0)
    sample = torch.randn(20000) * 4 - 3
    silu = torch.nn.functional.silu

    def error(found):
        x = ((sample - found.offset) / found.scale).round().clamp(found.low, found.high) * found.scale + found.offset
        return float((silu(x) - silu(sample)).square().sum())

    gated, plain = tensor_range(sample, "silu", "auto"), tensor_range(sample, "plain", "auto")
    assert error(gated) < 0.5 * error(plain)
    assert float(gated.offset) > float(plain.offset)  # deep negative values are clipped


def test_the_parts_of_a_concatenation_share_one_quantizer_where_that_is_asked_for(tmp_path):
    detector, student, plan, config, images = made("yolov5", "full", concat_scales="shared")
    save_quantized(tmp_path / "q", student, plan, "yolov5", detector.architecture, config)
    _, loaded = load_quantized(tmp_path / "q")
    for module in (student, loaded):
        tensors = module.tensor_quantizers
        mode = Tensors(tensors.visit)
        with torch.no_grad(), followed(module, set(tensors.layers), mode):
            load_detector("yolov5", SHAPES / MICRO["yolov5"]).head_output(module, images)
        assert len(mode.joined) > 5
        for names in mode.joined:
            assert len({id(tensors.of(name)) for name in names}) == 1
        assert len({id(quantizer) for quantizer in tensors.values()}) < len(tensors)
    with pytest.raises(ValueError, match=r"profile: found 'inputs', but concat_scales: shared is about"):
        QuantizationConfig(profile="inputs", concat_scales="shared")


def test_concatenations_that_have_a_part_in_common_share_one_scale():
    shared = _joined([["a", "b", "x"], ["c", "d", "y"], ["x", "c", "z"], ["e", "f"]], "feabcdxyz")
    assert shared == dict.fromkeys("abcdxyz", "a") | dict.fromkeys("ef", "f")


def test_full_with_inputs_of_other_bits_is_refused_before_any_work():
    detector = with_tensors(load_detector("yolo11", SHAPES / MICRO["yolo11"]))
    teacher = detector.build()
    config = QuantizationConfig(profile="full", activation_bits=4)
    plan = plan_layers(detector, teacher, config)
    with pytest.raises(UserError, match=r"quantization.profile: full has activations of 8 bits, and \S+ has 4"):
        find_placement(detector, teacher, plan, "full")


@pytest.mark.parametrize("settings", [{"quantizer": "lsq+"}, {"activation_levels": "minifloat"}, {"scale_init": "lsq"}])
def test_full_refuses_what_has_no_integers_between_layers(settings):
    with pytest.raises(ValueError, match="profile: full"):
        QuantizationConfig(profile="full", **settings)


@pytest.mark.parametrize("family", MICRO)
def test_a_row_says_the_scale_of_the_tensor_that_its_layer_reads(family):
    detector, student, _, _, images = made(family, "full")
    rows = {row["name"]: row for row in calibrated(family, "full")[-1]}
    read = {}
    for name in student.placement.covered:
        student.get_submodule(name).register_forward_pre_hook(lambda _, x, name=name: read.update({name: x[0]}))
    with torch.no_grad():
        detector.head_output(student, images)
    known = [name for name in read if "input_tensor" in rows[name]]
    assert len(known) > 0.9 * len(read) > 10
    for name in known:
        codes = read[name] / rows[name]["activation_scale"]
        assert torch.allclose(codes, codes.round(), atol=2e-3), name
        assert (codes.min() >= 0) == (rows[name]["activation_range"] == "unsigned"), name
