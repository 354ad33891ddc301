"""The report: one file that stands alone, shows what the run folder holds, and says what is missing."""

import base64
import io
import json
import math
import shutil
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from toy.experiment import CONFIG, Page, rename_classes, write_experiment

from common.config.load import flatten, load_config
from common.distillation.progress import load_state
from common.pipeline import stages as pipeline
from common.pipeline.run_dir import results, update_results
from common.quantization import load_quantized
from common.reporting.report import write_report
from common.runtime.files import read_checked_json, write_checked_json

MINUS = "\N{MINUS SIGN}"
ERRORS = ("output_error", "weight_error")
METRICS = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large", "AR100")
SECTIONS = (
    *("summary", "accuracy", "classes", "detections", "layers", "scales", "training", "images", "labels", "synthesis"),
    *("data", "settings", "time", "environment"),
)


@pytest.fixture(scope="module")
def reported(toy_run, tmp_path_factory):
    """A copy of the finished run with its report, only to be read."""
    return write_report(shutil.copytree(toy_run, tmp_path_factory.mktemp("reported") / "run")).parent


@pytest.fixture(scope="module")
def page(reported):
    return Page(reported / "report.html")


def page_of(run):
    return Page(write_report(run))


def with_metrics(run, full, ptq, trained):
    """Replaces the AP and, by multiples of it, the other metrics of the three rows."""
    rows = results(run)["rows"]
    for row, ap in zip(rows, (full, ptq, trained), strict=True):
        row |= {metric: ap * (1 + i / 10) for i, metric in enumerate(METRICS)}
        row["per_class"] = {"circle": ap + 0.05, "square": ap - 0.05}
    update_results(run, rows=rows)
    return rows


def test_the_report_is_written_into_the_run_and_has_every_section(toy_run, reported, page):
    assert not (toy_run / "report.html").exists()
    assert (reported / "report.html").is_file()
    assert tuple(attributes["id"] for attributes in page.attributes("h2")) == SECTIONS
    assert all(page.text[section] for section in SECTIONS)
    assert page.text["header"].count("zero-shot") == 1
    assert "unfinished" not in page.text["header"]
    assert page.open == []  # every element is closed, and in order
    targets = {f"#{attributes['id']}" for _, attributes in page.tags if "id" in attributes}
    assert {attributes["href"] for attributes in page.attributes("a")} == targets


def test_nothing_is_loaded_from_outside_and_nothing_runs(page):
    assert not {"script", "link", "iframe", "object", "base", "form"} & {tag for tag, _ in page.tags}
    for tag, attributes in page.tags:
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            if name in ("src", "href", "srcset", "xlink:href", "poster", "data", "action"):
                allowed = "#" if tag == "a" else "data:image/"
                assert value.startswith(allowed), (tag, value[:80])
    assert "http://" not in page.source
    assert "https://" not in page.source
    style = page.source.partition("<style>")[2].partition("</style>")[0]
    assert "url(" not in style
    assert "@import" not in style
    policy = next(a["content"] for a in page.attributes("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy


def test_every_image_can_be_decoded_and_says_what_it_shows(page):
    images = page.attributes("img")
    assert all(attributes["alt"].strip() for attributes in images)
    kinds = set()
    for attributes in images + page.attributes("image"):
        header, _, content = (attributes.get("src") or attributes["href"]).partition(",")
        kinds.add(header)
        content = base64.b64decode(content, validate=True)
        if "svg" in header:
            for element in ElementTree.fromstring(content).iter():
                links = [value for name, value in element.attrib.items() if name.endswith("href")]
                assert all(link.startswith("#") for link in links)
        else:
            Image.open(io.BytesIO(content)).load()
    assert kinds == {"data:image/svg+xml;base64", "data:image/jpeg;base64"}


def test_the_same_run_gives_the_same_file(reported):
    before = (reported / "report.html").read_bytes()
    assert write_report(reported) == reported / "report.html"
    assert (reported / "report.html").read_bytes() == before


def test_every_metric_of_every_row_is_shown_with_its_difference_to_full_precision(run, undrawn):
    rows = with_metrics(run, 0.4, 0.25, 0.3571)
    table = page_of(run).rows["accuracy"]
    assert table[0][2:] == [metric.replace("_", " ") for metric in METRICS]
    for line, row in zip(table[1:4], rows, strict=True):
        for cell, metric in zip(line[2:], METRICS, strict=True):
            difference = row[metric] - rows[0][metric]
            shown = f"{row[metric]:.4f} {difference:+.4f}" if row is not rows[0] else f"{row[metric]:.4f}"
            assert cell == shown.replace("-", "\N{MINUS SIGN}")
    assert [line[1] for line in table[1:4]] == ["float", "W4A4", "W4A4"]


@pytest.mark.parametrize(
    ("full", "ptq", "trained", "share"),
    [
        (0.4, 0.2, 0.3, "50 %"),
        (0.4, 0.2, 0.16, "\N{MINUS SIGN}20 %"),
        (0.4, 0.2, 0.44, "120 %"),
        (0.3, 0.298, 0.2, "-"),
    ],
)
def test_what_training_recovered_is_a_fraction_of_what_ptq_lost(run, undrawn, full, ptq, trained, share):
    with_metrics(run, full, ptq, trained)
    line = page_of(run).rows["accuracy"][4]
    assert line[0] == "Recovered by training"
    assert line[2] == share


def test_a_metric_without_anything_to_measure_is_not_a_number(run, undrawn):
    rows = with_metrics(run, 0.4, 0.25, 0.35)
    for row in rows:
        row["AP_large"] = -1.0
    update_results(run, rows=rows)
    table = page_of(run).rows["accuracy"]
    place = 2 + METRICS.index("AP_large")
    assert [line[place] for line in table[1:]] == ["n/a", "n/a", "n/a", "-"]


def test_classes_are_listed_with_their_ap_the_largest_loss_first(run, undrawn):
    rows = with_metrics(run, 0.4, 0.25, 0.35)
    rows[2]["per_class"]["square"] = 0.01
    update_results(run, rows=rows)
    table = page_of(run).rows["classes"]
    assert [line[0] for line in table[1:]] == ["square", "circle"]
    assert table[1][1:] == ["0.3500", "0.2000 \N{MINUS SIGN}0.1500", "0.0100 \N{MINUS SIGN}0.3400"]


def test_masks_have_a_table_and_classes_of_their_own(run, undrawn):
    rows = with_metrics(run, 0.4, 0.25, 0.35)
    for row, ap in zip(rows, (0.3, 0.2, 0.22), strict=True):
        classes = {"circle": ap - 0.1, "square": ap + 0.1}
        row["segm"] = {metric: ap * (1 + i / 10) for i, metric in enumerate(METRICS)} | {"per_class": classes}
    update_results(run, rows=rows)
    page = page_of(run)
    assert page.open == []
    boxes, masks = page.rows["accuracy"][:5], page.rows["accuracy"][5:]
    assert boxes[0] == masks[0]
    assert [line[2] for line in boxes[1:]] == ["0.4000", f"0.2500 {MINUS}0.1500", f"0.3500 {MINUS}0.0500", "67 %"]
    assert [line[2] for line in masks[1:]] == ["0.3000", f"0.2000 {MINUS}0.1000", f"0.2200 {MINUS}0.0800", "20 %"]
    assert masks[2][3] == f"0.2200 {MINUS}0.1100"
    assert f"mask AP 0.2200 ({MINUS}0.0800)" in page.text["summary"]
    assert [line[:2] for line in page.rows["classes"] if line[0] == "circle"] == [
        ["circle", "0.4500"],
        ["circle", "0.2000"],
    ]
    del rows[2]["segm"]
    update_results(run, rows=rows)
    assert "masks" not in page_of(run).text["accuracy"].lower()


def test_every_layer_is_listed_with_what_became_of_it_and_why(reported, page):
    layers = results(reported)["layers"]
    table = page.rows["layers"][1:]
    assert [line[0] for line in table] == [layer["name"] for layer in layers]
    for line, layer in zip(table, layers, strict=True):
        assert line[2] == layer["role"]
        assert line[-1] == layer["reason"]
        if layer["weight_bits"] == 32:
            assert line[3:-1] == ["float"]
        else:
            errors = [f"{layer[key]:.3g} {-10 * math.log10(layer[key]):.1f} dB" for key in ERRORS]
            scales = [f"{layer[key]:.3g}" for key in ("weight_scale", "activation_scale")]
            assert line[3:9] == ["4, per channel", f"4, {layer['activation_range']}", *errors, *scales]


def test_the_input_range_of_a_layer_is_that_of_its_quantizer(reported, page):
    table, layers = page.rows["layers"][1:], results(reported)["layers"]
    shown = {line[0]: line[9:11] for line in table}
    module = load_quantized(reported / "ptq")[1]
    checked = 0
    for layer in layers:
        if layer["weight_bits"] < 32:
            quantizer = module.get_submodule(layer["name"]).input_quantizer
            ends = quantizer(torch.tensor([[-1e6, 1e6]])).flatten().tolist()
            zero_point = "-" if layer["activation_range"] == "symmetric" else str(-quantizer.low)
            assert shown[layer["name"]] == [zero_point, " to ".join(f"{end:.3g}".replace("-", MINUS) for end in ends)]
            checked += 1
    assert checked == 2


def test_layers_that_are_not_quantized_are_named_before_the_table(reported, page):
    text = page.text["layers"].partition("Output error")[0]
    kept = [layer for layer in results(reported)["layers"] if layer["weight_bits"] == 32]
    assert len(kept) == 2
    for layer in kept:
        assert f"{layer['reason']}: {layer['name']}" in text
    sizes = {n: t.numel() for n, t in load_file(reported / "ptq/model.safetensors").items() if n.endswith(".weight")}
    sizes = {name: size for name, size in sizes.items() if ".bn." not in name}
    quantized = sizes["blocks.1.conv.weight"] + sizes["blocks.2.conv.weight"]
    assert f"2 W4A4 ({100 * quantized / sum(sizes.values()):.0f} % of all weights)" in text


def test_settings_that_differ_from_the_defaults_come_first_and_all_of_them_below(reported, page):
    table = page.rows["settings"]
    second = next(i for i, line in enumerate(table) if "Meaning" in line)
    written = dict(flatten(yaml.safe_load(CONFIG.format(folder="."))))
    places = {"weights", "run_dir", "device", "data.images", "data.annotations"}
    places |= {"synthesis.directory", "evaluation.directory"}
    assert {line[0] for line in table[1:second]} == written.keys() - places
    assert ["synthesis.num_images", "6", "2048"] in table[1:second]
    stored = dict(flatten(yaml.safe_load((reported / "config.yaml").read_text())))
    assert [line[0] for line in table[second + 1 :]] == list(stored)


def test_the_synthetic_images_have_their_boxes_and_class_names(reported, page):
    content = json.loads((imageset(reported) / "annotations.json").read_text())
    pictures = page.attributes("svg", "images")
    assert len(pictures) == len(content["images"]) == 6
    names = {category["id"]: category["name"] for category in content["categories"]}
    shown = [[float(rect[key]) for key in ("x", "y", "width", "height")] for rect in page.attributes("rect", "images")]
    expected = [annotation["bbox"] for annotation in content["annotations"]]
    assert len(shown) == len(expected) > 0
    for box, reference in zip(shown, expected, strict=True):
        assert box == pytest.approx(reference, abs=0.051)
    for image, picture in zip(content["images"], pictures, strict=True):
        own = [names[a["category_id"]] for a in content["annotations"] if a["image_id"] == image["id"]]
        assert picture["aria-label"].endswith(": " + (", ".join(own) or "no labels"))
    assert 0.9 * len(expected) < len(page.attributes("text", "images")) <= len(expected)  # those that have room


def test_the_first_images_are_shown_during_synthesis_with_the_labels_of_each_iteration(reported, page):
    rows = json.loads((imageset(reported) / "set.json").read_text())["snapshots"]
    assert [(row["size"], row["iteration"]) for row in rows] == [(32, 0), (32, 2), (32, 4), (64, 0), (64, 1), (64, 2)]
    boxes = [box for row in rows for image in row["boxes"] for box in image]
    shown = page.attributes("rect", "synthesis")
    assert len(page.attributes("svg", "synthesis")) == 6 * 3
    assert len(shown) == len(boxes) > 0
    for (x1, y1, x2, y2), rect in zip(boxes, shown, strict=True):
        own = [float(rect[key]) for key in ("x", "y", "width", "height")]
        assert own == pytest.approx([x1, y1, x2 - x1, y2 - y1], abs=0.051)
    assert f"64 pixels, iteration 2, {sum(map(len, rows[-1]['boxes']))} boxes" in page.text["synthesis"]


def test_a_set_of_an_older_version_shows_its_images_without_boxes(run, undrawn):
    path = imageset(run) / "set.json"
    before = path.read_text()
    content = read_checked_json(path)
    for row in content["snapshots"]:
        del row["boxes"], row["labels"]
    write_checked_json(path, content)
    page = page_of(run)
    path.write_text(before)
    assert (len(page.attributes("svg", "synthesis")), page.attributes("rect", "synthesis")) == (18, [])


def test_the_selected_epoch_is_named(reported, page):
    kept = load_state(reported / "training")[0].best_epoch
    assert f"Epoch {kept} is selected" in page.text["training"]
    history = [json.loads(line) for line in (reported / "training/history.jsonl").read_text().splitlines()]
    lines = page.rows["training"][1:]
    assert [line[0].split()[0] for line in lines] == [str(row["epoch"]) for row in history]
    assert [line[0] for line in lines if "selected" in line[0]] == [f"{kept} (selected)"]
    assert [line[5] for line in lines] == [f"{row['fidelity']:.3g}" for row in history]
    assert [line[6] for line in lines] == [f"{row['held_out']:.3g}" for row in history]


def test_step_sizes_are_those_of_the_two_checkpoints(tmp_path, undrawn):
    # The last epoch, since the best one may be epoch 0, which has the same steps.
    run = pipeline.run(load_config(write_experiment(tmp_path), ["training.selection=last", "training.epochs=1"]))
    before, after = (load_file(run / name / "model.safetensors") for name in ("ptq", "quantized"))
    table = {(line[0], line[1]): line[2:] for line in page_of(run).rows["scales"][1:]}
    keys = [key for key in before if key.endswith("_quantizer.scale")]
    assert len(table) == len(keys) == 4
    for key in keys:
        layer, _, side = key.removesuffix("_quantizer.scale").rpartition(".")
        means = [steps[key].mean().item() for steps in (before, after)]
        assert table[layer, side][:3] == [str(before[key].numel()), *(f"{mean:.3g}" for mean in means)]


def test_times_versions_and_the_commit_are_shown(run, undrawn):
    update_results(run, seconds={"synthesis": 7384.0, "calibration": 62.0, "training": 5.04})
    page = page_of(run)
    assert page.rows["time"][1:] == [
        ["synthesis", "2 h 03 min"], ["calibration", "1 min 02 s"], ["training", "5.0 s"], ["total", "2 h 04 min"],
    ]  # fmt: skip
    environment = json.loads((run / "environment.json").read_text())
    shown = {line[0]: line[1] for line in page.rows["environment"]}
    assert shown["weights sha256"] == environment["weights_sha256"]
    assert shown.get("commit") == environment["commit"]
    for name, version in environment["versions"].items():
        assert shown[name] == (version or "not installed")


def test_what_comes_from_files_is_shown_as_text_and_never_as_markup(toy_run, tmp_path):
    evil = '<script>alert("1")</script>&amp;'
    run = shutil.copytree(toy_run, tmp_path / "<img src=x onerror=alert(1)>")
    images = shutil.copytree(imageset(run), tmp_path / "images")
    rename_classes(images, evil)
    stored = results(run)
    for row in stored["rows"]:
        row["per_class"] = {evil: 0.5}
    stored["layers"][1] |= {"reason": evil, "name": f"{evil}$_"}
    stored["data_read"][1]["files"] = [evil] * 6
    update_results(run, **stored | {"imageset": str(images)})
    page = page_of(run)
    assert "script" not in {tag for tag, _ in page.tags}
    assert not any("onerror" in attributes for _, attributes in page.tags)
    assert "<img src=x onerror=alert(1)>" in page.text["header"]
    assert page.rows["classes"][1][0] == evil
    assert page.rows["layers"][2][0] == f"{evil}$_"
    assert page.rows["data"][2][2].count(evil) == 7
    assert evil in page.text["images"]


def imageset(run):
    return Path(results(run)["imageset"])
