"""BatchNorm's relative correction and channels evened out after a LayerNorm: what each changes, and its formula."""

import copy

import pytest
import torch
from torch import nn
from toy.adapter import ToyDetector

from common.config.schema import ExperimentConfig, QuantizationConfig
from common.detection.detector import build_detector
from common.detection.types import NormedLayer, StatisticsLayer
from common.pipeline import stages as pipeline
from common.pipeline.measure import Experiment
from common.quantization import feeds, fold_layernorm, plan_layers
from common.quantization.hooks import watching
from common.quantization.norms import correct_batch_norm, fold
from tools.shapes.train_vit import micro

LAYERS = ToyDetector().statistics_layers(ToyDetector().build())
NAMES = [layer.batch_norm for layer in LAYERS]


def batches(count=3, size=4, scale=1.0):
    """Images that differ from batch to batch, so that no batch alone has the statistics of all."""
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(size, 3, 32, 32, generator=generator) * scale * (i + 1) / count for i in range(count)]


def perturbed(teacher, *blocks, strength=0.3):
    student = copy.deepcopy(teacher)
    generator = torch.Generator().manual_seed(1)
    for block in blocks:
        weight = student.blocks[block].conv.weight
        weight.data += strength * weight.std().item() * torch.randn(weight.shape, generator=generator)
        weight.data *= 1.3
    return student


def corrected(teacher, student, layers, images):
    correct_batch_norm(teacher, student, layers, feeds(ToyDetector(), teacher, images))


@torch.no_grad()
def moments(module, images, side):
    """Mean and standard deviation of each channel of each BatchNorm's inputs or outputs over all images, float64."""
    seen = {name: [] for name in NAMES}
    with watching(module, NAMES, **{side: lambda name, x: seen[name].append(x.double())}):
        for batch in images:
            module(batch)
    joined = {name: torch.cat(parts) for name, parts in seen.items()}
    return {name: (x.mean((0, 2, 3)), x.std((0, 2, 3), correction=0)) for name, x in joined.items()}


def farthest(first, second):
    return max((a - b).abs().max().item() for a, b in zip(first, second, strict=True))


def test_a_layer_is_measured_behind_the_corrected_ones_before_it():
    """With everything in one batch, the input of the second layer is the one it has in the finished student."""
    teacher = ToyDetector().build()
    student, images = perturbed(teacher, 0, 1), [torch.cat(batches())]
    corrected(teacher, student, LAYERS, images)
    (mu_t, _), (mu_s, _) = (moments(m, images, "inputs")[NAMES[1]] for m in (teacher, student))
    shift = student.blocks[1].bn.running_mean.double() - teacher.blocks[1].bn.running_mean.double()
    assert torch.allclose(shift, mu_s - mu_t, atol=1e-5)


def test_the_spread_of_every_output_is_the_teachers_again():
    teacher = ToyDetector().build()
    student, images = perturbed(teacher, 0, 1, 2), [torch.cat(batches())]
    wanted = moments(teacher, images, "outputs")
    before = moments(student, images, "outputs")
    corrected(teacher, student, LAYERS, images)
    after = moments(student, images, "outputs")
    for name in NAMES:
        assert (after[name][1] - wanted[name][1]).abs().max() < 0.01 * (before[name][1] - wanted[name][1]).abs().max()


def test_the_formula():
    """mean = mean_T + mu_S - mu_T and var = var_T var(S) / var(T), for a single layer in float64."""
    teacher = ToyDetector().build()
    student, images = perturbed(teacher, 0), batches()
    (mu_t, sigma_t), (mu_s, sigma_s) = (moments(m, images, "inputs")[NAMES[0]] for m in (teacher, student))
    norm = teacher.blocks[0].bn
    mean_t, var_t = norm.running_mean.double(), norm.running_var.double()
    corrected(teacher, student, LAYERS, images)
    a = sigma_s / sigma_t
    assert (a - 1).abs().max() > 0.1
    assert torch.allclose(student.blocks[0].bn.running_var.double(), var_t * a**2, rtol=1e-5)
    assert torch.allclose(student.blocks[0].bn.running_mean.double(), mean_t + mu_s - mu_t, atol=1e-6)


def test_a_student_that_is_the_teacher_keeps_every_bit():
    teacher = ToyDetector().build()
    student = copy.deepcopy(teacher)
    corrected(teacher, student, LAYERS, batches())
    state = teacher.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in student.state_dict().items())


def test_only_running_statistics_of_the_student_change():
    teacher = ToyDetector().build()
    student, reference = perturbed(teacher, 0, 1), copy.deepcopy(teacher.state_dict())
    before = copy.deepcopy(student.state_dict())
    corrected(teacher, student, LAYERS, batches())
    assert all(torch.equal(value, reference[key]) for key, value in teacher.state_dict().items())
    changed = {key for key, value in student.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == {f"{name}.running_{kind}" for name in NAMES for kind in ("mean", "var")}
    assert not any(m._forward_pre_hooks or m._forward_hooks for x in (teacher, student) for m in x.modules())


def test_only_the_named_layers_are_corrected():
    teacher = ToyDetector().build()
    student = perturbed(teacher, 0, 1)
    corrected(teacher, student, [StatisticsLayer("blocks.1.conv", "blocks.1.bn")], batches())
    state = teacher.state_dict()
    for name in ("blocks.0.bn", "blocks.2.bn"):
        assert torch.equal(student.get_submodule(name).running_var, state[f"{name}.running_var"])
    assert not torch.equal(student.blocks[1].bn.running_var, state["blocks.1.bn.running_var"])


def test_a_channel_that_never_changes_stays_finite():
    teacher = ToyDetector().build()
    for module in (teacher, student := copy.deepcopy(teacher)):
        module.blocks[0].conv.weight.data[3] = 0
    student.blocks[0].conv.weight.data[4] *= 1.5
    corrected(teacher, student, LAYERS, batches())
    assert all(value.isfinite().all() for value in student.state_dict().values())
    assert (student.blocks[0].bn.running_var > 0).all()
    assert torch.equal(student.blocks[0].bn.running_var[3], teacher.blocks[0].bn.running_var[3])


def test_how_the_images_are_batched_makes_no_difference():
    teacher, images = ToyDetector().build(), torch.cat(batches())
    found = []
    for size in (3, 12):
        student = perturbed(teacher, 0)
        corrected(teacher, student, LAYERS[:1], images.split(size))
        found.append(student.blocks[0].bn)
    assert torch.allclose(found[0].running_mean, found[1].running_mean, atol=1e-6)
    assert torch.allclose(found[0].running_var, found[1].running_var, rtol=1e-5)


def norm_and(layer):
    """A LayerNorm whose channels differ by orders of magnitude, before `layer`, and float64 inputs for it."""
    generator = torch.Generator().manual_seed(0)
    norm = nn.LayerNorm(6)
    norm.weight.data = 10 ** torch.linspace(-1.5, 1.5, 6)
    norm.bias.data = torch.randn(6, generator=generator) * 5
    return norm.double(), layer.double(), torch.randn(50, 6, generator=generator, dtype=torch.float64)


AFTER_A_NORM = {
    "linear": lambda: nn.Linear(6, 4),
    "linear without bias": lambda: nn.Linear(6, 4, bias=False),
    "convolution": lambda: nn.Conv2d(6, 4, 1),
}


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("kind", AFTER_A_NORM)
def test_the_function_stays_the_same_and_channels_become_alike(kind, shift):
    norm, layer, x = norm_and(AFTER_A_NORM[kind]())
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
