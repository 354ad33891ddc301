"""The numbers of training go to TensorBoard, and to Weights & Biases only when asked for and installed."""

import sys
import types

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from toy.experiment import write_experiment

from common.config.load import load_config
from common.distillation import scalars
from common.pipeline import stages as pipeline
from common.runtime.errors import UserError


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
        with scalars.scalars(tmp_path / "run/training", first, "zsqdet") as write:
            write(first + 1, {"loss": 1.0})
    assert wandb.settings[0] == wandb.settings[1]
    assert wandb.settings[0]["resume"] == "allow"
    with scalars.scalars(tmp_path / "other/training", 0, "zsqdet"):
        pass
    assert wandb.settings[2]["id"] != wandb.settings[0]["id"]


def test_without_a_project_nothing_goes_online(tmp_path, wandb):
    run = pipeline.train(load_config(write_experiment(tmp_path)))
    assert wandb.settings == []
    assert len(events(run)["loss"]) == 2


def test_a_project_without_the_package_is_one_line_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr(scalars, "find_spec", lambda name: None)
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
