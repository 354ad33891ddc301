"""The epoch that is kept, and where the numbers of training go: TensorBoard, and Weights & Biases when asked for."""

import sys
import types

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from toy.experiment import write_experiment

from common.config.load import load_config
from common.detection.types import Detections
from common.distillation import progress
from common.distillation.selection import chosen_epoch, fidelity
from common.pipeline import stages as pipeline
from common.runtime.errors import UserError


def found(*rows):
    """Detections from rows (x1, y1, x2, y2, score, label)."""
    table = torch.tensor(rows, dtype=torch.float64).reshape(-1, 6)
    return Detections(table[:, :4], table[:, 4], table[:, 5].long())


A, B, C = (0, 0, 40, 40), (50, 10, 90, 60), (100, 100, 160, 180)


def test_a_detector_agrees_wholly_with_itself_whatever_its_scores():
    teacher = {3: found((*A, 0.9, 0), (*B, 0.3, 7)), 8: found((*C, 0.2, 7))}
    fainter = {3: found((*A, 0.05, 0), (*B, 0.04, 7)), 8: found((*C, 0.02, 7))}
    assert fidelity(teacher, teacher) == fidelity(teacher, fainter) == 1


@pytest.mark.parametrize(
    ("student", "expected"),
    {
        "nothing": ([], 0.0),
        "another class": ([(*A, 0.9, 1), (*B, 0.8, 0)], 0.0),
        # Recall 1/2 at precision 1: 51 of COCO's 101 recalls.
        "one of two": ([(*A, 0.9, 0)], 51 / 101),
        # A false alarm in front: precision 1/2 up to recall 1/2, and 2/3 for the whole; the larger one counts before.
        "a false alarm of another class": ([(*C, 0.95, 5), (*A, 0.9, 0), (*B, 0.8, 1)], 2 / 3),
        "a false alarm behind": ([(*A, 0.9, 0), (*B, 0.8, 1), (*C, 0.1, 5)], 1.0),
        # IoU .9: right at the nine thresholds from .5 to .9 only. It is the exact value in float64.
        "a box too narrow": ([(0, 0, 36, 40, 0.9, 0), (*B, 0.8, 1)], (9 * 1 + 1 * (51 / 101 * 0.5)) / 10),
    }.values(),
)
def test_agreement_is_coco_s_average_precision_over_one_ranking_of_all_classes(student, expected):
    teacher = {0: found((*A, 0.9, 0), (*B, 0.5, 1))}
    assert fidelity(teacher, {0: found(*student)}) == pytest.approx(expected, abs=1e-6)


def test_the_same_box_in_another_image_is_no_agreement():
    teacher = {0: found((*A, 0.9, 0)), 1: found((*B, 0.9, 1))}
    assert fidelity(teacher, {0: found((*B, 0.9, 1)), 1: found((*A, 0.9, 0))}) == 0


def test_what_the_teacher_is_not_sure_of_is_no_object():
    teacher = {0: found((*A, 0.9, 0), (*B, 0.09, 1))}
    assert fidelity(teacher, {0: found((*A, 0.9, 0))}) == pytest.approx(1)
    assert fidelity({0: found((*B, 0.09, 1))}, {0: found((*B, 0.09, 1))}) == -1


def rows(*scores):
    return [{"epoch": i, "fidelity": a, "held_out": loss} for i, (a, loss) in enumerate(scores)]


def test_the_epoch_of_most_agreement_is_kept_then_that_of_least_loss_then_the_first():
    assert chosen_epoch(rows((0.5, 1.0), (0.6, 0.9), (0.55, 0.1))) == 1
    assert chosen_epoch(rows((-1.0, 1.0), (-1.0, 0.7), (-1.0, 0.8))) == 1
    assert chosen_epoch(rows((0.5, 1.0), (0.5, 1.0))) == 0


def test_an_epoch_that_is_worse_than_calibration_in_one_of_the_two_is_not_kept():
    assert chosen_epoch(rows((0.5, 1.0), (0.6, 1.1), (0.4, 0.1))) == 0
    assert chosen_epoch(rows((0.5, 1.0), (0.6, 1.1), (0.51, 0.99))) == 2


def test_without_held_out_images_the_last_epoch_is_kept():
    assert chosen_epoch([{"epoch": 0}, {"epoch": 1, "loss": 3.0}]) == 1
    assert chosen_epoch([]) is None


class Fake(types.ModuleType):
    """Stands for the package wandb and keeps what it is told."""

    class Error(Exception):
        """The base of all of the package's own."""

    def __init__(self):
        super().__init__("wandb")
        self.__spec__ = types.SimpleNamespace(name="wandb")
        self.settings, self.logged, self.finished = [], [], 0

    def init(self, **settings):
        self.settings.append(settings)
        return self

    def log(self, values, step):
        self.logged.append((step, values))

    def finish(self):
        self.finished += 1


@pytest.fixture
def wandb(monkeypatch):
    fake = Fake()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def events(run):
    found = EventAccumulator(str(run / "training" / "tensorboard"))
    found.Reload()
    return {name: [(e.step, e.value) for e in found.Scalars(name)] for name in found.Tags()["scalars"]}


def test_every_epoch_goes_to_both_when_a_project_is_named(tmp_path, wandb):
    run = pipeline.train(load_config(write_experiment(tmp_path), ["training.wandb=zsqdet"]))
    assert [step for step, _ in wandb.logged] == [1, 2]
    board = events(run)
    for step, values in wandb.logged:
        for name, value in values.items():
            assert dict(board[name])[step] == pytest.approx(value, rel=1e-6)
    assert {"loss", "held_out", "rate"} <= board.keys()
    assert wandb.settings[0]["project"] == "zsqdet"
    assert wandb.settings[0]["name"] == "run"
    assert wandb.finished == 1


def test_interrupted_training_goes_on_in_the_same_online_run(tmp_path, wandb):
    for first in (0, 1):
        with progress.scalars(tmp_path / "run/training", first, "zsqdet") as write:
            write(first + 1, {"loss": 1.0})
    assert wandb.settings[0] == wandb.settings[1]
    assert wandb.settings[0]["resume"] == "allow"
    with progress.scalars(tmp_path / "other/training", 0, "zsqdet"):
        pass
    assert wandb.settings[2]["id"] != wandb.settings[0]["id"]


def test_without_a_project_nothing_goes_online(tmp_path, wandb):
    run = pipeline.train(load_config(write_experiment(tmp_path)))
    assert wandb.settings == []
    assert len(events(run)["loss"]) == 2


def test_a_project_without_the_package_is_one_line_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr(progress, "find_spec", lambda name: None)
    config = load_config(write_experiment(tmp_path), ["training.wandb=zsqdet"])
    with pytest.raises(UserError, match="pip install wandb") as caught:
        pipeline.run(config)
    assert "\n" not in str(caught.value)
    assert not config.run_dir.exists()
    assert not config.synthesis.directory.exists()


def test_a_server_that_does_not_know_the_user_is_one_line_and_the_run_goes_on_without(tmp_path, wandb, monkeypatch):
    def refuse(**settings):
        raise wandb.Error("api_key not configured\n(no-tty)")

    path = write_experiment(tmp_path)
    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(UserError, match=r"training.wandb: api_key not configured \(no-tty\); run `wandb login`"):
        pipeline.train(load_config(path, ["training.wandb=zsqdet"]))
    run = pipeline.train(load_config(path))
    assert len(events(run)["loss"]) == 2


def test_a_project_may_be_named_later_on(tmp_path, wandb):
    path = write_experiment(tmp_path)
    pipeline.train(load_config(path, ["training.epochs=0"]))
    assert pipeline.train(load_config(path, ["training.epochs=0", "training.wandb=zsqdet"]))
