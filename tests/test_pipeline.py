"""The stages together, on a toy detector: what a run leaves behind, skips, refuses, and goes on with."""

import json
import shutil
from pathlib import Path

import pytest
from toy.adapter import ToyDetector
from toy.experiment import Page, write_coco, write_experiment

from common.cli import main
from common.config.load import load_config
from common.evaluation.fidelity import fidelity
from common.pipeline import stages as pipeline
from common.pipeline.run_dir import check_run, fidelity_file, open_run, results
from common.runtime.errors import UserError
from common.runtime.files import read_json
from tools.torture import fingerprint

pytestmark = pytest.mark.usefixtures("undrawn")

METRICS = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large", "AR100")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The configuration of an uninterrupted run, and how often it called the detector."""
    folder = tmp_path_factory.mktemp("finished")
    calls = 0
    original = ToyDetector.head_output

    def counted(*arguments, **options):
        nonlocal calls
        calls += 1
        return original(*arguments, **options)

    config = load_config(write_experiment(folder))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ToyDetector, "head_output", counted)
        pipeline.run(config)
    return config, calls


def test_a_run_measures_full_precision_ptq_and_trained_with_one_evaluator_at_one_size(finished):
    config, _ = finished
    rows = results(config.run_dir)["rows"]
    assert [row["name"] for row in rows] == ["full precision", "ptq", "trained"]
    assert [(row["weight_bits"], row["activation_bits"]) for row in rows] == [(32, 32), (4, 4), (4, 4)]
    for key in ("evaluator", "image_size", "images"):
        assert len({row[key] for row in rows}) == 1
    assert rows[0]["image_size"] == 64
    assert rows[0]["images"] == 4
    assert set(METRICS) <= set(rows[0])


def test_a_run_leaves_its_settings_its_machine_and_what_it_read(finished):
    config, _ = finished
    run = config.run_dir
    assert load_config(run / "config.yaml") == config
    environment = json.loads((run / "environment.json").read_text())
    assert {"versions", "cpu", "gpu", "commit", "weights_sha256"} <= set(environment)
    stored = results(run)
    assert set(stored["seconds"]) == {"synthesis", "calibration", "training", "evaluation"}
    assert {layer["name"] for layer in stored["layers"]} >= {"blocks.1.conv", "blocks.2.conv"}
    read = {entry["stage"]: entry["files"] for entry in stored["data_read"]}
    assert read["weights"] == [str(config.weights)]
    assert read["synthesis"] == []
    assert read["evaluation"] == [str(config.data.images), str(config.data.annotations)]
    assert stored["zero_shot"] is True
    for name in ("full_precision", "ptq", "trained"):
        assert isinstance(json.loads((run / "predictions" / f"{name}.json").read_text()), list)


def test_what_is_done_is_not_done_again(finished, monkeypatch):
    config, _ = finished
    before = snapshot(config.run_dir)

    def never(*arguments, **options):
        raise AssertionError("a finished run computed something")

    monkeypatch.setattr(ToyDetector, "head_output", never)
    monkeypatch.setattr(ToyDetector, "detect", never)
    pipeline.run(config)
    assert snapshot(config.run_dir) == before


@pytest.mark.parametrize("share", [0.45, 0.9])
def test_a_run_that_was_interrupted_anywhere_ends_as_if_it_had_not_been(finished, tmp_path, monkeypatch, share):
    reference, calls = finished
    config = load_config(write_experiment(tmp_path))
    left = int(calls * share)
    original = ToyDetector.head_output

    def interrupted(*arguments, **options):
        nonlocal left
        left -= 1
        if left == 0:
            raise KeyboardInterrupt
        return original(*arguments, **options)

    monkeypatch.setattr(ToyDetector, "head_output", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pipeline.run(config)
    pipeline.run(config)
    for name in ("ptq", "quantized"):
        path = f"{name}/model.safetensors"
        assert (config.run_dir / path).read_bytes() == (reference.run_dir / path).read_bytes(), path
    measured = [[row[key] for key in METRICS] for row in results(config.run_dir)["rows"]]
    assert measured == [[row[key] for key in METRICS] for row in results(reference.run_dir)["rows"]]


@pytest.mark.parametrize("place", ["", "quantized", "quantized/model.safetensors", "ptq"])
def test_the_quantized_detector_is_evaluated_by_its_run_or_its_checkpoint(finished, place):
    config, _ = finished
    row = results(config.run_dir)["rows"][1 if place == "ptq" else 2]
    metrics = pipeline.evaluate(config.model_copy(update={"weights": config.run_dir / place}))
    assert {key: metrics[key] for key in METRICS} == {key: row[key] for key in METRICS}
    assert metrics["precision"] == "quantized"


def test_a_quantized_checkpoint_needs_nothing_but_its_folder(finished, tmp_path):
    config, _ = finished
    shutil.copytree(config.run_dir / "quantized", tmp_path / "moved")
    metrics = pipeline.evaluate(config.model_copy(update={"weights": tmp_path / "moved"}))
    assert metrics["AP"] == results(config.run_dir)["rows"][2]["AP"]


def test_a_float_checkpoint_is_evaluated_without_any_run(tmp_path):
    config = load_config(write_experiment(tmp_path))
    metrics = pipeline.evaluate(config)
    assert metrics["precision"] == "full"
    assert set(METRICS) <= set(metrics)
    assert not config.run_dir.exists()
    assert not config.synthesis.directory.exists()


def test_two_bit_widths_share_one_set(finished):
    config, _ = finished
    other = load_config(config.run_dir / "config.yaml", ["quantization.weight_bits=8"])
    assert pipeline.synthesize(other) == pipeline.synthesize(config)
    assert len(list(config.synthesis.directory.glob("*/set.json"))) == 1


def test_a_folder_with_other_settings_is_refused_and_the_keys_are_named(finished):
    config, _ = finished
    changed = load_config(config.run_dir / "config.yaml", ["quantization.weight_bits=8", "seed=9"])
    with pytest.raises(
        UserError, match=r"seed \(0 there, 9 now\), quantization.weight_bits \(4 there, 8 now\); .*run_dir="
    ):
        pipeline.run(changed)
    with pytest.raises(UserError, match=r"run_dir: found .*inner, within the run "):
        pipeline.run(load_config(config.run_dir / "config.yaml", [f"run_dir={config.run_dir}/inner"]))


@pytest.mark.parametrize(
    "mistake",
    [
        "synthesis.image_size=60",
        "quantization.layers={nothing*: {weight_bits: 8, activation_bits: 8}}",
        "quantization.average_bits=3",
        "synthesis.num_images=1",
    ],
)
def test_a_mistake_that_only_the_detector_shows_comes_before_any_work_and_any_folder(tmp_path, mistake):
    config = load_config(write_experiment(tmp_path), [mistake])
    with pytest.raises(UserError, match=r"size: 60|no layer matches 'nothing\*'|average_bits: 3.* 4.00|set has 1;"):
        pipeline.run(config)
    assert not config.run_dir.exists()
    assert not config.synthesis.directory.exists()


def test_a_mistake_in_the_annotations_comes_before_any_work_and_any_folder(tmp_path):
    config = load_config(write_experiment(tmp_path))
    content = json.loads(config.data.annotations.read_text())
    content["annotations"][2]["bbox"] = [1, 2, 3]
    config.data.annotations.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"annotations\[2\]\.bbox: found \[1, 2, 3\]; allowed"):
        pipeline.run(config)
    assert not config.run_dir.exists()
    assert not config.synthesis.directory.exists()


DAMAGE = {
    "predictions/trained.json": lambda path: path.write_text(path.read_text().replace("score", "Score", 1)),
    "predictions/full_precision.json": lambda path: path.unlink(),
    "ptq/quantization.json": lambda path: path.write_text(""),
    "quantized/model.safetensors": lambda path: path.write_bytes(path.read_bytes()[:-9]),
    "training/history.jsonl": lambda path: path.write_text(path.read_text()[:20]),
    "results.json": lambda path: path.unlink(),
    "results.json without its hash": lambda path: path.write_text(path.read_text().replace('"sha256":', '"sha256x":')),
    "environment.json": lambda path: path.write_text("[]"),
    "config.yaml": lambda path: path.write_text(path.read_text().replace("seed: 0", "seed: 1")),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_what_is_damaged_in_a_finished_run_is_made_again_as_it_was(finished, tmp_path, name):
    config, _ = finished
    shutil.copytree(config.run_dir, tmp_path / "run")
    moved = config.model_copy(update={"run_dir": tmp_path / "run"})
    pipeline.run(moved)
    before = fingerprint(tmp_path)
    DAMAGE[name](tmp_path / "run" / name.partition(" ")[0])
    assert fingerprint(tmp_path) != before
    pipeline.run(moved)
    assert fingerprint(tmp_path) == before


def test_other_annotations_under_the_same_name_are_noticed_and_measured(finished, tmp_path):
    config, _ = finished
    shutil.copytree(config.run_dir, tmp_path / "run")
    kept = config.data.annotations.read_text()
    content = json.loads(kept)
    content["annotations"] = content["annotations"][::2]
    try:
        config.data.annotations.write_text(json.dumps(content))
        run = pipeline.run(config.model_copy(update={"run_dir": tmp_path / "run"}))
        digests = {row["predictions_sha256"] for row in results(run)["rows"]}
        assert results(run)["measured_files"] != results(config.run_dir)["measured_files"]
        assert len(results(run)["rows"]) == 3
        assert digests == {row["predictions_sha256"] for row in results(config.run_dir)["rows"]}  # of the same images
    finally:
        config.data.annotations.write_text(kept)


def test_a_scan_finds_a_mistake_in_the_layers_before_it_makes_images(tmp_path):
    config = load_config(
        write_experiment(tmp_path), ["quantization.layers={nothing*: {weight_bits: 8, activation_bits: 8}}"]
    )
    with pytest.raises(UserError, match=r"no layer matches 'nothing\*'"):
        pipeline.sensitivity(config)
    assert not config.synthesis.directory.exists()


def test_a_folder_of_another_checkpoint_is_refused(finished, tmp_path):
    config, _ = finished
    (tmp_path / "other.txt").write_text("4")
    with pytest.raises(UserError, match="was made from another checkpoint"):
        pipeline.train(config.model_copy(update={"weights": tmp_path / "other.txt"}))


def test_another_evaluation_set_measures_all_rows_again_and_trains_nothing(finished, tmp_path):
    config, _ = finished
    shutil.copytree(config.run_dir, tmp_path / "run")
    write_coco(tmp_path, boxes=1)
    data = {"images": tmp_path / "images", "annotations": tmp_path / "annotations.json"}
    moved = load_config(
        config.run_dir / "config.yaml", [f"run_dir={tmp_path / 'run'}"] + [f"data.{k}={v}" for k, v in data.items()]
    )
    before = snapshot(tmp_path / "run", "quantized")
    pipeline.run(moved)
    stored = results(tmp_path / "run")
    assert stored["measured_on"]["annotations"] == str(data["annotations"])
    assert len(stored["rows"]) == 3
    assert snapshot(tmp_path / "run", "quantized") == before
    assert [entry["files"] for entry in stored["data_read"] if entry["stage"] == "evaluation"] == [
        [*map(str, data.values())]
    ]


def test_a_run_without_data_has_its_fidelity_on_images_that_it_did_not_use_and_the_same_detector(finished, tmp_path):
    config = load_config(write_experiment(tmp_path), ["data={images: null, annotations: null}"])
    run = pipeline.run(config)
    stored = results(run)
    assert stored["rows"] == []
    found = stored["fidelity"]
    assert found["synthetic"]
    assert [row["name"] for row in found["rows"]] == ["ptq", "trained"]
    used, held_out = Path(stored["imageset"]), Path(found["measured_on"]["images"]).parent
    assert read_json(held_out / "set.json")["seed"] == 2**31
    images = [{file.read_bytes() for file in (folder / "images").iterdir()} for folder in (used, held_out)]
    assert len(images[1]) == found["images"] == 6
    assert not images[0] & images[1]
    assert [entry["files"] for entry in stored["data_read"]] == [[str(config.weights)], []]
    with_data = (finished[0].run_dir / "quantized/model.safetensors").read_bytes()
    assert (run / "quantized/model.safetensors").read_bytes() == with_data
    full, trained = (read_json(fidelity_file(run, name)) for name in ("full precision", "trained"))
    content = read_json(fidelity_file(run, "images"))
    metrics = fidelity(content, full, trained, lowest=0.1)
    assert found["measured_on"]["objects_from"] == 0.1
    assert {**found["rows"][1], **metrics} == found["rows"][1]
    pipeline.run(config)
    assert results(run)["fidelity"] == found


def test_images_without_labels_give_the_fidelity_of_a_run_and_the_report_shows_where_it_is_lowest(tmp_path, capsys):
    path = write_experiment(tmp_path)
    run = pipeline.run(load_config(path, ["training.epochs=0"]))
    (tmp_path / "annotations.json").unlink()
    words = ["evaluate", str(run), f"data.images={tmp_path / 'images'}", "--json", str(tmp_path / "out.json")]
    assert main(words) == 0
    metrics, stored = read_json(tmp_path / "out.json"), results(run)
    assert [row["name"] for row in stored["rows"]] == ["full precision", "ptq"]
    assert not stored["fidelity"]["synthetic"]
    assert metrics["AP"] == stored["fidelity"]["rows"][0]["AP"]
    assert (metrics["images"], metrics["precision"]) == (4, "quantized")
    assert set(METRICS) <= set(metrics)
    assert stored["data_read"][-1] == {"stage": "evaluation", "files": [str(tmp_path / "images")]}
    said = capsys.readouterr().out
    assert f"{metrics['objects']} full-precision detections in 4 images are the ground truth" in said
    assert f"fidelity         {metrics['AP']:.4f}" in said
    page = Page(run / "report.html")
    assert f"{metrics['AP']:.4f}" in page.text["fidelity"]
    assert len(page.attributes("svg", "fidelity")) == 8


def test_without_epochs_the_result_is_the_calibrated_detector(tmp_path):
    config = load_config(write_experiment(tmp_path), ["training.epochs=0"])
    run = pipeline.run(config)
    assert [row["name"] for row in results(run)["rows"]] == ["full precision", "ptq"]
    assert (run / "quantized/model.safetensors").read_bytes() == (run / "ptq/model.safetensors").read_bytes()


def test_a_run_on_real_images_says_that_it_is_not_zero_shot(tmp_path, caplog):
    path = write_experiment(tmp_path)
    real = ["synthesis.source=real", f"synthesis.real_images={tmp_path / 'images'}", "synthesis.num_images=4"]
    run = pipeline.run(load_config(path, real))
    stored = results(run)
    assert stored["zero_shot"] is False
    read = next(entry["files"] for entry in stored["data_read"] if entry["stage"] == "synthesis")
    assert read == [str(tmp_path / "images")]  # the set itself names the file of each image
    (said,) = [record.getMessage() for record in caplog.records if "not zero-shot" in record.getMessage()]
    assert read[0] in said


def snapshot(run, part="."):
    """Contents of the files of a run, without the times and versions that every command writes anew."""
    files = sorted(path for path in (run / part).rglob("*") if path.is_file() and path.name != "environment.json")
    return {str(path.relative_to(run)): path.read_bytes() for path in files}


SHA = "0" * 64


@pytest.fixture
def config(tmp_path):
    config = load_config(write_experiment(tmp_path))
    open_run(config, SHA, {"machine": "here"})
    return config


@pytest.mark.parametrize("name", ["environment.json", "config.yaml"])
@pytest.mark.parametrize("text", ["[]", "{}x", '{"a": 1}', '{"weights_sha256": 5}', "null", "[" * 100_000, '"a"', None])
def test_a_damaged_or_missing_file_of_a_run_is_made_again_for_the_same_run_only(config, name, text):
    path = config.run_dir / name
    before = path.read_text()
    path.unlink() if text is None else path.write_text(text)
    for other, sha in ((config, "1" * 64), (config.model_copy(update={"seed": 3}), SHA)):
        with pytest.raises(UserError, match=r"damaged|not valid|was made with|allowed"):
            open_run(other, sha, {"machine": "here"})
    open_run(config, SHA, {"machine": "here"})
    assert path.read_text() == before


@pytest.mark.parametrize("text", ["[]", "{}x", '{"a": 1}', '{"weights_sha256": 5}', "null", "[" * 100_000, '"a"'])
def test_a_damaged_environment_file_is_one_line_where_nothing_else_knows_the_run(config, text):
    (config.run_dir / "environment.json").write_text(text)
    (config.run_dir / "results.json").unlink()
    with pytest.raises(UserError, match=r"^\S*environment.json: (damaged|not valid JSON)[^\n]*$"):
        check_run(config, SHA)


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "5",
        '{"rows": {}}',
        '{"seconds": []}',
        '{"layers": null}',
        '{"data_read": "a"}',
        '{"rows": ' + "[" * 100_000,
    ],
)
def test_damaged_results_are_one_line(config, text):
    (config.run_dir / "results.json").write_text(text)
    with pytest.raises(UserError, match=r"^\S*results.json: (damaged[^\n]*rerun the command$|not valid JSON[^\n]*$)"):
        results(config.run_dir)
    open_run(config, SHA, {"machine": "here"})
    assert results(config.run_dir)["rows"] == []


def test_a_folder_is_reopened_with_the_same_settings_on_another_machine(config):
    open_run(config.model_copy(update={"device": "cuda"}), SHA, {"machine": "there"})
    with pytest.raises(UserError, match=r"was made with other settings: seed \(0 there, 3 now\)"):
        check_run(config.model_copy(update={"seed": 3}), SHA)
    with pytest.raises(UserError, match="was made from another checkpoint"):
        check_run(config, "1" * 64)


def test_a_run_with_a_target_says_that_the_target_is_missing_when_it_is_repeated_without(config, tmp_path):
    target = {"export": "onnxruntime", "quantization": config.quantization.model_copy(update={"profile": "full"})}
    exported = config.model_copy(update=target | {"run_dir": tmp_path / "exported"})
    open_run(exported, SHA, {})
    repeated = config.model_copy(update={"run_dir": exported.run_dir})
    with pytest.raises(UserError, match=r"profile \(full there, inputs now\); name export=onnxruntime, as then, or"):
        check_run(repeated, SHA)
