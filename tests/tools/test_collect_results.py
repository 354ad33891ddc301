"""The table of several runs: what was measured, and dashes where nothing was."""

import csv
import json
import shutil

import pytest
import yaml
from toy.experiment import write_experiment

from common import pipeline
from common.config.load import load_config
from common.run_dir import results, update_results
from tools import seeds
from tools.collect_results import COLUMNS, main


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run with training and one without."""
    path = write_experiment(tmp_path_factory.mktemp("runs"))
    folders = [path.parent / name for name in ("trained", "calibrated")]
    for folder, epochs in zip(folders, (1, 0), strict=True):
        pipeline.run(load_config(path, [f"run_dir={folder}", f"training.epochs={epochs}"]))
    return folders


def test_each_run_is_a_row_with_its_own_numbers(runs, tmp_path, capsys):
    assert main([*map(str, runs), "--csv", str(tmp_path / "t.csv"), "--json", str(tmp_path / "t.json")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [cell.strip() for cell in lines[0].strip("|").split("|")] == [c for c in COLUMNS if "masks" not in c]
    assert len({len(line) for line in lines}) == 1
    rows = json.loads((tmp_path / "t.json").read_text())
    with (tmp_path / "t.csv").open() as stream:
        assert [row["run"] for row in csv.DictReader(stream)] == ["trained", "calibrated"]
    for row, run in zip(rows, runs, strict=True):
        measured = {r["name"]: r for r in results(run)["rows"]}
        assert row["FP"] == round(measured["full precision"]["AP"], 4)
        assert row["PTQ50"] == round(measured["ptq"]["AP50"], 4)
        assert (row["bits"], row["mean bits"]) == ("W4A4", 4.0)
    assert rows[1]["trained"] is None
    assert [cell.strip() for cell in lines[3].strip("|").split("|")][COLUMNS.index("trained")] == "-"


def test_columns_can_be_chosen_and_a_wrong_one_is_named(runs, capsys):
    assert main([str(runs[0]), "--columns", "run,FP"]) == 0
    assert [cell.strip() for cell in capsys.readouterr().out.splitlines()[0].strip("|").split("|")] == ["run", "FP"]
    with pytest.raises(SystemExit):
        main([str(runs[0]), "--columns", "mAP"])
    assert "no column 'mAP'" in capsys.readouterr().err


def with_seeds(run, folder, aps):
    """Copies of a run that differ in the seed and in the AP after calibration."""
    for seed, ap in enumerate(aps):
        own = shutil.copytree(run, folder / f"ours/seed{seed}")
        config = yaml.safe_load((own / "config.yaml").read_text()) | {"seed": seed}
        (own / "config.yaml").write_text(yaml.safe_dump(config))
        rows = results(own)["rows"]
        rows[1] |= {"AP": ap, "AP50": 2 * ap}
        update_results(own, rows=rows)
    return sorted(map(str, folder.glob("ours/*")))


def test_runs_that_differ_in_the_seed_are_one_row_with_mean_and_spread(runs, tmp_path, capsys):
    folders = with_seeds(runs[1], tmp_path, (0.1, 0.12, 0.17))
    assert main([*folders, str(runs[1]), "--seeds", "--json", str(tmp_path / "t.json")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [cell.strip() for cell in lines[0].strip("|").split("|")] == list(seeds.COLUMNS)
    mine, single = json.loads((tmp_path / "t.json").read_text())
    assert mine["experiment"].endswith("/ours")
    assert (mine["seeds"], mine["PTQ"], mine["PTQ +-"]) == (3, 0.13, 0.0361)  # sqrt((.03² + .01² + .04²) / 2)
    assert (mine["PTQ50"], mine["PTQ50 +-"], mine["trained"], mine["trained +-"]) == (0.26, 0.0721, None, None)
    assert (single["seeds"], single["PTQ +-"]) == (1, None)


def test_runs_that_differ_in_more_than_the_seed_are_not_averaged(runs, tmp_path, capsys):
    folders = with_seeds(runs[1], tmp_path, (0.1, 0.12))
    path = tmp_path / "ours/seed1/config.yaml"
    path.write_text(path.read_text().replace("rounding: coordinate_descent", "rounding: nearest"))
    assert main([*folders, "--seeds"]) == 2
    assert "seed1: quantization.rounding differs from" in capsys.readouterr().err


def test_a_run_that_was_not_measured_is_a_row_of_dashes(tmp_path, capsys):
    path = write_experiment(tmp_path)
    run = pipeline.train(load_config(path, ["training.epochs=0"]))
    assert main([str(run), "--columns", "run,FP,PTQ,evaluated"]) == 0
    assert [cell.strip() for cell in capsys.readouterr().out.splitlines()[2].strip("|").split("|")] == ["run", *"---"]


def test_a_folder_that_is_no_run_is_one_line(tmp_path, capsys):
    assert main([str(tmp_path)]) == 2
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1
    assert error[0].startswith("error: ")


def test_settings_that_cannot_be_read_are_one_line(runs, capsys):
    (runs[0] / "config.yaml").write_text("{")
    for options in ([], ["--seeds"]):
        assert main([str(runs[0]), *options]) == 2
        error = capsys.readouterr().err
        assert "config.yaml: cannot be read" in error
        assert len(error.splitlines()) == 1
