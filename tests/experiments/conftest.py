"""A table with the toy detector, whose runs take a second, and a runner that starts them in this process."""

import pytest
import yaml
from toy.experiment import write_experiment

from common import cli
from tools.experiments import run
from tools.experiments.__main__ import main
from tools.experiments.data import SETS, ImageSet

ISOLATES = "What this row isolates, in a sentence of its own."


def write_table(folder, patch):
    """Returns the path of a table with two rows of the toy detector, evaluated on its four images."""
    config = write_experiment(folder)
    config.write_text(config.read_text().replace("weight_bits: 4, activation_bits: 4, ", ""))
    patch.setitem(SETS, "shapes", ImageSet(f"{folder}/images", f"{folder}/annotations.json", 4))
    rows = [{"name": "ours", "isolates": ISOLATES}]
    rows += [{"name": "ptq", "isolates": ISOLATES, "overrides": {"training.epochs": 0}}]
    values = {"title": "Toy", "models": {"toy": str(config)}, "bits": ["w4a8"], "data": "shapes", "rows": rows}
    path = folder / "tables/small.yaml"
    path.parent.mkdir()
    path.write_text(yaml.safe_dump(values))
    return path


def start_here(patch):
    """Runs are done in this process from now on; returns the list that their commands go to."""
    commands = []

    def execute(command):
        commands.append(command)
        return cli.main(command[3:])

    patch.setattr(run, "_execute", execute)
    return commands


@pytest.fixture
def toy(tmp_path, monkeypatch):
    return write_table(tmp_path, monkeypatch)


@pytest.fixture
def started(undrawn, monkeypatch):
    return start_here(monkeypatch)


@pytest.fixture
def experiments(toy, tmp_path, capsys):
    """Calls `run` with the toy table: (exit code, stdout, stderr)."""

    def call(*options):
        words = ["run", str(toy), "--runs", str(tmp_path / "runs"), "--results", str(tmp_path / "results.csv")]
        code = main([*words, *options])
        done = capsys.readouterr()
        return code, done.out, done.err

    return call


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with the toy table, run once: tables/small.yaml, results.csv, runs/."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        path = write_table(folder, patch)
        start_here(patch)
        assert main(["run", str(path), "--runs", str(folder / "runs"), "--results", str(folder / "results.csv")]) == 0
        yield folder
