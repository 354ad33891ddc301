"""The page that compares runs, what a run's page shows beside a COCO file, and runs that get no page."""

import base64
import json
import shutil
import subprocess
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from toy.experiment import Page, write_coco, write_experiment

from common.cli import main
from common.config.load import load_config
from common.detection.masks import encode
from common.pipeline import stages as pipeline
from common.pipeline.run_dir import predictions_file, results, update_results
from common.reporting.comparison import write_comparison
from common.reporting.pictures import picture_of
from common.reporting.report import write_report
from common.runtime.errors import UserError
from common.runtime.files import read_checked_json, sha256, write_checked_json

MINUS = "\N{MINUS SIGN}"


@pytest.fixture(scope="module")
def toy_runs(tmp_path_factory):
    path = write_experiment(tmp_path_factory.mktemp("runs"))
    more = {"first": [], "second": ["quantization.weight_bits=8", "training.epochs=0"]}
    return [pipeline.run(load_config(path, [f"run_dir={path.parent / n}", *changes])) for n, changes in more.items()]


@pytest.fixture
def runs(toy_runs, tmp_path):
    """Copies, to be changed."""
    return [shutil.copytree(run, tmp_path / run.name) for run in toy_runs]


def set_rows(run, **ap):
    rows = results(run)["rows"]
    for row in rows:
        row["AP"] = ap[row["name"].partition(" ")[0]]
        row["per_class"] = {"circle": row["AP"] + 0.1, "square": row["AP"]}
    update_results(run, rows=rows)


def compared(runs, folder):
    return Page(write_comparison(runs, folder / "comparison.html"))


def test_every_run_is_a_row_with_differences_to_full_precision_and_to_the_first_run(runs, tmp_path):
    set_rows(runs[0], full=0.4, ptq=0.2, trained=0.3)
    set_rows(runs[1], full=0.4, ptq=0.35)
    page = compared(runs, tmp_path)
    page.check_alone()
    table = page.rows["result"]
    assert table[1] == ["first", "W4A4", "zero-shot", "0.4000", f"0.2000 {MINUS}0.2000", f"0.3000 {MINUS}0.1000"]
    assert table[2] == ["second", "W8A4", "zero-shot", "0.4000", f"0.3500 {MINUS}0.0500", "n/a"]
    assert [line[:2] for line in table[4:6]] == [["first", "0.3000"], ["second", "0.3500 +0.0500"]]


def test_masks_are_compared_where_a_run_has_them(runs, tmp_path):
    set_rows(runs[0], full=0.4, ptq=0.2, trained=0.3)
    set_rows(runs[1], full=0.4, ptq=0.35)
    assert "Mask AP" not in compared(runs, tmp_path).text["result"]
    rows = results(runs[0])["rows"]
    for row, ap in zip(rows, (0.3, 0.1, 0.25), strict=True):
        row["segm"] = {"AP": ap}
    update_results(runs[0], rows=rows)
    page = compared(runs, tmp_path)
    page.check_alone()
    assert "Mask AP" in page.text["result"]
    table = page.rows["result"]
    assert table[4] == ["first", "W4A4", "zero-shot", "0.3000", f"0.1000 {MINUS}0.2000", f"0.2500 {MINUS}0.0500"]
    assert table[5][3:] == ["n/a", "n/a", "n/a"]


def test_the_settings_that_differ_are_listed_and_no_others(runs, tmp_path, undrawn):
    table = compared(runs, tmp_path).rows["settings"]
    assert table == [["Key", "first", "second"], ["quantization.weight_bits", "4", "8"], ["training.epochs", "2", "0"]]


def test_classes_stand_with_the_largest_spread_first(runs, tmp_path, undrawn):
    set_rows(runs[0], full=0.4, ptq=0.2, trained=0.3)
    set_rows(runs[1], full=0.4, ptq=0.35)
    stored = results(runs[1])["rows"]
    stored[-1]["per_class"] = {"circle": 0.41, "square": 0.1}
    update_results(runs[1], rows=stored)
    table = compared(runs, tmp_path).rows["classes"]
    assert table[1:] == [["square", "0.3000", f"0.1000 {MINUS}0.2000"], ["circle", "0.4000", "0.4100 +0.0100"]]


def test_runs_that_cannot_be_compared_are_said_to(runs, tmp_path, undrawn):
    assert "different" not in compared(runs, tmp_path).text["result"]
    environment = read_checked_json(runs[1] / "environment.json")
    write_checked_json(runs[1] / "environment.json", environment | {"weights_sha256": "0" * 64})
    update_results(runs[1], measured_on={}, zero_shot=False)
    text = compared(runs, tmp_path).text["result"]
    assert "start from different float checkpoints" in text
    assert "not evaluated on the same images" in text
    assert "some are not" in text


def test_runs_without_results_are_compared_by_their_settings(runs, tmp_path, undrawn):
    for run in runs:
        update_results(run, rows=[])
    page = compared(runs, tmp_path)
    assert "None of these runs has been evaluated" in page.text["result"]
    assert "quantization.weight_bits" in page.text["settings"]


def test_runs_without_labels_are_compared_by_their_fidelity(runs, tmp_path):
    for run, value in zip(runs, (0.7, 0.9), strict=True):
        rows = [{"name": "ptq", "AP": value, "weight_bits": 4, "activation_bits": 4, "objects": 12}]
        update_results(run, rows=[], fidelity={"rows": rows, "images": 5, "synthetic": run is runs[0]})
    page = compared(runs, tmp_path)
    page.check_alone()
    assert "measured yet" not in page.text["result"]
    assert "None of these runs" not in page.text["result"]
    assert page.rows["result"][1:] == [
        ["first", "W4A4", "0.7000", "-", "12", "5 held-out synthetic images"],
        ["second", "W8A4", "0.9000", "-", "12", "5 images of data.images"],
    ]
    assert "a better estimate" in Page(write_report(runs[0])).text["fidelity"]
    assert "So few make it a rough number: give more images." in Page(write_report(runs[1])).text["fidelity"]
    update_results(runs[1], fidelity={"rows": []})
    assert "Neither AP nor fidelity has been measured yet of second." in compared(runs, tmp_path).text["result"]


def test_the_errors_of_the_layers_stand_side_by_side(runs, tmp_path, undrawn):
    table = compared(runs, tmp_path).rows["layers"]
    errors = [{row["name"]: row.get("output_error") for row in results(run)["layers"]} for run in runs]
    assert table[0] == ["Layer", "first", "second"]
    assert len(table) == 3
    for name, *values in table[1:]:
        assert [value.split()[0] for value in values] == [f"{own[name]:.3g}" for own in errors]


def test_names_are_as_long_as_it_takes_to_tell_runs_apart(runs, tmp_path, undrawn):
    other = shutil.copytree(runs[0], tmp_path / "elsewhere" / "first")
    page = compared([runs[0], other], tmp_path)
    assert [line[0] for line in page.rows["result"][1:3]] == [f"{tmp_path.name}/first", "elsewhere/first"]
    assert "All settings are the same" in page.text["settings"]


def test_names_and_classes_are_shown_as_text(runs, tmp_path):
    evil = shutil.copytree(runs[0], tmp_path / "<script>alert(1)<")
    stored = results(evil)["rows"]
    stored[-1]["per_class"] = {"<b onload=x>": 0.5}
    update_results(evil, rows=stored)
    page = compared([evil, runs[1]], tmp_path)
    assert "script" not in {tag for tag, _ in page.tags}
    assert "<b onload=x>" in page.text["classes"]


def test_one_run_twice_is_no_comparison(runs, tmp_path):
    with pytest.raises(UserError, match="two different run folders"):
        write_comparison([runs[0], runs[0]], tmp_path / "comparison.html")


def test_the_command_writes_every_report_and_the_comparison(runs, tmp_path, capsys):
    assert main(["report", *map(str, runs), "--labels", str(runs[0] / "nothing.json")]) == 2
    assert main(["report", *map(str, runs)]) == 0
    written = capsys.readouterr().out.split()
    assert written == [*(str(run / "report.html") for run in runs), str(tmp_path / "comparison.html")]
    everything = [*map(str, runs), written[-1]]  # as runs/* gives it
    assert main(["report", *everything, "--out", str(tmp_path / "own.html")]) == 0
    assert main(["report", written[-1]]) == 2
    assert (tmp_path / "own.html").read_bytes() == (tmp_path / "comparison.html").read_bytes()


def test_labels_are_counted_beside_those_of_a_file(runs, tmp_path):
    write_coco(tmp_path, boxes=3)
    content = json.loads((tmp_path / "annotations.json").read_text())
    content["annotations"][0]["iscrowd"] = 1
    (tmp_path / "annotations.json").write_text(json.dumps(content))
    page = Page(write_report(runs[0], tmp_path / "annotations.json"))
    page.check_alone()
    own = json.loads((imageset(runs[0]) / "annotations.json").read_text())
    assert f"{len(own['annotations'])} boxes in 6 images" in page.text["labels"]
    assert "11 boxes in 4 images" in page.text["labels"]
    assert len(page.attributes("img", "labels")) == 4
    alone = Page(write_report(runs[0]))
    assert "11 boxes" not in alone.text["labels"]
    assert len(alone.attributes("img", "labels")) == 4


def put_predictions(run, name, predictions):
    path = predictions_file(run, name)
    path.write_text(json.dumps(predictions))
    rows = [row | {"predictions_sha256": sha256(path)} if row["name"] == name else row for row in results(run)["rows"]]
    update_results(run, rows=rows)


def test_predictions_that_are_not_those_that_were_measured_are_not_shown(runs, undrawn):
    predictions_file(runs[0], "trained").write_text("[]")
    page = Page(write_report(runs[0]))
    assert "trained.json: damaged, its SHA-256 is not the recorded one; rerun the command" in page.text["detections"]


def test_detections_of_both_detectors_stand_side_by_side(runs, undrawn):
    found = {"full precision": 0.9, "trained": 0.5, "ptq": 0.1}
    for name, confidence in found.items():
        rows = [{"image_id": 2, "category_id": 1, "bbox": [5, 6, 20, 10], "score": confidence}] * 2
        rows.append({"image_id": 2, "category_id": 2, "bbox": [1, 1, 2, 2], "score": 0.2})
        put_predictions(runs[0], name, rows)
    page = Page(write_report(runs[0]))
    captions = [svg["aria-label"] for svg in page.attributes("svg", "detections")]
    assert captions[2:4] == ["Full precision, 2.png: 2 detections", "QAT, 2.png: 2 detections"]
    assert captions[4].endswith("0 detections")
    assert len(captions) == 8
    boxes = [[float(r[k]) for k in ("x", "y", "width", "height")] for r in page.attributes("rect", "detections")]
    assert boxes == [[5, 6, 20, 10]] * 4
    assert "circle 0.90" in page.text["detections"]
    assert "circle 0.50" in page.text["detections"]
    assert "second: QAT" in page.text["detections"]
    calibrated = Page(write_report(runs[1]))
    assert "second: PTQ" in calibrated.text["detections"]


def test_names_on_a_picture_cover_one_another_nowhere():
    boxes = [[10, 60, 50, 90], [10, 60, 52, 92], [12, 61, 50, 90], [11, 60, 50, 91], [60, 0, 99, 40]]
    picture = picture_of(torch.zeros(3, 100, 100, dtype=torch.uint8), boxes, [0] * 5, ["circle"] * 5, "", lines=10)
    assert [box.name for box in picture.boxes] == ["circle", "circle", "", "", "circle"]
    lines = [box.text_y for box in picture.boxes if box.name]
    assert lines == [57.5, 70, 10]  # above, inside where that is taken, and inside at the upper border


def test_the_classes_that_lost_most_and_those_that_won_have_a_chart_each(runs):
    rows = results(runs[0])["rows"]
    for factor, row in enumerate(rows):
        row["per_class"] = {f"c{i}": 0.5 + factor * (i - 10) / 100 for i in range(15)}
    update_results(runs[0], rows=rows)
    charts = [image["alt"] for image in Page(write_report(runs[0])).attributes("img", "classes")]
    assert charts == [
        "The 12 classes with the largest drop of AP, against full precision.",
        "The 3 classes with the smallest drop, or a gain.",
    ]


def test_vocs_own_precision_stands_below_the_table(runs, undrawn):
    rows = results(runs[0])["rows"]
    for row, value in zip(rows, (0.7, 0.25, -1), strict=True):
        row["AP50_voc07"] = value
    update_results(runs[0], rows=rows)
    arrow = "\N{RIGHTWARDS ARROW}"
    assert (
        f"(11-point interpolation): 0.7000 {arrow} 0.2500 {arrow} n/a." in Page(write_report(runs[0])).text["accuracy"]
    )


def test_masks_are_shown_where_the_detector_gives_them(runs, undrawn):
    def inside(picture):
        data = picture["href"].partition(",")[2]
        pixels = cv2.imdecode(np.frombuffer(base64.b64decode(data), np.uint8), cv2.IMREAD_COLOR)
        return pixels[8:24, 8:24].astype(float).mean(), pixels[34:46, 34:60].astype(float).mean()

    row = {"image_id": 2, "category_id": 1, "bbox": [5, 5, 25, 25], "score": 0.9}
    plane = torch.zeros(1, 48, 64, dtype=torch.bool)
    plane[:, 5:30, 5:30] = True
    for name, rows in (("full precision", [row]), ("trained", [row | {"segmentation": encode(plane)[0]}])):
        put_predictions(runs[0], name, rows)
    left, right = Page(write_report(runs[0])).attributes("image", "detections")[2:4]
    assert abs(inside(left)[0] - inside(right)[0]) > 10
    assert abs(inside(left)[1] - inside(right)[1]) < 2


def test_the_summary_says_what_was_quantized_with_which_result(runs, undrawn):
    set_rows(runs[0], full=0.4, ptq=0.2, trained=0.3)
    set_rows(runs[1], full=0.4, ptq=0.35)
    trained, calibrated = (Page(write_report(run)) for run in runs)
    cards = f"Full precision 0.4000 AP PTQ 0.2000 AP ({MINUS}0.2000) QAT 0.3000 AP ({MINUS}0.1000)"
    assert f"{cards} Recovered by training 50 %" in trained.text["summary"]
    assert "labels used in training" in trained.text["images"]
    assert "the labels of the set" in calibrated.text["images"]
    assert "below 8 bits uniform weights have a zero point for each scale" in trained.text["layers"]
    assert "4 images, pycocotools" in trained.text["summary"]
    assert "images with a longer side of 64 pixels, padded to rectangular batches" in trained.text["summary"]
    facts = dict(trained.rows["summary"])
    assert facts["Model"] == "toy, toy.txt"
    assert facts["Bits"] == "W4A4"
    levels = "weights uniform, activations uniform; scales: least squared error"
    assert facts["Levels"] == f"{levels}, trained by LSQ"
    assert dict(calibrated.rows["summary"])["Levels"] == f"{levels}, not trained"
    assert facts["Quantized layers"].startswith("2 of 4: 2 W4A4 (")
    assert facts["In float"] == "first (1), output (1)"
    assert facts["Zero-shot"].startswith("yes")
    assert facts["Images"].startswith("6 synthetic, 64 \N{MULTIPLICATION SIGN} 64 pixels; 4 for calibration")
    assert facts["Training"].startswith("2 epochs, epoch ")
    assert dict(calibrated.rows["summary"])["Training"] == "none (PTQ only)"
    assert "W8A4" in dict(calibrated.rows["summary"])["Bits"]


def test_the_summary_counts_the_layers_of_each_combination_of_bits(runs, undrawn):
    path = runs[0] / "results.json"
    stored = read_checked_json(path)
    quantized = [layer for layer in stored["layers"] if layer["weight_bits"] == 4]
    for layer, bits in zip(quantized, (8, 5), strict=True):
        layer["weight_bits"] = bits
    write_checked_json(path, stored)
    said = dict(Page(write_report(runs[0])).rows["summary"])["Quantized layers"]
    assert "1 W8A4" in said
    assert "1 W5A4" in said


def test_without_the_evaluations_files_the_page_says_what_is_missing(runs, undrawn):
    shutil.rmtree(runs[0] / "predictions")
    assert "Not available" in Page(write_report(runs[0])).text["detections"]


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs the program chromium")
@pytest.mark.parametrize("size", [(1200, 900), (390, 844)])
def test_a_browser_shows_the_page(runs, tmp_path, size):
    page, shot = write_comparison(runs, tmp_path / "comparison.html"), tmp_path / "shot.png"
    options = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        f"--user-data-dir={tmp_path}/profile",
    ]
    command = ["chromium", *options, f"--window-size={size[0]},{size[1]}", f"--screenshot={shot}", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "Refused" not in done.stderr
    pixels = np.asarray(Image.open(shot).convert("L"), dtype=float)
    assert pixels.shape == size[::-1]
    assert (pixels.std(1) > 5).mean() > 0.2  # rows with something on them


def imageset(run):
    return Path(results(run)["imageset"])


@pytest.mark.parametrize("name", ["missing", "empty", "file"])
def test_a_folder_that_is_no_run_is_refused_in_one_line(tmp_path, name):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError) as error:
        write_report(tmp_path / name)
    assert str(error.value).startswith(f"{tmp_path / name}: not a run folder")
    assert len(str(error.value).splitlines()) == 1
    assert not (tmp_path / name / "report.html").exists()


@pytest.mark.parametrize("name", ["results.json", "config.yaml", "training/history.jsonl", "ptq/model.safetensors"])
@pytest.mark.parametrize("content", [b"{[", b"\xf4", b"5\n"])
def test_a_damaged_file_of_a_run_is_named_in_one_line(run, name, content):
    (run / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        write_report(run)
    assert str(run / name) in str(error.value)
    assert len(str(error.value).splitlines()) == 1
    assert not (run / "report.html").exists()


FORGED = {
    "results.json": [
        {"rows": [{}]},
        {"rows": ["a"]},
        {"rows": [{"name": "ptq", "AP": "a"}]},
        {"layers": ["a"]},
        {"layers": [{}]},
        {"layers": [{"name": "a", "role": "body", "reason": "", "weight_bits": "8", "activation_bits": None}]},
        {"layers": [{"name": "a", "role": "body", "reason": "", "weight_bits": 8, "activation_bits": 8}]},
        {"seconds": {"ptq": "a"}},
        {"files": {"ptq": ["a"]}},
        {"imageset": 5},
        {"data_read": [{}]},
        {"fidelity": 5},
        {"measured_on": 5},
    ],
    "environment.json": [{"versions": []}, {"continued_with": [5]}, {"weights_sha256": ""}, {"weights_sha256": 5}],
}


@pytest.mark.parametrize(
    ("name", "changes"), [(name, changes) for name, rows in FORGED.items() for changes in rows], ids=str
)
def test_a_file_with_a_right_hash_and_other_content_is_named_in_one_line(run, name, changes, capsys):
    write_checked_json(run / name, read_checked_json(run / name) | changes)
    with pytest.raises(
        UserError, match=rf"^{run / name}: damaged: {next(iter(changes))}.*: found .*; .*[^\n]*$"
    ) as error:
        write_report(run)
    assert len(str(error.value).splitlines()) == 1
    assert not (run / "report.html").exists()
    if name == "results.json":
        assert main(["info", str(run)]) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_changed_environment_is_noticed_by_the_report(run):
    content = json.loads((run / "environment.json").read_text())
    (run / "environment.json").write_text(json.dumps(content | {"platform": "another"}))
    with pytest.raises(UserError, match=r"environment.json: damaged, its content is not what was written"):
        write_report(run)
