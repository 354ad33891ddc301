"""The runner: resumable, one failed line does not stop the others, and Ctrl-C stops all."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import yaml
from toy.experiment import write_experiment

from common import cli
from common.pipeline.run_dir import results
from common.runtime.files import read_json
from tools.experiments import run, store
from tools.experiments.__main__ import main
from tools.experiments.data import SETS, ImageSet, prepare
from tools.experiments.table import matching, table_lines

ROOT = Path(__file__).parents[2]
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


def test_a_table_runs_and_is_recorded_and_finished_lines_are_not_run_again(experiments, started, tmp_path):
    code, out, err = experiments()
    assert code == 0, err
    rows = store.read(tmp_path / "results.csv")
    assert [row.name for row in rows] == ["toy/w4a8/ours", "toy/w4a8/ptq"]
    assert (rows[0].trained_ap is None, rows[1].trained_ap is None) == (False, True)
    assert len(started) == 2
    code, out, _ = experiments()
    assert (code, len(started), out.count("done before")) == (0, 2, 2)
    (tmp_path / "runs/small/toy/w4a8/ptq/seed0/report.html").unlink()
    experiments()
    assert len(started) == 3


def test_a_line_that_fails_does_not_stop_the_others_and_is_named_at_the_end(experiments, started, toy, tmp_path):
    values = yaml.safe_load(toy.read_text())
    broken = values["rows"][0] | {"name": "broken", "overrides": {"weights": str(tmp_path)}}
    toy.write_text(yaml.safe_dump(values | {"rows": [broken, *values["rows"]]}))
    code, out, err = experiments()
    assert code == 1
    assert err.splitlines()[-1].startswith("error: failed: toy/w4a8/broken/seed0;")
    assert [row.name for row in store.read(tmp_path / "results.csv")] == ["toy/w4a8/ours", "toy/w4a8/ptq"]
    assert "| toy/w4a8/broken " in out
    assert "missing" in out


def test_settings_that_change_a_line_are_not_recorded_unless_a_file_is_named(toy, started, tmp_path, capsys):
    words = ["run", str(toy), "--only", "*/ptq", "--runs", str(tmp_path / "runs"), "seed=5"]
    before = store.RESULTS.read_text()
    assert main(words) == 0
    assert "not recorded: seed=5 changes what the table says" in capsys.readouterr().out
    assert store.RESULTS.read_text() == before
    assert main([*words, "--results", str(tmp_path / "mine.csv")]) == 0
    assert store.read(tmp_path / "mine.csv")[0].seed == 5


def test_an_interruption_in_a_run_stops_the_table(experiments, monkeypatch):
    calls = []
    monkeypatch.setattr(run, "_execute", lambda command: calls.append(command) or 130)
    code, _, err = experiments()
    assert (code, len(calls)) == (130, 1)
    assert "interrupted" in err


def test_ctrl_c_stops_the_run_and_the_table_and_the_same_command_goes_on(toy, started, tmp_path, capsys):
    coco = tmp_path / "coco"  # the toy's images in a folder like COCO's
    for name, target in (("images/val2017", "images"), ("annotations/instances_val2017.json", "annotations.json")):
        (coco / name).parent.mkdir(parents=True)
        (coco / name).symlink_to(tmp_path / target)
    toy.write_text(toy.read_text().replace("data: shapes", "data: coco_val"))
    options = ["--coco", str(coco), "--runs", str(tmp_path / "runs"), "--results", str(tmp_path / "results.csv")]
    command = [sys.executable, "-m", "tools.experiments", "run", str(toy), *options]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    paths = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    process = subprocess.Popen(command, cwd=ROOT, env=paths, start_new_session=True, **pipes)
    watchdog = threading.Timer(300, process.kill)
    watchdog.start()
    for line in process.stdout:
        if " 2/2: " in line:
            os.killpg(process.pid, signal.SIGINT)
            break
    process.communicate()
    watchdog.cancel()
    assert process.returncode == 130
    assert main(command[3:]) == 0
    assert capsys.readouterr().out.count("done before") == 1
    assert len(started) == 1
    assert (tmp_path / "runs/small/toy/w4a8/ptq/seed0/report.html").exists()


LINES = [  # of each table one
    ("yolo11", "yolo11s/w3a3/published_settings", 3),
    ("yolov5", "yolov5s/w4a8/lsq_full", 3),
    ("maskrcnn", "maskrcnn_r50/w4a8/lsq_2k", 3),
    ("maskrcnn_voc", "maskrcnn_r50_voc/w8a8/ptq_noise", 2),
    ("swin", "swin_t/w4a8/published_settings", 3),
    ("models", "yolov5m/w6a6/ours", 3),
    ("yolo11n", "yolo11n/w8a8/calibrated_full", 2),
    ("yolov5n", "yolov5n/w4a4/calibrated_codebook", 2),
    ("ablations", "yolo11s/w4a8/labels_true", 2),
    ("ablations_yolo11n", "yolo11n/w4a4/images_statistics_only/seed1", 2),
    ("ablations_yolov5n", "yolov5n/w4a4/labels_one_box_unedited/seed2", 2),
    ("micro_resnet", "micro_resnet/w4a4/published_float_layers/seed1", 3),
    ("micro_vit", "micro_vit/w4a8/published_initialisation_untrained/seed0", 2),
]


def test_each_table_has_a_line_here():
    assert sorted(table for table, _, _ in LINES) == sorted(p.stem for p in (ROOT / "configs/tables").glob("*.yaml"))


@pytest.mark.parametrize(("table", "line", "detectors"), LINES)
def test_a_line_of_every_table_works_at_toy_size(table, line, detectors, started, tmp_path, capsys):
    path = ROOT / f"configs/tables/{table}.yaml"
    assert main(["run", str(path), "--smoke", "--only", line, "--runs", str(tmp_path)]) == 0, capsys.readouterr().err
    (row,) = store.read(tmp_path / "results.csv")
    name, _, seed = line.partition("/seed")
    assert (row.name, row.seed, row.evaluated_images) == (name, int(seed or 0), 8)
    folder = tmp_path / table / name / f"seed{seed or 0}"
    assert (folder / "report.html").exists()
    assert len(results(folder)["rows"]) == detectors


def test_a_smoke_run_of_other_settings_is_forgotten_and_one_of_the_same_stays(toy, tmp_path):
    (line,) = matching(table_lines(toy, runs=tmp_path / "runs"), "*/ptq")
    line.run_dir.mkdir(parents=True)
    run._forget_others(line)
    assert not line.run_dir.exists()
    line.run_dir.mkdir()
    run._forget_others(line)
    assert line.run_dir.exists()
    (line,) = matching(table_lines(toy, ["training.flip=false"], runs=tmp_path / "runs"), "*/ptq")
    run._forget_others(line)
    assert not line.run_dir.exists()


def test_a_launcher_starts_each_run(toy, tmp_path, capsys):
    words = ["run", str(toy), "--only", "*/ptq", "--dry-run", "--launcher", "srun python -m common.runtime.launch -n 2"]
    assert main(words) == 0
    assert capsys.readouterr().out.startswith("srun python -m common.runtime.launch -n 2 -m common.cli run ")


def test_the_shared_images_are_divided_by_id_once(tmp_path, monkeypatch):
    shared = os.environ.get("ZSQDET_SHARED", "../shared")
    if not Path(shared, "coco").is_dir():
        pytest.skip("ZSQDET_SHARED names no folder with coco/")
    shared = str(Path(shared).resolve())
    monkeypatch.chdir(tmp_path)
    prepare(["shared_dev", "shared_test"], {"ZSQDET_SHARED": shared})
    parts = [read_json(Path(SETS[name].annotations)) for name in ("shared_dev", "shared_test")]
    ids = [[image["id"] for image in part["images"]] for part in parts]
    assert [len(part) for part in ids] == [300, 500]
    assert max(ids[0]) < min(ids[1])
    for part, own in zip(parts, ids, strict=True):
        assert {row["image_id"] for row in part["annotations"]} <= set(own)
