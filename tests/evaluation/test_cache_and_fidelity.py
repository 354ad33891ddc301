"""Full precision is measured once for all runs, and again when its AP would differ; fidelity needs no label."""

import json
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from toy.experiment import correct, detections, reference, write_coco, write_experiment

from common.cli import main
from common.config.load import load_config
from common.detection.detector import load_detector
from common.evaluation import cache as once
from common.evaluation import coco
from common.evaluation.cache import measure_once, measurement_key, set_hashes
from common.evaluation.datasets import read_set
from common.evaluation.fidelity import fidelity, unlabelled
from common.pipeline import stages as pipeline
from common.pipeline.run_dir import check_run, config_of_run, open_run, results, stored_config
from common.reporting.tables import metric_lines, result_lines
from common.runtime.errors import UserError
from common.runtime.files import sha256

pytestmark = pytest.mark.usefixtures("undrawn")

METRICS = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large")


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


def test_new_code_that_changes_no_measurement_measures_nothing_again(tmp_path, monkeypatch):
    """The version that is raised by hand stands for the code: neither its commit nor its files count."""
    config = load_config(write_experiment(tmp_path))
    detector, device = load_detector(config.family, config.weights), torch.device("cpu")
    before = measurement_key(detector, "a", {}, config.evaluation, device)
    machine, read = once.describe(device), Path.open

    def no_code(self, *arguments, **options):
        assert self.suffix != ".py"
        return read(self, *arguments, **options)

    monkeypatch.setattr(once, "describe", lambda device: machine | {"commit": "another", "zsqdet": "9.9"})
    monkeypatch.setattr(Path, "open", no_code)
    assert measurement_key(detector, "a", {}, config.evaluation, device) == before


def test_detections_are_written_once_a_row_and_by_the_encoder_in_c(tmp_path, monkeypatch):
    written, write = [], coco._write

    def slow(*arguments):
        raise AssertionError("the encoder that is written in Python")

    def counted(path, rows):
        with monkeypatch.context() as patch:
            patch.setattr(json.encoder, "_make_iterencode", slow)
            write(path, rows)
        written.append(path)

    monkeypatch.setattr(coco, "_write", counted)
    run = pipeline.run(load_config(write_experiment(tmp_path), ["training.epochs=0"]))
    (folder,) = (tmp_path / "measured").iterdir()
    assert written == [folder / once.PREDICTIONS, run / "predictions/ptq.json"]
    assert all(json.loads(path.read_text()) for path in written)


def test_it_is_pycocotools_ap_with_the_detections_of_full_precision_from_a_score_of_03_as_the_truth():
    content, full = correct(), detections(correct())
    other = [row | {"bbox": [value + 0.7 for value in row["bbox"]]} for row in full]
    sure = [row for row in full if row["score"] >= 0.3]
    truth = [row | {"id": i, "iscrowd": 0, "area": row["bbox"][2] * row["bbox"][3]} for i, row in enumerate(sure, 1)]
    found = fidelity(content, full, other)
    assert [found[name] for name in METRICS] == reference(content | {"annotations": truth}, other)
    assert 0 < found["AP"] < 1
    assert found["objects"] == len(sure) < len(full)
    assert set(found["per_class"]) == {"a", "b"}
    assert fidelity(content, full, full)["AP"] == pytest.approx(1)
    assert fidelity(content, [row | {"score": 0.29} for row in full], other)["AP"] == -1


def test_where_full_precision_detects_nothing_the_command_says_so_and_no_number():
    full = [row | {"score": 0.29} for row in detections(correct())]
    row = {"name": "ptq", "weight_bits": 4, "activation_bits": 8} | fidelity(correct(), full, full)
    (line,) = result_lines({"rows": [], "fidelity": {"rows": [row]}})
    assert line.endswith("fidelity not measured: full precision detects no object in these images")
    assert all(line.endswith(" n/a") for line in metric_lines(row | {"AP50_voc07": -1}))


def test_a_fidelity_of_few_objects_is_called_a_rough_number():
    row = {"name": "ptq", "weight_bits": 4, "activation_bits": 8, "AP": 0.94, "objects": 49}
    rows = [row, row | {"objects": 50}]
    few, many, advice = result_lines({"rows": [], "fidelity": {"rows": rows, "synthetic": True}})
    assert few.endswith("fidelity 0.9400 (49 objects): rough, since there are few")
    assert many.endswith("fidelity 0.9400 (50 objects)")
    assert advice == "a better estimate: give images of yours, which need no labels, with data.images=DIR"
    *_, advice = result_lines({"rows": [], "fidelity": {"rows": rows, "synthetic": False}})
    assert advice == "a better estimate: give more images, with data.images=DIR"
    assert len(list(result_lines({"rows": [], "fidelity": {"rows": rows[1:], "synthetic": True}}))) == 1


def test_the_images_are_those_of_a_folder_and_of_the_folders_in_it(tmp_path):
    for name, size in (("b.png", (20, 30)), ("more/a.JPG", (40, 10)), (".hidden/c.png", (8, 8)), ("._b.png", (8, 8))):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        cv2.imwrite(str(tmp_path / name), np.zeros((*size, 3), np.uint8))
    (tmp_path / "notes.txt").write_text("")
    found = unlabelled(tmp_path, ("circle", "square"))
    assert [str(file.relative_to(tmp_path)) for file in found.files] == ["b.png", "more/a.JPG"]
    assert found.sizes == [(20, 30), (40, 10)]
    assert found.category_ids == [0, 1]
    with pytest.raises(UserError, match=r"data\.images: no image in .*toys; allowed are"):
        unlabelled(tmp_path / "toys", ("circle",))


def test_a_run_is_evaluated_on_its_own_set_from_another_directory_with_the_same_names(tmp_path, monkeypatch):
    here, there = tmp_path / "here", tmp_path / "there"
    for folder, boxes in ((here, 2), (there, 1)):
        folder.mkdir()
        write_experiment(folder)
        write_coco(folder, boxes=boxes)
        path = folder / "experiment.yaml"
        path.write_text(path.read_text().replace(f"{folder}/", ""))
    monkeypatch.chdir(here)
    config = load_config(Path("experiment.yaml"), ["training.epochs=0"])
    run = pipeline.run(config).absolute()
    own = pipeline.evaluate(config_of_run(run))
    assert own["protocol"] == "images with a longer side of 64 pixels, padded to rectangular batches"
    assert own["bits"] == "W4A4"
    made_with = (
        "bits=w8a8",
        "preset=quick",
        "quantization.profile=full",
        "training.epochs=5",
        "synthesis.num_images=9",
    )
    for word in made_with:
        with pytest.raises(
            UserError, match=rf"^{word.partition('=')[0]}: found .* is made already; leave it out[^\n]*$"
        ):
            config_of_run(run, ["evaluation.image_size=96", word])
    monkeypatch.chdir(there)
    assert config_of_run(run).data.images == here / "images"
    assert config_of_run(run, ["data.images=images", "data.annotations=x.json"]).data.images == Path("images")
    assert pipeline.evaluate(config_of_run(run))["AP"] == own["AP"]
    (there / "toy.txt").write_text("4")  # another checkpoint of that name
    assert pipeline.evaluate(config_of_run(run, ["data.images=images"]))["fidelity"]
    check_run(load_config(run / "config.yaml", [f"run_dir={run}"]), sha256(here / "toy.txt"))
    (here / "images").rename(there / "moved")
    assert config_of_run(run).data.images == Path("images")  # as for a folder that moved with its data
    (there / "moved").rename(here / "images")
    again = stored_config(run)
    assert (again.run_dir, again.weights, again.data.images) == (run, here / "toy.txt", here / "images")
    assert main(["run", str(run / "config.yaml")]) == 0  # it is finished
    assert {path.name for path in there.iterdir()} == {"annotations.json", "experiment.yaml", "images", "toy.txt"}


def test_a_relative_and_the_same_absolute_path_are_one_setting(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["synthesis.source=real", "synthesis.num_images=4", "training.epochs=0", "synthesis.real_images="]
    path = write_experiment(tmp_path)
    open_run(load_config(path, [*words[:3], f"{words[3]}images"]), "0" * 64, {})
    check_run(load_config(path, [*words[:3], f"{words[3]}{tmp_path / 'images'}"]), "0" * 64)
    with pytest.raises(UserError, match=r"synthesis.real_images \(images there, other now\)"):
        check_run(load_config(path, [*words[:3], f"{words[3]}other"]), "0" * 64)
