"""The relative correction of BatchNorm: what it restores, what it leaves alone, and its formula in float64."""

import copy

import torch
from toy.adapter import ToyDetector

from common.detection.types import StatisticsLayer
from common.quantization.bn_correction import correct_batch_norm
from common.quantization.observers import feeds, watching

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
