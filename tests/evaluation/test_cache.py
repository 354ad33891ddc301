"""Full precision is measured once for all runs of a detector, and again when anything its AP depends on differs."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from toy.experiment import write_coco, write_experiment

from common.config.load import load_config
from common.detection.detector import load_detector
from common.evaluation import cache as once
from common.evaluation import coco
from common.evaluation.annotations import read_set
from common.evaluation.cache import measure_once, measurement_key, set_hashes
from common.pipeline import stages as pipeline
from common.pipeline.run_dir import results


@pytest.fixture
def measured(monkeypatch):
    """How many detectors have been measured."""
    calls = []
    original = coco.evaluate

    def counted(*arguments, **options):
        calls.append(options["predictions"])
        return original(*arguments, **options)

    monkeypatch.setattr(coco, "evaluate", counted)
    return calls


def test_a_second_bit_width_takes_full_precision_from_the_first(tmp_path, measured):
    path = write_experiment(tmp_path)
    first = pipeline.run(load_config(path, ["training.epochs=0"]))
    assert len(measured) == 2
    second = pipeline.run(
        load_config(path, ["training.epochs=0", "quantization.weight_bits=8", f"run_dir={tmp_path / 'second'}"])
    )
    assert measured[2:] == [second / "predictions/ptq.json"]
    assert results(second)["rows"][0] == results(first)["rows"][0]
    predictions = [(run / "predictions/full_precision.json").read_bytes() for run in (first, second)]
    assert predictions[0] == predictions[1]
    assert json.loads(predictions[0])
    assert results(second)["measured_on"] == results(first)["measured_on"]


def test_an_interrupted_measurement_is_repeated(tmp_path, measured):
    path = write_experiment(tmp_path)
    pipeline.run(load_config(path, ["training.epochs=0"]))
    (folder,) = (tmp_path / "measured").iterdir()
    (folder / once.METRICS).unlink()
    pipeline.run(load_config(path, ["training.epochs=0", f"run_dir={tmp_path / 'second'}"]))
    assert len(measured) == 4


DAMAGE = {
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-9]),
    "empty": lambda path: path.write_text(""),
    "other JSON": lambda path: path.write_text("[1]"),
    "too deep": lambda path: path.write_text("[" * 100_000),
    "one digit": lambda path: path.write_text(path.read_text().replace("1", "2", 1)),
    "gone": Path.unlink,
}


@pytest.mark.parametrize("name", [once.METRICS, once.PREDICTIONS])
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_measurement_is_made_again(tmp_path, name, damage):
    folder, made = tmp_path / "kept", []

    def measure(file):
        made.append(file)
        file.write_text('[{"image_id": 1}]')
        return {"AP": 0.1, "per_class": {"a": 1.0}}

    folder.mkdir()
    first = measure_once(folder, tmp_path / "1.json", measure)
    assert measure_once(folder, tmp_path / "2.json", measure) == first
    assert len(made) == 1
    DAMAGE[damage](folder / name)
    assert measure_once(folder, tmp_path / "3.json", measure) == first
    assert len(made) == 2
    assert (tmp_path / "3.json").read_bytes() == (tmp_path / "1.json").read_bytes()
    assert measure_once(folder, tmp_path / "4.json", measure) == first
    assert len(made) == 2


def test_everything_that_the_ap_depends_on_counts_and_the_places_of_files_do_not(tmp_path, monkeypatch):
    path = write_experiment(tmp_path)
    config = load_config(path)
    detector = load_detector(config.family, config.weights)

    def key(changes=(), weights="a", device="cpu"):
        changed = load_config(path, changes)
        files = set_hashes(read_set(changed.data, detector.class_names), changed.data.annotations)
        return measurement_key(detector, weights, files, changed.evaluation, torch.device(device))

    reference = key()
    shutil.copytree(tmp_path / "images", tmp_path / "moved")
    assert key([f"data.images={tmp_path / 'moved'}"]) == reference
    (tmp_path / "moved/1.png").write_bytes((tmp_path / "images/2.png").read_bytes())
    shutil.copy(tmp_path / "annotations.json", tmp_path / "same.json")
    assert key([f"data.annotations={tmp_path / 'same.json'}", "evaluation.directory=elsewhere"]) == reference
    (tmp_path / "other").mkdir()
    write_coco(tmp_path / "other", boxes=1)
    different = [
        key(weights="b"),
        key(["evaluation.image_size=96"]),
        key([f"data.images={tmp_path / 'moved'}"]),
        key([f"data.annotations={tmp_path / 'other/annotations.json'}"]),
    ]
    monkeypatch.setattr(once, "MEASUREMENT_VERSION", once.MEASUREMENT_VERSION + 1)
    different.append(key())
    monkeypatch.setattr(once, "describe", lambda device: dict.fromkeys(once.SAME_MACHINE, "other"))
    different.append(key())
    assert len({reference, *different}) == 1 + len(different)
