"""Tables are YAML: each loads, and each line is an experiment that the schema allows and says what it isolates."""

import functools
import re
import shlex
from pathlib import Path

import pytest
import yaml

from common.cli import parse
from common.config.load import flatten, load_config
from common.runtime.errors import UserError
from common.runtime.files import read_json
from tools.experiments.__main__ import main
from tools.experiments.estimate import RATES, costs
from tools.experiments.show import paper_numbers
from tools.experiments.table import load_table, matching, micro_config, override_words, table_lines

ROOT = Path(__file__).parents[2]
TABLES = sorted((ROOT / "configs/tables").glob("*.yaml"))
ROW = {"name": "ours", "isolates": "The default recipe, which others change."}
SMALL = {
    "title": "Small",
    "models": {"micro": "configs/yolo11/micro_yolo11.yaml"},
    "bits": ["w4a8"],
    "data": "shapes",
    "rows": [ROW],
}


@functools.cache
def lines_of(table):
    return table_lines(ROOT / f"configs/tables/{table}.yaml")


def configs_of(table, pattern="*"):
    return {line.name: line.load() for line in matching(lines_of(table), pattern)}


def differences(table, row, other):
    """The keys in which two rows of one cell differ, apart from the run folder."""
    one, two = (next(iter(configs_of(table, f"*/w4a4/{name}/seed0").values())) for name in (row, other))
    one, two = (dict(flatten(config.model_dump(mode="json"))) for config in (one, two))
    return {key for key in one if one[key] != two[key]} - {"run_dir"}


def written(tmp_path, values, name="small.yaml"):
    path = tmp_path / name
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)
def test_every_line_of_every_table_loads_and_has_a_run_folder_of_its_own(path):
    lines = lines_of(path.stem)
    configs = [line.load() for line in lines]
    assert len({config.run_dir for config in configs}) == len(lines)
    for line, config in zip(lines, configs, strict=True):
        width = line.name.split("/")[1]
        assert f"w{config.quantization.weight_bits}a{config.quantization.activation_bits}" == width
        assert config.seed == line.seed
        assert parse(shlex.split(line.command)[1:]).command == "run"


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)
def test_every_line_is_an_experiment_at_toy_size_too(path):
    for line in table_lines(path, smoke=True):
        config = line.load()
        assert config.device == "cpu"
        assert config.training.epochs <= 1
        assert "$" not in line.command


@pytest.mark.parametrize("table", ["yolov5", "yolo11", "swin"])
def test_every_cell_of_the_paper_has_its_line_with_the_published_quantizer(table):
    cells = configs_of(table)
    paper = paper_numbers(table)["cells"]
    assert len(paper) == (6 if table == "swin" else 9)
    for place, own in paper.items():
        for name in own:
            assert cells[f"{place}/{name}"].quantization.preset == "paper"


def test_the_baselines_learn_from_real_labels_by_the_detectors_own_loss_alone():
    lines = configs_of("yolo11", "yolo11m/w6a6/*")
    assert len(lines) == 13
    for name, quantizer, count in (("lsq_full", "lsq", 118287), ("lsq+_2k", "lsq+", 2366)):
        config = lines[f"yolo11m/w6a6/{name}"]
        source = (config.synthesis.source, config.synthesis.labels, config.synthesis.num_images)
        assert source == ("real", "true_label", count)
        assert config.quantization.quantizer == quantizer
        assert config.training.task_weight > 0
        assert config.training.logit_weight == config.training.feature_weight == 0
    for name in ("lsq_full", "lsq+_full", "lsq_2k", "lsq+_2k"):
        plain, fair = lines[f"yolo11m/w6a6/{name}"], lines[f"yolo11m/w6a6/{name}_distilled"]
        assert (fair.synthesis, fair.quantization) == (plain.synthesis, plain.quantization)
        assert fair.training.feature_weight > 0
        assert fair.training.logit_weight > 0


START, EPOCHS = "synthesis.label_sampling.start", "training.epochs"
WEIGHTS = {f"synthesis.weights.{name}" for name in ("task", "batch_norm", "first_batch_norm", "total_variation")}
ISOLATED = [
    ("labels_mosaic_unedited", "ours", {START, EPOCHS}),
    ("labels_one_box_unedited", "labels_one_box", {START}),
    ("labels_multi_box_unedited", "labels_one_box_unedited", {"synthesis.labels"}),
    ("loss_published", "images_noise", WEIGHTS | {"synthesis.loss", "synthesis.source"}),
    ("labels_true", "labels_one_box", {"synthesis.labels", "synthesis.annotations"}),
    ("calibration_nearest", "calibration_gptq", {"quantization.rounding"}),
    ("training_weights_fixed", "training_weights_slow", {"training.learning_rate"}),
]


@pytest.mark.parametrize("table", ["ablations_yolo11n", "ablations_yolov5n"])
@pytest.mark.parametrize(("row", "other", "keys"), ISOLATED)
def test_a_row_of_the_ablations_changes_one_thing_alone(table, row, other, keys):
    assert differences(table, row, other) == keys


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)
def test_a_row_that_is_compared_with_another_names_one_of_its_table(path):
    lines = lines_of(path.stem)
    rows = {line.name.rpartition("/")[2] for line in lines}
    for line in lines:
        assert line.isolates.startswith("Against ") == (line.against is not None)
        assert line.against is None or line.against[0].rpartition("/")[2] in rows, line.isolates
    parsed = {line.against for line in lines_of("yolo11n") if line.name.endswith("w4a4/calibrated_codebook")}
    assert parsed == {("yolo11n/w4a4/calibrated", False)}


def test_what_a_table_costs_is_summed_over_its_lines_and_a_shared_set_is_paid_for_once():
    lines = matching(lines_of("yolo11"), "yolo11s/*/ours")
    first, second, *_ = costs(lines, "h200")
    assert first.seconds > 1.2 * second.seconds > 0  # stage one
    iterations = 2048 / 32 * (300 * max(1.43e-4 * 32 * 21.5, 0.045) + 700 * 0.045)
    assert first.seconds - second.seconds == pytest.approx(iterations)
    assert first.gigabytes - second.gigabytes == pytest.approx(2048 * 640 * 640 * 2.1 / 1e9)
    (full,) = costs(matching(lines_of("yolo11"), "yolo11s/w8a8/lsq_full"), "h200")
    assert full.gigabytes < 2  # real images are not copied
    (eight,) = costs(matching(lines_of("yolo11"), "yolo11l/w8a8/ours"), "h200", gpus=8)
    (alone,) = costs(matching(lines_of("yolo11"), "yolo11l/w8a8/ours"), "h200")
    assert eight.seconds < alone.seconds
    assert costs(matching(lines_of("micro_vit"), "*/w8a8/ours/seed0"), "cpu") == [None]
    shipped = {line.model for name in ("yolo11", "yolov5", "swin", "maskrcnn") for line in lines_of(name)}
    assert shipped <= set(read_json(RATES)["models"])


@pytest.mark.parametrize("model", ["n", "s", "x"])
def test_the_costs_on_the_page_are_those_that_a_dry_run_computes(model):
    page = (ROOT / "docs/reproduce.md").read_text().split("<!-- costs -->")[1]
    (row,) = [line for line in page.splitlines() if line.startswith(f"| YOLO11{model} ")]
    hours = [float(value) for cell in row.split("|")[2:-1] for value in cell.split(",")]
    found = []
    for words, gpus in (([], 1), ([], 8), (["synthesis.num_images=100000", "training.epochs=10"], 8)):
        lines = matching(table_lines(ROOT / "configs/tables/models.yaml", words), f"yolo11{model}/w[48]a8/ours")
        first, second = (cost.seconds / 3600 for cost in costs(lines, "h200", gpus))
        found += [first - second, second]
    assert found == pytest.approx(hours, abs=0.051)


def test_a_dry_run_says_what_each_line_costs_and_the_sum(capsys):
    assert main(["run", "configs/tables/yolo11.yaml", "--only", "yolo11s/w[48]a8/ours", "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert all(re.search(r"  # about \d+ h \d\d min, \d+\.\d GB$", line) for line in lines[:2])
    assert re.match(r"# all 2 lines: about \d+ h \d\d min, .* GB; 1 x one NVIDIA H200", lines[2])


def test_the_shared_images_are_divided_into_those_to_choose_on_and_those_to_report():
    path = ROOT / "configs/tables/yolo11n.yaml"
    for options, name in ({}, "shared_test"), ({"on": "shared_dev"}, "shared_dev"):
        lines = table_lines(path, **options)
        assert {line.load().data.annotations for line in lines} == {Path(f"runs/data/{name}.json")}


def test_a_new_bit_width_is_a_word_in_a_list_and_a_row_may_have_its_own(tmp_path):
    rows = [ROW, ROW | {"name": "five", "bits": ["w5a8"]}]
    lines = table_lines(written(tmp_path, SMALL | {"bits": ["w4a8", "w3a8"], "seeds": [0, 1], "rows": rows}))
    names = [f"micro/{bits}/seed{seed}" for bits in ("w4a8/ours", "w3a8/ours", "w5a8/five") for seed in (0, 1)]
    assert [line.full_name for line in lines] == names


def test_a_base_gives_what_a_table_does_not_say_and_rows_are_replaced_by_name(tmp_path):
    other = {"name": "noise", "isolates": "Noise in the place of images.", "overrides": {"synthesis.source": "noise"}}
    written(tmp_path, SMALL | {"rows": [ROW, other]}, "below.yaml")
    third = ROW | {"name": "third"}
    above = {"base": "below.yaml", "bits": ["w8a8"], "rows": [third, other | {"overrides": {"seed": 3}}]}
    table = load_table(written(tmp_path, above))
    assert [row.name for row in table.rows] == ["ours", "noise", "third"]
    assert table.rows[1].overrides == {"seed": 3}
    assert (table.title, table.bits) == ("Small", ("w8a8",))


WRONG = [
    ({"bit": ["w4a8"]}, "small.yaml: bit: unknown key; did you mean bits?"),
    ({"bits": ["w9a8"]}, "bits.0: found 'w9a8'"),
    ({"data": "coco"}, "data: found 'coco'; allowed: coco_val, "),
    ({"rows": [ROW | {"isolate": "x"}]}, "row ours: isolate: unknown key; did you mean isolates?"),
    ({"rows": [{"name": "ours"}]}, "row ours: isolates: missing"),
    ({"rows": [ROW, ROW]}, "found two rows called 'ours'"),
    ({"rows": [ROW | {"isolates": "ours"}]}, "row ours: isolates: found 'ours'; String should have at least 20"),
    ({"base": "small.yaml"}, "which has a base itself"),
]


@pytest.mark.parametrize(("change", "message"), WRONG)
def test_a_mistake_in_a_table_is_one_line_that_names_it(tmp_path, change, message):
    with pytest.raises(UserError) as caught:
        load_table(written(tmp_path, SMALL | change))
    assert message in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_settings_that_the_experiment_does_not_have_are_found_before_anything_runs(tmp_path, capsys):
    row = ROW | {"overrides": {"quantization.rounding": "gptqq", "training.epoch": 3}}
    assert main(["run", str(written(tmp_path, SMALL | {"rows": [row]}))]) == 2
    error = capsys.readouterr().err
    assert "small: micro/w4a8/ours: command line: quantization.rounding: found 'gptqq'" in error
    assert "did you mean training.epochs?" in error


def test_values_of_a_table_arrive_as_on_the_command_line():
    values = {"a": [5, 6], "b": [], "c": False, "d": 1e-5, "e": "lsq+", "f": None, "g": {"x*": {"weight_bits": 4}}}
    words = override_words(values)
    assert words[:5] == ["a=[5,6]", "b=[]", "c=false", "d=1.0e-05", "e=lsq+"]
    assert {w.partition("=")[0]: yaml.safe_load(w.partition("=")[2]) for w in words} == values


def test_commands_are_printed_with_the_folders_that_are_given_and_variables_where_none_is(capsys, monkeypatch):
    for name in ("COCO", "ZSQDET_SHARED"):
        monkeypatch.delenv(name, raising=False)
    words = ["run", "configs/tables/yolo11.yaml", "--only", "yolo11s/w4a8/ours", "--dry-run"]
    assert main(words) == 0
    assert " data.images=$COCO/images/val2017 " in capsys.readouterr().out
    assert main([*words, "--coco", "/data set", "device=cuda", "--gpus", "4"]) == 0
    line = shlex.split(capsys.readouterr().out, comments=True)
    assert line[:2] == ["zsqdet", "run"]
    arguments = parse(line[1:])
    assert arguments.gpus == 4
    config = load_config(arguments.config, arguments.overrides)
    assert (str(config.data.images), config.device) == ("/data set/images/val2017", "cuda")


def test_lines_are_listed_with_what_they_isolate(capsys):
    assert main(["run", "configs/tables/swin.yaml", "--list", "--only", "swin_t/w8a8/ptq_noise"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("swin_t/w8a8/ptq_noise/seed0  Against the PTQ column of ours: random pixels")


@pytest.mark.parametrize("family", ["yolo11", "yolov5", "resnet", "vit"])
def test_every_family_has_a_micro_detector(family):
    assert load_config(Path(micro_config(family))).family == family


def test_a_pattern_without_a_line_and_an_unknown_option_are_one_line(capsys):
    assert main(["run", "configs/tables/swin.yaml", "--only", "swin_x/*"]) == 2
    assert capsys.readouterr().err.startswith("error: --only: no line of this table is called 'swin_x/*'")
    with pytest.raises(SystemExit):
        main(["run", "configs/tables/swin.yaml", "--fast"])
    assert "unknown argument '--fast'" in capsys.readouterr().err


def test_what_a_table_needs_is_said_before_anything_runs(capsys, monkeypatch, tmp_path):
    monkeypatch.delenv("COCO", raising=False)
    words = ["run", "configs/tables/swin.yaml", "--only", "swin_t/w8a8/ours", "--results", str(tmp_path / "r.csv")]
    assert main(words) == 2
    assert capsys.readouterr().err.startswith("error: COCO: not set; --coco DIR or COCO=DIR")
    assert main([*words, "--coco", str(tmp_path)]) == 2
    assert f"coco_val: {tmp_path}/images/val2017 does not exist" in capsys.readouterr().err
