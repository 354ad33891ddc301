"""What is trained at which rate, how gradients are clipped, what keeps its sign, and the average."""

import copy
import math

import numpy as np
import pytest
import torch
from toy.adapter import ToyDetector

from common.config.schema import TrainingConfig
from common.distillation import trainer
from common.distillation.optimizer import (
    Optimizer,
    accumulated,
    freeze,
    parameter_groups,
    rate_factor,
    schedule,
    update_average,
    warmed_up,
)

CPU = torch.device("cpu")


def test_groups_hold_every_trainable_parameter_once_and_scales_by_themselves(student):
    student.blocks[0].bn.weight.requires_grad_(False)
    groups = parameter_groups(student)
    names = [name for group in groups.values() for name in group]
    assert sorted(names) == sorted(n for n, p in student.named_parameters() if p.requires_grad)
    assert set(groups["scales"]) == {
        f"blocks.{i}.conv.{side}_quantizer.scale" for i in (1, 2) for side in ("weight", "input")
    }
    assert "blocks.1.conv.weight" in groups["weights"]
    assert {"blocks.1.bn.weight", "output.bias"} <= set(groups["affine"])


@pytest.mark.parametrize("log_scale", [True, False])
def test_the_first_update_moves_each_group_by_its_own_rate_and_decays_no_scale(student, log_scale):
    """Adam's first step is the learning rate times the sign of the gradient, whatever its size."""
    config = TrainingConfig(
        learning_rate=1e-4, affine_learning_rate=2e-4, scale_learning_rate=3e-4, log_scale=log_scale, weight_decay=0.0
    )
    before = {name: p.detach().clone() for name, p in student.named_parameters()}
    for p in student.parameters():
        p.grad = torch.ones_like(p)
    Optimizer(student, config).update(0, 1)
    after = dict(student.named_parameters())
    for kind, rate in (("weights", 1e-4), ("affine", 2e-4)):
        for name in parameter_groups(student)[kind]:
            torch.testing.assert_close(
                before[name] - after[name], torch.full_like(before[name], rate), rtol=1e-2, atol=1e-7
            )
    for name in parameter_groups(student)["scales"]:
        moved = (before[name] / after[name]).log() if log_scale else before[name] - after[name]
        torch.testing.assert_close(moved.detach(), torch.full_like(moved, 3e-4), rtol=1e-2, atol=1e-6)


def test_weight_decay_pulls_weights_and_nothing_else(student):
    config = TrainingConfig(weight_decay=0.1)
    before = {name: p.detach().clone() for name, p in student.named_parameters()}
    for p in student.parameters():
        p.grad = torch.zeros_like(p)
    Optimizer(student, config).update(0, 1)
    changed = {name for name, p in student.named_parameters() if not torch.allclose(p, before[name], rtol=1e-6)}
    assert changed == set(parameter_groups(student)["weights"])


def test_adamw_decays_weights_apart_from_their_gradient(student):
    """Loshchilov and Hutter, arXiv 1711.05101, algorithm 2; the first update is rate (sign of gradient + decay w)."""
    config = TrainingConfig(optimizer="adamw", learning_rate=1e-2, weight_decay=0.3)
    before = {name: p.detach().clone() for name, p in student.named_parameters()}
    for p in student.parameters():
        p.grad = torch.ones_like(p)
    Optimizer(student, config).update(0, 1)
    for name, p in parameter_groups(student)["weights"].items():
        torch.testing.assert_close(p.detach(), before[name] * (1 - 0.3e-2) - 1e-2, rtol=1e-5, atol=1e-6)
    for name, p in parameter_groups(student)["affine"].items():
        torch.testing.assert_close(p.detach(), before[name] - 5e-4, rtol=1e-4, atol=1e-6)


def test_gradients_are_clipped_together(student):
    optimizer = Optimizer(student, TrainingConfig(gradient_clip=0.5, log_scale=False))
    for p in student.parameters():
        p.grad = torch.ones_like(p)
    optimizer.update(0, 1)
    norm = torch.stack([p.grad.square().sum() for p in student.parameters()]).sum().sqrt()
    assert float(norm) == pytest.approx(0.5, rel=1e-4)


def test_learning_rates_fall_to_a_hundredth():
    for kind in ("cosine", "linear"):
        config = TrainingConfig(schedule=kind)
        assert [schedule(config, done, 8) for done in (0, 4, 8)] == pytest.approx([1.0, 0.505, 0.01])
    assert schedule(TrainingConfig(), 2, 8) > schedule(TrainingConfig(schedule="linear"), 2, 8)


def test_learning_rates_by_epoch_are_those_of_torch():
    """Ultralytics' lf(epoch), and MultiStepLR; both stay as they are within an epoch."""
    by_epoch = TrainingConfig(epochs=4, schedule="linear_by_epoch")
    steps = TrainingConfig(epochs=4, schedule="steps", milestones=[1, 3])
    theirs = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    falling = torch.optim.lr_scheduler.MultiStepLR(theirs, [1, 3], 0.1)
    for epoch in range(4):
        for batch in range(3):
            done = 3 * epoch + batch
            assert schedule(by_epoch, done, 12) == pytest.approx((1 - epoch / 4) * 0.99 + 0.01)
            assert schedule(steps, done, 12) == pytest.approx(theirs.param_groups[0]["lr"])
            theirs.step()
        falling.step()


def test_the_warm_up_by_epochs_is_that_of_ultralytics():
    """BaseTrainer._do_train: np.interp over max(round(epochs * batches), 100) batches; and of `accumulate`."""
    config = TrainingConfig(epochs=10, schedule="linear_by_epoch", warmup_epochs=3, accumulate=4, warmup_bias_rate=0.1)
    batches, length = 50, 150
    for done in (0, 1, 40, 75, 149, 150, 151, 300):
        wanted = np.interp(done, [0, length], [0, 1]) * ((1 - done // batches / 10) * 0.99 + 0.01)
        assert rate_factor(config, done, 10 * batches) == pytest.approx(wanted)
        assert accumulated(config, done, 10 * batches) == max(1, int(np.interp(done, [0, length], [1, 4]).round()))
    assert warmed_up(config.model_copy(update={"warmup_epochs": 0.1}), 50, 500) == 0.5  # 100 batches at least


def test_biases_warm_up_from_a_rate_of_their_own_and_the_rest_from_zero(student):
    config = TrainingConfig(epochs=10, warmup_epochs=3, warmup_bias_rate=0.1, gradient_clip=None)
    before = {name: p.detach().clone() for name, p in student.named_parameters()}
    for p in student.parameters():
        p.grad = torch.ones_like(p)
    Optimizer(student, config).update(0, 1000)
    for name, p in student.named_parameters():
        moved = 0.1 if name.endswith("bias") else 0.0
        torch.testing.assert_close(before[name] - p.detach(), torch.full_like(p, moved), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("parts", [("weights", "scales"), ("weights", "scales", "biases", "norms"), ("norms",), ()])
def test_what_is_decayed_is_what_is_named(student, parts):
    before = {name: p.detach().clone() for name, p in student.named_parameters()}
    for p in student.parameters():
        p.grad = torch.zeros_like(p)
    config = TrainingConfig(weight_decay=0.1, decayed=parts, log_scale=False, optimizer="adamw", learning_rate=1e-2,
                            affine_learning_rate=1e-2, scale_learning_rate=1e-2)  # fmt: skip
    Optimizer(student, config).update(0, 1)
    groups = parameter_groups(student)
    norms = {name for name in groups["affine"] if ".bn." in name}
    kinds = {"weights": set(groups["weights"]), "scales": set(groups["scales"]), "norms": norms}
    kinds["biases"] = set(groups["affine"]) - norms
    wanted = {name for part in parts for name in kinds[part] if before[name].abs().max() > 0}
    assert {name for name, p in student.named_parameters() if not torch.equal(p, before[name])} == wanted


def test_stochastic_gradient_descent_is_torchs(student):
    """Two updates with momentum and decay, against torch's own on the same numbers."""
    settings = {"optimizer": "sgd", "schedule": "constant", "log_scale": False, "gradient_clip": None}
    rates = {"learning_rate": 0.1, "affine_learning_rate": 0.1, "scale_learning_rate": 0.1}
    parts = ("weights", "scales", "biases", "norms")
    config = TrainingConfig(weight_decay=0.01, decayed=parts, **settings, **rates)
    copied = [torch.nn.Parameter(p.detach().clone()) for p in student.parameters()]
    theirs = torch.optim.SGD(copied, lr=0.1, momentum=0.9, weight_decay=0.01)
    optimizer = Optimizer(student, config)
    for step in range(2):
        for p, other in zip(student.parameters(), copied, strict=True):
            p.grad = torch.full_like(p, 0.01 * (step + 1))
            other.grad = p.grad.clone()
        if step == 1:  # goes on from what was kept
            kept, optimizer = optimizer.state(), Optimizer(student, config)
            optimizer.load(kept)
        optimizer.update(step, 2)
        theirs.step()
    for p, other in zip(student.parameters(), copied, strict=True):
        torch.testing.assert_close(p.detach(), other.detach())


def test_what_is_frozen_by_name_is_not_trained(student):
    freeze(student, TrainingConfig(frozen=["blocks.1.*"]))
    trained = {name for name, p in student.named_parameters() if p.requires_grad}
    assert trained == {name for name, _ in student.named_parameters() if not name.startswith("blocks.1.")}


def test_learning_rates_rise_as_in_mmengine_and_then_stay():
    """mmengine is at the full rate one update before `end`."""
    from mmengine.optim import LinearLR

    parameter = torch.nn.Parameter(torch.zeros(1))
    theirs = torch.optim.SGD([parameter], lr=1.0)
    warm_up = LinearLR(theirs, start_factor=0.001, by_epoch=False, begin=0, end=6)
    config = TrainingConfig(schedule="constant", warm_up=5)
    for done in range(8):
        assert rate_factor(config, done, 8) == pytest.approx(theirs.param_groups[0]["lr"])
        theirs.step()
        warm_up.step()
    assert rate_factor(config, 8, 8) == 1.0
    assert rate_factor(TrainingConfig(warm_up=4), 2, 4) == pytest.approx(0.505 * 0.5005)


def test_the_first_update_of_a_warm_up_is_a_thousandth_of_the_rate(student):
    before = {name: p.detach().clone() for name, p in student.named_parameters()}
    for p in student.parameters():
        p.grad = torch.ones_like(p)
    Optimizer(student, TrainingConfig(learning_rate=1e-1, warm_up=10)).update(0, 20)
    for name, p in parameter_groups(student)["weights"].items():
        torch.testing.assert_close(before[name] - p.detach(), torch.full_like(p, 1e-4), rtol=1e-2, atol=1e-7)


def test_the_average_follows_its_formula(student):
    average = copy.deepcopy(student)
    expected = average.output.weight.detach().double()
    for n in range(5):
        student.output.weight.data.add_(1.0)
        update_average(average, student, 0.9, n)
        d = 0.9 * (1 - math.exp(-n / 10))
        expected = d * expected + (1 - d) * student.output.weight.detach().double()
    torch.testing.assert_close(average.output.weight.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["learning_rate", "affine_learning_rate", "scale_learning_rate"])
def test_what_has_a_learning_rate_of_zero_gets_no_gradient_and_does_not_count_in_the_norm(student, images, kind):
    of_group = {"learning_rate": "weights", "affine_learning_rate": "affine", "scale_learning_rate": "scales"}
    config = TrainingConfig(gradient_clip=0.5, log_scale=False, **{kind: 0.0})
    fixed = parameter_groups(student)[of_group[kind]]
    freeze(student, config)
    detector = ToyDetector()
    teacher = detector.build()
    batch, targets = images.batch([0, 1], CPU)
    job = trainer.Job(detector, teacher, images, config, 0, CPU, None, {}, [], [])
    trainer._losses(job, student, batch, targets)["loss"].backward()
    assert all(p.grad is None for p in fixed.values())
    others = [p for p in student.parameters() if p.grad is not None]
    assert others
    optimizer = Optimizer(student, config)
    for p in others:
        p.grad = torch.ones_like(p)
    optimizer.update(0, 1)
    norm = torch.stack([p.grad.square().sum() for p in others]).sum().sqrt()
    assert float(norm) == pytest.approx(0.5, rel=1e-4)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_scale_of_a_batch_norm_keeps_its_sign(student, sign):
    gamma = student.blocks[1].bn.weight
    gamma.data[:] = sign * 0.1
    optimizer = Optimizer(student, TrainingConfig(affine_learning_rate=1.0))
    for p in student.parameters():
        p.grad = torch.full_like(p, sign)  # the first update of Adam goes against the sign, by the learning rate
    optimizer.update(0, 1)
    assert (gamma.detach() * sign > 0).all()
    assert gamma.detach().abs().max() < 1e-5


@pytest.mark.parametrize("log_scale", [True, False])
def test_a_scale_that_is_pushed_towards_zero_stays_one_that_rounds(student, log_scale):
    quantizer = student.blocks[1].conv.weight_quantizer
    optimizer = Optimizer(student, TrainingConfig(scale_learning_rate=0.9, log_scale=log_scale))
    for p in student.parameters():
        p.grad = torch.ones_like(p)
    optimizer.update(0, 1)
    assert bool((quantizer.scale < 0).all()) != log_scale  # moved by 0.9, where the scale itself is moved
    weight = student.blocks[1].conv.weight.detach()
    codes = quantizer(weight).detach() / quantizer.scale.detach().abs()
    assert torch.allclose(codes, codes.round(), atol=1e-4)
    assert codes.abs().max() <= 8
    assert ((codes * weight) >= 0).all()  # a code has the sign of its weight
