"""Channels evened out after a LayerNorm: the same function, and one step that is as good as one for each channel."""

import copy

import pytest
import torch
from torch import nn

from common.config.schema import ExperimentConfig, QuantizationConfig
from common.detection.detector import build_detector
from common.detection.types import NormedLayer
from common.pipeline import stages as pipeline
from common.pipeline.measure import Experiment
from common.quantization import feeds, fold_layernorm, plan_layers
from common.quantization.layernorm_fold import fold
from tools.shapes.train_vit import micro


def norm_and(layer):
    """A LayerNorm whose channels differ by orders of magnitude, before `layer`, and float64 inputs for it."""
    generator = torch.Generator().manual_seed(0)
    norm = nn.LayerNorm(6)
    norm.weight.data = 10 ** torch.linspace(-1.5, 1.5, 6)
    norm.bias.data = torch.randn(6, generator=generator) * 5
    return norm.double(), layer.double(), torch.randn(50, 6, generator=generator, dtype=torch.float64)


LAYERS = {
    "linear": lambda: nn.Linear(6, 4),
    "linear without bias": lambda: nn.Linear(6, 4, bias=False),
    "convolution": lambda: nn.Conv2d(6, 4, 1),
}


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("kind", LAYERS)
def test_the_function_stays_the_same_and_channels_become_alike(kind, shift):
    norm, layer, x = norm_and(LAYERS[kind]())
    if shift and layer.bias is None:
        pytest.skip("only a bias can take up a shift")

    def run():
        y = norm(x)
        return y, layer(y.T[None, :, :, None]) if kind == "convolution" else layer(y)

    before, wanted = run()
    fold(norm, layer, before.amin(0).detach(), before.amax(0).detach(), shift)
    after, found = run()
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
    low, high = after.amin(0), after.amax(0)
    if shift:
        torch.testing.assert_close(low, low.mean().expand(6))
        torch.testing.assert_close(high, high.mean().expand(6))
    else:
        largest = torch.maximum(low.abs(), high.abs())
        torch.testing.assert_close(largest, largest.mean().expand(6))


def test_one_step_then_rounds_like_a_step_and_a_zero_point_for_each_channel():
    norm, layer, x = norm_and(nn.Linear(6, 4))
    before = norm(x).detach()
    low, high = before.amin(0), before.amax(0)
    weight, bias = layer.weight.detach().clone(), layer.bias.detach().clone()
    steps = (high - low) / 15
    by_channel = (((before - low) / steps).round() * steps + low) @ weight.T + bias
    fold(norm, layer, low, high, True)
    after = norm(x).detach()
    step = (after.max() - after.min()) / 15
    together = ((after - after.min()) / step).round() * step + after.min()
    torch.testing.assert_close(layer(together), by_channel, rtol=1e-6, atol=1e-6)


@pytest.fixture(scope="module")
def detector():
    """A micro Swin whose LayerNorms differ between channels, as trained ones do."""
    found = build_detector("vit", micro(3))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = found.build()
        for part in module.modules():
            if isinstance(part, nn.LayerNorm):
                part.weight.data.mul_(torch.randn(part.weight.shape).exp())
                part.bias.data.normal_(0, 0.5)
        found.state = module.state_dict()
    return found


@pytest.mark.parametrize("size", [96, 224])
def test_a_swin_detects_as_before_with_windows_padded_or_not(detector, size):
    module = detector.build().double()
    images = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0)).double()
    wanted = detector.head_output(module, images)
    folded = copy.deepcopy(module)
    plan = plan_layers(detector, module, QuantizationConfig())
    pairs = fold_layernorm(detector, folded, plan, feeds(detector, module, [images]))
    assert len(pairs) == 2 * 8 + 3 + 4  # blocks, patch merging, levels of the FPN
    assert set(pairs) == set(detector.normed_layers(module))
    for pair in pairs:
        assert not torch.equal(folded.get_submodule(pair.norm).weight, module.get_submodule(pair.norm).weight)
    found = detector.head_output(folded, images, None, wanted.proposals)
    for name, term in wanted.terms.items():
        torch.testing.assert_close(found.terms[name].values, term.values, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("wanted", [False, True])
def test_the_pipeline_folds_where_the_configuration_says_so(detector, wanted):
    config = ExperimentConfig(weights="none.pt", family="vit", quantization={"fold_layernorm": wanted})
    experiment = Experiment(config, torch.device("cpu"), detector, "0" * 64)
    images = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    teacher, plan = pipeline._plan(experiment)
    pipeline._fold_norms(experiment, teacher, plan, [images])
    before = detector.build().get_submodule("backbone.norm0").weight
    assert torch.equal(teacher.get_submodule("backbone.norm0").weight, before) != wanted
    assert len(plan) == len(detector.quantization_policy(teacher))


def test_layers_whose_input_stays_in_float_are_left_alone(detector):
    module = detector.build()
    images = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    config = QuantizationConfig(float_roles=("first", "output", "late", "early"))
    pairs = fold_layernorm(detector, module, plan_layers(detector, module, config), feeds(detector, module, [images]))
    assert not any(pair.layer.startswith(("neck.", "backbone.stages.0.")) for pair in pairs)
    norm = detector.build().backbone.norm0
    assert torch.equal(module.backbone.norm0.weight, norm.weight)


def test_each_pair_is_a_norm_and_a_layer_that_reads_as_many_channels(detector):
    module = detector.build()
    for pair in detector.normed_layers(module):
        assert isinstance(pair, NormedLayer)
        norm, layer = module.get_submodule(pair.norm), module.get_submodule(pair.layer)
        assert isinstance(norm, nn.LayerNorm)
        assert norm.normalized_shape == (layer.weight.shape[1],)
        assert layer.bias is not None or not pair.shift
