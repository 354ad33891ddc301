"""The report of runs with other settings, of runs that lack something and of unfinished ones."""

import shutil

import pytest
import torch
from toy.experiment import Page, write_experiment

from common.config.load import load_config
from common.pipeline import stages as pipeline
from common.pipeline.run_dir import results, update_results
from common.quantization import load_quantized
from common.reporting.report import write_report

MINUS = "\N{MINUS SIGN}"


def page_of(run):
    return Page(write_report(run))


@pytest.fixture(scope="module")
def on_real_images(tmp_path_factory):
    """A finished run on real images, without epochs."""
    folder = tmp_path_factory.mktemp("real")
    words = ["synthesis.source=real", f"synthesis.real_images={folder / 'images'}", "synthesis.num_images=4"]
    return pipeline.run(load_config(write_experiment(folder), [*words, "training.epochs=0"]))


@pytest.fixture(scope="module")
def with_integer_tensors(tmp_path_factory):
    """A finished run with integer tensors, without an evaluation set and without epochs."""
    words = ["bits=w4a8", "quantization.profile=full", "training.epochs=0", "data={images: null, annotations: null}"]
    return pipeline.run(load_config(write_experiment(tmp_path_factory.mktemp("integer")), words))


def test_with_integer_tensors_a_layer_has_the_range_of_the_tensor_that_it_reads(with_integer_tensors, undrawn):
    run = with_integer_tensors
    (layer,) = (row for row in results(run)["layers"] if row.get("input_tensor"))
    module = load_quantized(run / "ptq")[1]
    ends = module.tensor_quantizers.of(layer["input_tensor"])(torch.tensor([-1e6, 1e6])).tolist()
    (line,) = (row for row in page_of(run).rows["layers"] if row[0] == layer["name"])
    assert "-" not in line[8:11]
    assert line[10] == " to ".join(f"{end:.3g}".replace("-", MINUS) for end in ends)
    assert f"{ends[1] - ends[0]:.2g}" == f"{255 * float(line[8]):.2g}"


def test_without_an_evaluation_set_the_report_says_so(with_integer_tensors):
    page = page_of(with_integer_tensors)
    assert "data.annotations are not set" in page.text["accuracy"]
    assert not {"accuracy", "classes", "detections"} & page.rows.keys()
    assert not {"classes", "detections"} & page.text.keys()
    assert len(page.rows["layers"]) == 5


def test_without_epochs_the_report_says_so(on_real_images):
    page = page_of(on_real_images)
    assert "Not trained" in page.text["training"]
    assert "No training" in page.text["scales"]
    assert [line[0] for line in page.rows["accuracy"][1:]] == ["Full precision", "PTQ"]
    assert "not finished" not in page.text["accuracy"]


def test_a_run_on_real_images_is_not_called_zero_shot(on_real_images, undrawn):
    page = page_of(on_real_images)
    assert "not zero-shot" in page.text["header"]
    assert "Not zero-shot." in page.text["data"]
    assert str(on_real_images.parent / "images") in page.rows["data"][2][2]
    assert "are not optimized" in page.text["synthesis"]


def test_a_run_whose_images_are_gone_is_reported_without_them(run, undrawn):
    update_results(run, imageset=str(run / "gone"))
    page = page_of(run)
    assert "Not available" in page.text["images"]
    assert not page.attributes("svg", "images")
    assert len(page.rows["layers"]) == 5


def test_a_run_that_has_just_begun_is_reported_as_unfinished(run, tmp_path):
    (tmp_path / "new").mkdir()
    shutil.copy(run / "config.yaml", tmp_path / "new")
    page = page_of(tmp_path / "new")
    assert "unfinished" in page.text["header"]
    assert "zero-shot" not in page.text["header"]
    for section in ("accuracy", "data", "layers"):
        assert " yet" in page.text[section]
    assert not page.attributes("img")


def test_a_run_that_was_interrupted_in_training_shows_its_calibration(run, undrawn):
    shutil.rmtree(run / "quantized")
    update_results(run, rows=[])
    page = page_of(run)
    assert "unfinished" in page.text["header"]
    assert "Training has not finished" in page.text["training"]
    assert "scales" not in page.rows
    assert len(page.rows["layers"]) == 5
