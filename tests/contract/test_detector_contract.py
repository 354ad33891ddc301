"""What every adapter promises to common/: one test file for all of them."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from toy.adapter import ToyDetector
from ultralytics.nn.tasks import yaml_model_load

from common.config.schema import QuantizationConfig
from common.detection.attention import AttentionInput
from common.detection.detector import TransformerDetector, build_detector, load_detector
from common.detection.types import Targets
from common.quantization import plan_layers, quantize
from common.quantization.layers import QUANTIZABLE

ROOT = Path(__file__).parents[2]
SIZE = 64


def untrained(family, architecture):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        found = build_detector(family, architecture)
        found.state = found.build().state_dict()
    return found


MICRO_RETINANET = {"model": "retinanet_micro", "outputs": 4, "frozen_batch_norm": False}


def segmentation():
    yaml = {k: v for k, v in yaml_model_load("yolo11n-seg.yaml").items() if k in ("backbone", "head")}
    small = {"nc": 2, "depth_multiple": 0.33, "width_multiple": 0.125, "max_channels": 256}
    return untrained("yolo11", {"yaml": yaml | small, "names": ["a", "b"]})


DETECTORS = {
    "segmentation": segmentation,
    "toy": lambda: ToyDetector(),
    "onestage": lambda: untrained("onestage", MICRO_RETINANET),
    "resnet": lambda: load_detector("resnet", ROOT / "tools/shapes/micro_mask_rcnn.safetensors"),
    "vit": lambda: load_detector("vit", ROOT / "tools/shapes/micro_vit.safetensors"),
    "yolo11": lambda: load_detector("yolo11", ROOT / "tools/shapes/micro_yolo11.safetensors"),
    "yolov5": lambda: load_detector("yolov5", ROOT / "tools/shapes/micro_yolov5.safetensors"),
}


@pytest.fixture(scope="module", params=DETECTORS)
def detector(request):
    return DETECTORS[request.param]()


@pytest.fixture(scope="module")
def module(detector):
    return detector.build()


@pytest.fixture(scope="module")
def images():
    return torch.rand(3, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def targets():
    boxes = torch.tensor([[4.0, 6.0, 40.0, 50.0], [20.0, 20.0, 60.0, 44.0]])
    none = Targets(torch.zeros(0, 4), torch.zeros(0, dtype=torch.long))
    return [Targets(boxes, torch.tensor([0, 1])), none, Targets(boxes[1:], torch.tensor([1]))]


def test_each_build_is_a_module_of_its_own_in_eval_mode(detector):
    first, second = detector.build(), detector.build()
    assert not any(part.training for part in first.modules())
    state, other = first.state_dict(), second.state_dict()
    assert all(torch.equal(state[name], other[name]) for name in state)
    assert {t.dtype for t in state.values()} <= {torch.float32, torch.int64}
    assert not {p.data_ptr() for p in first.parameters()} & {p.data_ptr() for p in second.parameters()}


def test_the_architecture_alone_rebuilds_the_module(detector, module):
    family = type(detector).__module__.partition(".")[0]
    other = build_detector(family, json.loads(json.dumps(dict(detector.architecture))))
    assert other.class_names == detector.class_names
    rebuilt = other.build()
    rebuilt.load_state_dict(module.state_dict(), strict=True)
    assert [type(m) for m in rebuilt.modules()] == [type(m) for m in module.modules()]


def test_rows_maps_and_confidence_have_the_promised_shapes(detector, module, images):
    out = detector.head_output(module, images)
    assert not out.losses
    for term in out.terms.values():
        assert term.values.shape[0] == 3
        assert term.values.ndim == 3 if term.kind != "softmax" else term.values.ndim in (3, 4)
        assert term.confidence.shape == term.values.shape[:2]
        assert not term.confidence.requires_grad
        assert ((term.confidence >= 0) & (term.confidence <= 1)).all()
    for level in out.maps:
        assert level.ndim == 4
        assert SIZE % level.shape[-1] == 0


def test_the_losses_of_an_image_do_not_depend_on_its_batch(detector, module, images, targets):
    together = detector.head_output(module, images, targets).losses
    assert together
    for i in range(3):
        alone = detector.head_output(module, images[i : i + 1], targets[i : i + 1]).losses
        for name, value in together.items():
            assert value.shape == (3,)
            assert torch.isfinite(value).all()
            torch.testing.assert_close(value[i], alone[name][0], rtol=1e-4, atol=1e-5)


def test_the_losses_have_a_gradient_to_the_image(detector, module, images, targets):
    leaf = images.clone().requires_grad_()
    sum(loss.sum() for loss in detector.head_output(module, leaf, targets).losses.values()).backward()
    assert leaf.grad.abs().amax((1, 2, 3)).min() > 0


def test_modes_weights_and_statistics_are_left_as_they_were(detector, images, targets):
    module = detector.build()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    modes = [part.training for part in module.modules()]
    detector.head_output(module, images, targets)
    detector.detect(module, images, 0.01, 0.7, 10)
    assert [part.training for part in module.modules()] == modes
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())


def test_detections_are_sorted_limited_and_above_the_confidence(detector, module, images):
    found = detector.detect(module, images, 0.01, 0.7, 10)
    assert len(found) == 3
    for one in found:
        count = len(one.scores)
        assert count <= 10
        assert one.boxes.shape == (count, 4)
        assert (one.scores > 0.01).all()
        assert (one.scores.diff() <= 0).all()
        assert one.labels.dtype == torch.int64
        assert ((one.labels >= 0) & (one.labels < len(detector.class_names))).all()
        assert (one.boxes[:, 2:] >= one.boxes[:, :2]).all()
    assert not any(len(one.scores) for one in detector.detect(module, images, 1.0, 0.7, 10))


def test_named_layers_exist_and_the_first_statistics_layer_sees_the_image(detector, module):
    layers = detector.statistics_layers(module)
    attention = detector.attention_layers(module) if isinstance(detector, TransformerDetector) else []
    for one in attention:
        projection = module.get_submodule(one.projection)
        assert isinstance(projection, nn.Linear)
        assert projection in list(module.get_submodule(one.block).modules())
        assert projection.in_features % one.heads == 0
    assert bool(layers) != bool(attention)
    for layer in layers:
        assert isinstance(module.get_submodule(layer.convolution), nn.Conv2d)
        assert isinstance(module.get_submodule(layer.batch_norm), nn.BatchNorm2d)
    assert not layers or module.get_submodule(layers[0].convolution).in_channels == 3
    for name in detector.feature_layers(module):
        module.get_submodule(name)


def test_the_policy_names_every_convolution_and_linear_layer_once_in_order(detector, module):
    policy = detector.quantization_policy(module)
    assert [p.name for p in policy] == [
        n for n, m in module.named_modules() if isinstance(m, (*QUANTIZABLE, AttentionInput))
    ]
    assert all(p.reason for p in policy)
    assert [p.role for p in policy].count("first") == 1
    assert "output" in {p.role for p in policy}


def test_a_quantized_copy_is_accepted_wherever_the_original_is(detector, module, images, targets):
    config = QuantizationConfig()
    student = quantize(module, plan_layers(detector, module, config), config)
    assert detector.statistics_layers(student) == detector.statistics_layers(module)
    assert detector.feature_layers(student) == detector.feature_layers(module)
    assert detector.quantization_policy(student) == detector.quantization_policy(module)
    ours, theirs = (detector.head_output(m, images, targets) for m in (student, module))
    for name, term in theirs.terms.items():
        torch.testing.assert_close(ours.terms[name].values, term.values)
