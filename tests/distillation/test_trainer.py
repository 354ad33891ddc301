"""Training of the quantized copy: losses by their formulas, what is trained how, and exactness of going on."""

import copy
import json
import math

import numpy as np
import pytest
import torch
from toy.adapter import ToyDetector

from common.config.schema import QuantizationConfig, TrainingConfig
from common.detection.prediction_distance import rows_loss
from common.detection.types import HeadOutput, HeadTerm, Targets
from common.distillation import trainer
from common.distillation.augment import augment
from common.distillation.losses import flat_kl_loss, mse_loss, relative_loss
from common.distillation.optimizer import Optimizer, parameter_groups, rate_factor, schedule, update_average
from common.distillation.selection import agreement, detections
from common.distillation.state import load_state
from common.quantization import calibrate, plan_layers, quantize
from common.runtime.errors import UserError
from common.synthesis.imageset import IMAGES, ImageSet, coco, image_name, write_image

CPU = torch.device("cpu")
SIZE, COUNT = 32, 8


def softmax(x, axis):
    e = np.exp(x - x.max(axis, keepdims=True))
    return e / e.sum(axis, keepdims=True)


def output(values, kind, confidence):
    return HeadOutput({"t": HeadTerm(values, kind, confidence)}, (values,))


@pytest.fixture
def pair():
    g = torch.Generator().manual_seed(0)
    teacher, student = (torch.randn(2, 5, 4, 3, generator=g) * 2 for _ in range(2))
    confidence = torch.rand(2, 2, 5, generator=g)
    return teacher, student, confidence


@pytest.mark.parametrize("kind", ["sigmoid", "softmax", "offset"])
def test_rows_loss_is_the_divergence_of_each_row_weighted_by_the_surer_of_the_two(pair, kind):
    teacher, student, (ours, theirs) = pair
    t, s = teacher.double().numpy(), student.double().numpy()
    if kind == "sigmoid":
        p, q = 1 / (1 + np.exp(-t)), 1 / (1 + np.exp(-s))
        rows = (p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))).sum((2, 3))
    elif kind == "softmax":
        p, q = softmax(t, -1), softmax(s, -1)
        rows = (p * np.log(p / q)).sum((2, 3))
    else:
        d = np.abs(s - t)
        rows = np.where(d < 1, d**2 / 2, d - 0.5).sum((2, 3))
    weight = torch.maximum(ours, theirs).double().numpy()
    expected = ((weight * rows).sum(1) / weight.sum(1)).mean()
    found = rows_loss(output(teacher, kind, ours), output(student, kind, theirs))
    assert float(found) == pytest.approx(expected, rel=1e-5)


def test_flat_kl_is_the_published_loss(pair):
    teacher, student, _ = pair
    expected = 0.0
    for t, s in ((teacher, student), (teacher[:, :2], student[:, :2])):
        p, q = (softmax(x.double().numpy().reshape(2, -1) / 4.0, 1) for x in (t, s))
        expected += 16.0 * (p * np.log(p / q)).sum() / 2
    found = flat_kl_loss((teacher, teacher[:, :2]), (student, student[:, :2]), 4.0)
    assert float(found) == pytest.approx(expected, rel=1e-5)


def test_feature_losses_are_relative_errors_or_plain_means(pair):
    teacher, student, _ = pair
    maps = {"a": teacher, "b": teacher[:, :2] * 10}, {"a": student, "b": student[:, :2] * 10}
    error = [((s - t) ** 2).double() for t, s in zip(maps[0].values(), maps[1].values(), strict=True)]
    power = [(t**2).double() for t in maps[0].values()]
    relative = np.mean([float((e.sum((1, 2, 3)) / p.sum((1, 2, 3))).mean()) for e, p in zip(error, power, strict=True)])
    assert float(relative_loss(*maps)) == pytest.approx(relative, rel=1e-5)
    assert float(mse_loss(*maps)) == pytest.approx(np.mean([float(e.mean()) for e in error]), rel=1e-5)


@pytest.mark.parametrize("kind", ["sigmoid", "softmax", "offset"])
def test_no_loss_and_no_gradient_where_the_student_is_the_teacher(pair, kind):
    teacher, _, (ours, _) = pair
    student = teacher.clone().requires_grad_()
    loss = rows_loss(output(teacher, kind, ours), output(student, kind, ours))
    loss = loss + flat_kl_loss((teacher,), (student,), 4.0) + relative_loss({"a": teacher}, {"a": student})
    loss.backward()
    assert float(loss.detach()) == pytest.approx(0, abs=1e-5)
    assert student.grad.abs().max() < 1e-5


def test_losses_are_means_over_images(pair):
    teacher, student, (ours, theirs) = pair
    alone = [
        rows_loss(
            output(teacher[i : i + 1], "softmax", ours[i : i + 1]),
            output(student[i : i + 1], "softmax", theirs[i : i + 1]),
        )
        for i in range(2)
    ]
    both = rows_loss(output(teacher, "softmax", ours), output(student, "softmax", theirs))
    torch.testing.assert_close(both, torch.stack(alone).mean())


@pytest.fixture
def student():
    detector = ToyDetector()
    teacher = detector.build()
    config = QuantizationConfig(weight_bits=4, activation_bits=4)
    plan = plan_layers(detector, teacher, config)
    module = quantize(teacher, plan, config)
    batch = torch.rand(4, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    calibrate(detector, teacher, module, plan, [batch], config)
    return module


def test_groups_hold_every_trainable_parameter_once_and_steps_by_themselves(student):
    student.blocks[0].bn.weight.requires_grad_(False)
    groups = parameter_groups(student)
    names = [name for group in groups.values() for name in group]
    assert sorted(names) == sorted(n for n, p in student.named_parameters() if p.requires_grad)
    assert set(groups["steps"]) == {
        f"blocks.{i}.conv.{side}_quantizer.step" for i in (1, 2) for side in ("weight", "input")
    }
    assert "blocks.1.conv.weight" in groups["weights"]
    assert {"blocks.1.bn.weight", "output.bias"} <= set(groups["affine"])


@pytest.mark.parametrize("log_scale", [True, False])
def test_the_first_update_moves_each_group_by_its_own_rate_and_decays_no_step(student, log_scale):
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
    for name in parameter_groups(student)["steps"]:
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
    for kind, middle in (("cosine", 0.505), ("linear", 0.505)):
        assert schedule(kind, 0.0) == pytest.approx(1.0)
        assert schedule(kind, 0.5) == pytest.approx(middle)
        assert schedule(kind, 1.0) == pytest.approx(0.01)
    assert schedule("cosine", 0.25) > schedule("linear", 0.25)


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


def test_augmentation_moves_boxes_with_their_pixels():
    generator = torch.Generator().manual_seed(1)
    for _ in range(50):
        image = torch.zeros(1, 3, 64, 64)
        image[:, :, 20:44, 12:40] = 1.0
        target = Targets(torch.tensor([[12.0, 20.0, 40.0, 44.0]]), torch.tensor([1]))
        changed, (moved,) = augment(image, [target], True, (0.6, 1.5), torch.rand(1, 4, generator=generator))
        assert changed.shape == image.shape
        rows, columns = (changed[0, 0] > 0.75).any(1).nonzero(), (changed[0, 0] > 0.75).any(0).nonzero()
        if len(moved.boxes) and len(rows):
            seen = torch.tensor([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]).float()
            assert (moved.boxes[0] - seen).abs().max() <= 1.5


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "set"
    generator = torch.Generator().manual_seed(2)
    targets = [Targets(torch.tensor([[4.0, 4.0, 24.0, 20.0]]), torch.tensor([i % 2])) for i in range(COUNT)]
    for i in range(COUNT):
        pixels = torch.randint(0, 256, (3, SIZE, SIZE), dtype=torch.uint8, generator=generator)
        write_image(folder / IMAGES / image_name(i), pixels)
    content = coco(targets, [(SIZE, SIZE)] * COUNT, ToyDetector().class_names)
    (folder / "annotations.json").write_text(json.dumps(content))
    (folder / "set.json").write_text("{}")
    return ImageSet(folder)


def run(student, images, folder, **settings):
    detector = ToyDetector()
    teacher = detector.build()
    config = TrainingConfig(**({"epochs": 4, "batch_size": 2, "holdout": 0.25, "learning_rate": 1e-3} | settings))
    trainer.train(detector, teacher, student, images, config, seed=0, device=CPU, directory=folder)
    rows = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    return student, rows


LOSSES = {
    "default": {},
    "published": {"preset": "paper", "epochs": 4, "learning_rate": 1e-3},
    "task only": {"task_weight": 1.0, "logit_weight": 0.0, "feature_weight": 0.0},
}


@pytest.mark.parametrize("settings", LOSSES.values(), ids=LOSSES)
def test_every_loss_falls_on_the_images_it_is_trained_on(student, images, tmp_path, settings):
    settings = {"epochs": 12, "flip": False, "zoom": (1.0, 1.0), "freeze_batch_norm": True} | settings
    _, rows = run(student, images, tmp_path / "run", **(settings | {"epochs": 12}))
    losses = [row["loss"] for row in rows if "loss" in row]
    assert losses[-1] < 0.97 * losses[0]


def test_the_teacher_is_bit_identical_afterwards(student, images, tmp_path, monkeypatch):
    kept = []
    original = ToyDetector.build
    monkeypatch.setattr(ToyDetector, "build", lambda self: kept.append(original(self)) or kept[-1])
    run(student, images, tmp_path / "run", freeze_batch_norm=False)
    state, fresh = kept[-1].state_dict(), original(ToyDetector()).state_dict()
    assert all(torch.equal(state[name], fresh[name]) for name in fresh)


@pytest.mark.parametrize("settings", [{}, {"log_scale": False, "freeze_batch_norm": False, "selection": "last"}])
def test_n_epochs_resume_and_n_more_are_2n_epochs_bit_for_bit(student, images, tmp_path, monkeypatch, settings):
    whole, rows = run(copy.deepcopy(student), images, tmp_path / "whole", **settings)
    original = trainer._train_epoch

    def stopped(job, module, average, optimizer, progress, bar):
        if progress.epoch == 2:
            raise KeyboardInterrupt
        return original(job, module, average, optimizer, progress, bar)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "_train_epoch", stopped)
        with pytest.raises(KeyboardInterrupt):
            run(copy.deepcopy(student), images, tmp_path / "parts", **settings)
    resumed, again = run(copy.deepcopy(student), images, tmp_path / "parts", **settings)
    state, expected = resumed.state_dict(), whole.state_dict()
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    assert [{k: v for k, v in row.items() if k != "seconds"} for row in again] == [
        {k: v for k, v in row.items() if k != "seconds"} for row in rows
    ]


def test_running_statistics_move_only_if_they_may(student, images, tmp_path):
    before = student.blocks[1].bn.running_mean.clone()
    frozen, _ = run(copy.deepcopy(student), images, tmp_path / "a")
    moving, _ = run(copy.deepcopy(student), images, tmp_path / "b", freeze_batch_norm=False, selection="last")
    assert torch.equal(frozen.blocks[1].bn.running_mean, before)
    assert not torch.equal(moving.blocks[1].bn.running_mean, before)


def test_training_that_only_harms_keeps_the_calibrated_detector(student, images, tmp_path):
    before = copy.deepcopy(student.state_dict())
    after, rows = run(student, images, tmp_path / "run", learning_rate=1.0, affine_learning_rate=1.0)
    assert load_state(tmp_path / "run")[0].best_epoch == 0
    assert rows[-1]["held_out"] > rows[0]["held_out"]
    assert all(torch.equal(value, before[name]) for name, value in after.state_dict().items())


def test_the_epoch_that_detects_most_like_the_teacher_on_held_out_images_is_taken(student, images, tmp_path):
    trained, rows = run(student, images, tmp_path / "run", epochs=6)
    assert [row["epoch"] for row in rows] == list(range(7))
    allowed = [r for r in rows if r["agreement"] >= rows[0]["agreement"] and r["held_out"] <= rows[0]["held_out"]]
    best = max(allowed, key=lambda row: (row["agreement"], -row["held_out"]))
    progress, parts = load_state(tmp_path / "run")
    assert progress.best_epoch == best["epoch"]
    assert all(torch.equal(value, parts["best"][name]) for name, value in trained.state_dict().items())
    # The same from the outside: the split's images, both detectors as they are now.
    detector = ToyDetector()
    held_out = trainer.split(COUNT, TrainingConfig(holdout=0.25), 0)[1]
    batch = [(held_out, images.batch(held_out, CPU)[0])]
    seen, found = (detections(detector, module, batch) for module in (detector.build(), trained))
    assert agreement(seen, found) == pytest.approx(best["agreement"], abs=1e-9)


def test_a_loss_that_is_not_finite_stops_training_with_advice_and_keeps_what_was(
    student, images, tmp_path, monkeypatch
):
    original = trainer._losses

    def broken(job, module, batch, targets):
        found = original(job, module, batch, targets)
        return {name: value * float("nan") for name, value in found.items()} if module.training_broken else found

    student.training_broken = True
    monkeypatch.setattr(trainer, "_losses", broken)
    detector = ToyDetector()
    config = TrainingConfig(epochs=2, batch_size=2, selection="last")
    with pytest.raises(UserError, match=r"not finite any more in epoch 1.*lower training.learning_rate"):
        trainer.train(detector, detector.build(), student, images, config, seed=0, device=CPU, directory=tmp_path / "r")
    assert not (tmp_path / "r" / "state.safetensors").exists()


def test_a_set_too_small_for_a_share_to_hold_out_is_named(student, images, tmp_path):
    with pytest.raises(UserError, match=r"training.selection: holdout needs at least 2 images.*selection=last"):
        run(student, images, tmp_path / "run", holdout=0.99)


def test_a_damaged_state_is_one_line_and_is_not_overwritten(student, images, tmp_path):
    run(copy.deepcopy(student), images, tmp_path / "run", epochs=1)
    state = tmp_path / "run" / "state.safetensors"
    state.write_bytes(state.read_bytes()[:100])
    with pytest.raises(UserError, match="damaged safetensors file"):
        run(copy.deepcopy(student), images, tmp_path / "run", epochs=2)
    assert state.stat().st_size == 100


def test_maps_of_other_regions_are_left_out_of_the_published_feature_loss():
    teacher = {"conv": torch.ones(2, 3), "regions": torch.ones(24, 3)}
    student = {"conv": torch.zeros(2, 3), "regions": torch.zeros(64, 3)}
    assert mse_loss(teacher, student).item() == 1.0
