"""Training of the quantized copy: losses by their formulas, what is trained how, and exactness of going on."""

import copy
import json
import shutil

import numpy as np
import pytest
import safetensors.torch
import torch
from toy.adapter import Block, ToyDetector

from common.checkpoints.read import load_tensors, save_tensors
from common.config.schema import TrainingConfig
from common.detection.prediction_distance import prediction_distance
from common.detection.types import HeadOutput, HeadTerm, Targets
from common.distillation import trainer
from common.distillation.augment import augment
from common.distillation.losses import flat_kl_loss, mse_loss, relative_loss
from common.distillation.optimizer import learning_rates, parameter_groups
from common.distillation.progress import load_state
from common.distillation.selection import detections, fidelity
from common.runtime.errors import UserError

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
def test_the_prediction_distance_is_the_divergence_of_each_row_weighted_by_the_surer_of_the_two(pair, kind):
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
    found = prediction_distance(output(teacher, kind, ours), output(student, kind, theirs))
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
    loss = prediction_distance(output(teacher, kind, ours), output(student, kind, ours))
    loss = loss + flat_kl_loss((teacher,), (student,), 4.0) + relative_loss({"a": teacher}, {"a": student})
    loss.backward()
    assert float(loss.detach()) == pytest.approx(0, abs=1e-5)
    assert student.grad.abs().max() < 1e-5


def test_losses_are_means_over_images(pair):
    teacher, student, (ours, theirs) = pair
    alone = [
        prediction_distance(
            output(teacher[i : i + 1], "softmax", ours[i : i + 1]),
            output(student[i : i + 1], "softmax", theirs[i : i + 1]),
        )
        for i in range(2)
    ]
    both = prediction_distance(output(teacher, "softmax", ours), output(student, "softmax", theirs))
    torch.testing.assert_close(both, torch.stack(alone).mean())


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


def run(student, images, folder, **settings):
    detector = ToyDetector()
    teacher = detector.build()
    config = TrainingConfig(**({"epochs": 4, "batch_size": 2, "holdout": 0.25, "learning_rate": 1e-3} | settings))
    trainer.train(detector, teacher, student, images, config, seed=0, device=CPU, directory=folder)
    rows = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    return student, rows


LOSSES = {
    "default": {},
    "published": {"preset": "paper", "epochs": 4, "learning_rate": 1e-3, "warmup_epochs": 0, "accumulate": 1},
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


RESUMED = [
    {},
    {"log_scale": False, "freeze_batch_norm": False, "selection": "last"},
    {"optimizer": "sgd", "accumulate": 2, "warmup_epochs": 1},
]


@pytest.mark.parametrize("settings", RESUMED)
def test_n_epochs_resume_and_n_more_are_2n_epochs_bit_for_bit(student, images, tmp_path, monkeypatch, settings):
    whole, rows = run(copy.deepcopy(student), images, tmp_path / "whole", **settings)
    original = trainer.train_epoch

    def stopped(job, module, average, optimizer, progress, bar):
        if progress.epoch == 2:
            raise KeyboardInterrupt
        return original(job, module, average, optimizer, progress, bar)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "train_epoch", stopped)
        with pytest.raises(KeyboardInterrupt):
            run(copy.deepcopy(student), images, tmp_path / "parts", **settings)
    resumed, again = run(copy.deepcopy(student), images, tmp_path / "parts", **settings)
    state, expected = resumed.state_dict(), whole.state_dict()
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    assert [{k: v for k, v in row.items() if k != "seconds"} for row in again] == [
        {k: v for k, v in row.items() if k != "seconds"} for row in rows
    ]


def test_batches_whose_gradients_are_added_up_are_one_batch_of_their_sum(student, images, tmp_path):
    settings = {
        "optimizer": "sgd",
        "epochs": 2,
        "holdout": 0.25,
        "flip": False,
        "zoom": (1.0, 1.0),
        "selection": "last",
        "schedule": "constant",
    }
    settings |= {"log_scale": False, "gradient_clip": None, "ema_decay": 0.0, "logit_weight": 0.0}
    settings["scale_learning_rate"] = 0.0  # their gradients depend on the size of a batch
    whole, _ = run(copy.deepcopy(student), images, tmp_path / "whole", batch_size=8, **settings)
    rates = {name: rate / 4 for name, rate in learning_rates(TrainingConfig(learning_rate=1e-3)).items()}
    named = {"learning_rate": "weights", "affine_learning_rate": "affine"}
    settings |= {key: rates[kind] for key, kind in named.items()}
    parts, _ = run(student, images, tmp_path / "parts", batch_size=2, accumulate=4, **settings)
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(parts.state_dict()[name], value, rtol=1e-4, atol=1e-6)


def test_training_ends_after_so_many_epochs_without_a_better_one(student, images, tmp_path, monkeypatch):
    _, rows = run(student, images, tmp_path / "run", epochs=9, learning_rate=0.5, patience=2)
    best = max(range(len(rows)), key=lambda i: (rows[i]["fidelity"], -i))
    assert len(rows) - 1 <= best + 2 < 9
    _, repeated = run(copy.deepcopy(student), images, tmp_path / "run", epochs=9, learning_rate=0.5, patience=2)
    assert repeated == rows


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
    allowed = [r for r in rows if r["fidelity"] >= rows[0]["fidelity"] and r["held_out"] <= rows[0]["held_out"]]
    best = max(allowed, key=lambda row: (row["fidelity"], -row["held_out"]))
    progress, parts = load_state(tmp_path / "run")
    assert progress.best_epoch == best["epoch"]
    assert all(torch.equal(value, parts["best"][name]) for name, value in trained.state_dict().items())
    # The same from the outside: the split's images, both detectors as they are now.
    detector = ToyDetector()
    held_out = trainer.split(COUNT, TrainingConfig(holdout=0.25), 0)[1]
    batch = [(held_out, images.batch(held_out, CPU)[0])]
    seen, found = (detections(detector, module, batch) for module in (detector.build(), trained))
    assert fidelity(seen, found) == pytest.approx(best["fidelity"], abs=1e-9)


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


def test_a_damaged_state_is_named_and_training_starts_over(student, images, tmp_path, caplog):
    run(copy.deepcopy(student), images, tmp_path / "run", epochs=1)
    state = tmp_path / "run" / "state.safetensors"
    whole = state.read_bytes()
    state.write_bytes(whole[:100])
    run(copy.deepcopy(student), images, tmp_path / "run", epochs=1)
    assert f"{state}: damaged safetensors file" in caplog.text
    assert "training starts over" in caplog.text
    first, again = (safetensors.torch.load(content) for content in (whole, state.read_bytes()))
    assert all(torch.equal(again[name], value) for name, value in first.items())


def first_nan(tensors, part):
    name = next(name for name, value in tensors.items() if name.startswith(part) and value.is_floating_point())
    tensors[name].view(-1)[0] = float("nan")


WRONG_STATES = {
    "nan in the student": lambda tensors, about: first_nan(tensors, "student/"),
    "nan in the average": lambda tensors, about: first_nan(tensors, "average/"),
    "nan in the chosen one": lambda tensors, about: first_nan(tensors, "best/"),
    "nan in the optimizer": lambda tensors, about: first_nan(tensors, "optimizer/"),
    "nothing": lambda tensors, about: about.clear(),
    "more": lambda tensors, about: about.update(more=1),
    "a text": lambda tensors, about: about.update(epoch="1"),
    "a list": lambda tensors, about: about.update(updates=[]),
    "below 0": lambda tensors, about: about.update(epoch=-1),
    "another epoch": lambda tensors, about: about.update(epoch=10**9),
    "a chosen epoch to come": lambda tensors, about: about.update(best_epoch=7),
    "a history of text": lambda tensors, about: about.update(history="epoch"),
    "rows of numbers": lambda tensors, about: about.update(history=[0, 1]),
    "no row": lambda tensors, about: about.update(history=[]),
}


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """Where the folder of a training of one epoch is kept for the tests that change a copy of it."""
    return tmp_path_factory.mktemp("kept") / "run"


@pytest.mark.parametrize("kind", WRONG_STATES)
def test_a_state_that_training_cannot_have_written_is_named_and_training_starts_over(
    student, images, tmp_path, caplog, kind, kept
):
    if not kept.exists():
        run(copy.deepcopy(student), images, kept, epochs=1)
    shutil.copytree(kept, tmp_path / "run")
    rows = [json.loads(line) for line in (kept / "history.jsonl").read_text().splitlines()]
    path = tmp_path / "run/state.safetensors"
    tensors, about = load_tensors(path)
    WRONG_STATES[kind](tensors, about)
    save_tensors(path, tensors, about)  # with the right checksum
    _, again = run(student, images, tmp_path / "run", epochs=1)
    assert "state.safetensors: " in caplog.text
    assert "; training starts over" in caplog.text
    assert [row["held_out"] for row in again] == [row["held_out"] for row in rows]


def test_a_state_of_another_detector_is_one_line(student, images, tmp_path):
    run(copy.deepcopy(student), images, tmp_path / "run", epochs=1)
    path = tmp_path / "run/state.safetensors"
    tensors, about = load_tensors(path)
    for part in ("student/", "optimizer/"):
        changed = {n: value[..., None] if n.startswith(part) else value for n, value in tensors.items()}
        for state in (changed, {n: value for n, value in tensors.items() if not n.startswith(part)}):
            save_tensors(path, state, about)
            with pytest.raises(UserError, match=r"of another detector; remove it to start over") as caught:
                run(copy.deepcopy(student), images, tmp_path / "run", epochs=1)
            assert "\n" not in str(caught.value)


def test_training_of_which_nothing_is_learnt_goes_on_as_well(student, images, tmp_path):
    still = {"learning_rate": 0.0, "affine_learning_rate": 0.0, "scale_learning_rate": 0.0}
    run(copy.deepcopy(student), images, tmp_path / "run", epochs=1, **still)
    _, rows = run(copy.deepcopy(student), images, tmp_path / "run", epochs=2, **still)
    assert [row["epoch"] for row in rows] == [0, 1, 2]


def test_maps_of_other_regions_are_left_out_of_the_published_feature_loss():
    teacher = {"conv": torch.ones(2, 3), "regions": torch.ones(24, 3)}
    student = {"conv": torch.zeros(2, 3), "regions": torch.zeros(64, 3)}
    assert mse_loss(teacher, student).item() == 1.0


def test_training_with_fixed_weights_leaves_them_as_they_are_and_moves_the_rest(student, images, tmp_path):
    before = copy.deepcopy(student.state_dict())
    after, _ = run(student, images, tmp_path / "run", learning_rate=0.0, selection="last", epochs=2)
    moved = {name for name, p in after.named_parameters() if not torch.equal(p, before[name])}
    groups = parameter_groups(ToyDetector().build())
    assert moved
    assert not moved & set(groups["weights"])


class Overwriting(Block):
    """Adds to its BatchNorm's output in place, as torchvision's `out += identity`."""

    def forward(self, x):
        out = self.bn(self.conv(x))
        out += 100.0
        return torch.relu(out)


def test_feature_maps_are_compared_as_the_layers_gave_them_whatever_overwrites_them(images):
    detector = ToyDetector()
    teacher = detector.build()
    teacher.blocks[1].__class__ = Overwriting
    batch = images.batch([0], CPU)[0]
    config = TrainingConfig(preset="paper")
    features = trainer.features_of(detector, teacher, batch, config)
    assert [name for name, changed in features.items() if changed] == ["blocks.1.bn"]
    job = trainer.Job(detector, teacher, images, config, 0, CPU, None, features, [], [])
    with torch.no_grad():
        _, found = trainer._run(job, teacher, batch, None, None)
        wanted = teacher.blocks[1].bn(found["blocks.1.conv"])
    torch.testing.assert_close(found["blocks.1.bn"], wanted)
