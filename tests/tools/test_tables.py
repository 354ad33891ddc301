"""The tables of the paper: every line is a run that exists, starts again where it stopped, and works at toy size."""

import json
import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from toy.experiment import write_experiment

from common import pipeline
from common.cli import main, parse
from common.config.load import load_config
from common.run_dir import results, update_results
from tools import collect_results, paper_table

ROOT = Path(__file__).parents[2]
TABLES = ["table_yolo yolo11", "table_yolo yolov5", "table_swin", "table_maskrcnn", "table_ablations"]
RESULTS = ["results yolo11n", "results yolov5n", "results_ablations"]
SMOKE = [
    ("table_yolo yolo11", "yolo11s/w4a8/*"),
    ("table_ablations", "*"),
    ("results_ablations", "yolo11n/*/base*/seed1"),
]


def lines_of(table, *options, **environment):
    script, *arguments = table.split()
    command = ["bash", ROOT / "scripts" / f"{script}.sh", *arguments, "--dry-run", *options]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)
    assert done.returncode == 0, done.stderr
    return [shlex.split(line)[1:] for line in done.stdout.splitlines()]


def load(words):
    arguments = parse(words)
    return load_config(ROOT / arguments.config, arguments.overrides)


def cell_of(words):
    return "/".join(load(words).run_dir.parts[-3:])


def smoke_lines():
    """One line for each set of settings, whatever it is called."""
    found = {}
    for table, pattern in SMOKE:
        for words in lines_of(table, "--smoke", "--only", pattern):
            found.setdefault(load(words).model_dump_json(exclude={"run_dir"}), words)
    return list(found.values())


def test_every_script_of_a_table_is_here():
    scripts = {path.stem for pattern in ("table_*", "results*") for path in (ROOT / "scripts").glob(f"{pattern}.sh")}
    assert {table.split()[0] for table in TABLES + RESULTS} == scripts - {"results_micro"}


@pytest.mark.parametrize("table", TABLES + RESULTS)
def test_every_line_loads_and_has_a_run_folder_of_its_own(table):
    lines = lines_of(table, COCO="somewhere/coco", ZSQDET_SHARED="somewhere")
    configs = [load(words) for words in lines]
    folders = [config.run_dir for words, config in zip(lines, configs, strict=True) if words[0] == "run"]
    assert len(set(folders)) == len(folders) >= 20
    for config in configs:
        if "voc" not in str(config.run_dir):
            assert config.data.images.match("somewhere/coco/images/val2017")
        assert not any("$" in str(value) for value in config.model_dump(mode="json").values())


@pytest.mark.parametrize("table", ["yolov5", "yolo11", "swin"])
def test_every_cell_of_the_paper_has_its_line(table):
    script = f"table_yolo {table}" if table.startswith("yolo") else f"table_{table}"
    cells = {cell_of(words): load(words) for words in lines_of(script)}
    paper = paper_table.read_json(paper_table.NUMBERS)["tables"][table]["cells"]
    assert len(paper) == (6 if table == "swin" else 9)
    for place, own in paper.items():
        bits = place.rpartition("/")[2]
        for name in own:
            quantization = cells[f"{place}/{name}"].quantization
            assert f"w{quantization.weight_bits}a{quantization.activation_bits}" == bits
            assert quantization.preset == "paper"


def test_the_baselines_learn_from_real_labels_by_the_detectors_own_loss_alone():
    lines = {cell_of(words): load(words) for words in lines_of("table_yolo yolo11", "--only", "yolo11m/w6a6/*")}
    assert len(lines) == 13
    for name, quantizer, count in (("lsq_full", "lsq", 118287), ("lsq+_2k", "lsq+", 2366)):
        config = lines[f"yolo11m/w6a6/{name}"]
        assert (config.synthesis.source, config.synthesis.labels, config.synthesis.num_images) == (
            "real",
            "true_label",
            count,
        )
        assert config.quantization.quantizer == quantizer
        assert config.training.task_weight > 0
        assert config.training.logit_weight == config.training.feature_weight == 0
    for name in ("lsq_full", "lsq+_full", "lsq_2k", "lsq+_2k"):
        plain, fair = lines[f"yolo11m/w6a6/{name}"], lines[f"yolo11m/w6a6/{name}_distilled"]
        assert (fair.synthesis, fair.quantization) == (plain.synthesis, plain.quantization)
        assert fair.training.feature_weight > 0
        assert fair.training.logit_weight > 0
    assert lines["yolo11m/w6a6/ptq_noise"].training.epochs == 0


def test_settings_are_passed_on_and_unknown_options_are_one_line():
    assert {load(words).seed for words in lines_of("table_ablations", "seed=7")} == {7}
    done = subprocess.run(["bash", ROOT / "scripts/table_swin.sh", "--fast"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: unknown argument '--fast'")
    assert len(done.stderr.splitlines()) == 1


def test_a_table_says_what_it_needs_when_coco_is_not_named():
    environment = {"PATH": "/usr/bin:/bin"}
    for script, name in (("table_yolo.sh", "COCO"), ("results.sh", "ZSQDET_SHARED")):
        command = ["bash", ROOT / "scripts" / script, "yolo11" if name == "COCO" else "yolo11n"]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode != 0
        assert f"{name}: set it to the folder" in done.stderr


@pytest.mark.parametrize(("script", "known"), [("table_yolo", "yolo11 or yolov5"), ("results", "yolo11n or yolov5n")])
def test_a_script_for_two_detectors_names_them(script, known):
    done = subprocess.run(["bash", ROOT / f"scripts/{script}.sh", "yolo12"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, f"error: found 'yolo12' for the detector; give {known}\n")


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """A folder with the toy detector's experiment; its images take the place of the drawn shapes."""
    folder = tmp_path_factory.mktemp("smoke")
    write_experiment(folder)
    (folder / "shapes").mkdir()
    for name in ("images", "annotations.json"):
        (folder / "shapes" / name).symlink_to(folder / name)
    return folder


def with_toy(words, folder):
    """The same line for the toy detector, whose runs take a second; a script's own smoke run has a real one."""
    verb, _, *settings = words
    return [verb, str(folder / "experiment.yaml"), *(word.replace("runs/smoke", str(folder)) for word in settings)]


@pytest.mark.parametrize("words", smoke_lines(), ids=cell_of)
def test_every_kind_of_line_works_at_toy_size(toy, words):
    words = with_toy(words, toy)
    assert main(words) == 0
    config = load_config(Path(words[1]), words[2:])
    rows = [row["name"] for row in results(config.run_dir)["rows"]]
    assert rows == ["full precision", "ptq"] + ["trained"] * (config.training.epochs > 0)
    assert results(config.run_dir)["zero_shot"] == (config.synthesis.labels != "true_label")


def test_a_checkpoint_is_measured_at_another_size_after_its_run(toy):
    lines = lines_of("results yolo11n", "--smoke", "--only", "@(w4a8|640_w4a8_*)")
    assert [words[0] for words in lines] == ["run", "evaluate", "evaluate"]
    for words in lines:
        assert main(with_toy(words, toy)) == 0
    for name in ("ptq", "trained"):
        measured = paper_table.read_json(toy / f"results_yolo11n/640_w4a8_{name}.json")
        assert measured["precision"] == "quantized"
        assert Path(measured["weights"]).name == ("ptq" if name == "ptq" else "w4a8")


@pytest.mark.parametrize(("table", "bits"), [(RESULTS[0], {4, 5, 6, 8}), (RESULTS[1], {4, 6, 8})])
def test_a_toy_sized_line_has_the_bits_of_the_real_one(table, bits):
    real, toy_sized = ([load(words) for words in lines_of(table, *options)] for options in ([], ["--smoke"]))
    assert {config.quantization.weight_bits for config in real} == bits
    for one, other in zip(real, toy_sized, strict=True):
        for key in ("weight_bits", "activation_bits"):
            assert getattr(one.quantization, key) == getattr(other.quantization, key)


def test_a_smoke_run_of_a_script_ends_with_the_table_and_starts_again_in_no_time(tmp_path):
    command = ["bash", ROOT / "scripts/table_yolo.sh", "yolo11", "--smoke", "--only", "yolo11s/w8a8/lsq+_2k"]
    folder = ROOT / "runs/smoke/yolo11/yolo11s/w8a8/lsq+_2k"
    for _ in range(2):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        line = next(line for line in done.stdout.splitlines() if line.startswith("| yolo11s/w8a8/lsq+_2k "))
        assert "43.8" in line  # the paper's
        assert "| yolo11l/w4a8/ours_published " in done.stdout
    assert "training: already complete" in done.stderr
    assert (folder / "report.html").exists()


KEPT = """
table=kept_by_smoke; set -- --smoke; source scripts/table.sh
zsqdet() {
  folder="$*"; folder=${folder##*run_dir=}; folder=${folder%% *}
  if [ -d "$folder" ]; then echo kept; else mkdir -p "$folder"; fi
}
prepare() { :; }
for words in seed=0 seed=0 seed=1 seed=1; do experiment line configs/yolo11/yolo11s.yaml $words; done
"""


def test_a_smoke_run_of_other_settings_is_forgotten_and_one_of_the_same_goes_on():
    shutil.rmtree(ROOT / "runs/smoke/kept_by_smoke", ignore_errors=True)
    done = subprocess.run(["bash", "-c", KEPT, ROOT / "scripts/x.sh"], cwd=ROOT, capture_output=True, text=True)
    shutil.rmtree(ROOT / "runs/smoke/kept_by_smoke")
    title = "== kept_by_smoke: line"
    assert done.stdout.splitlines() == [title, title, "kept", title, title, "kept"], done.stderr


def test_a_pattern_without_a_line_and_a_folder_without_coco_are_one_line(tmp_path):
    command = ["bash", ROOT / "scripts/table_yolo.sh", "yolo11"]
    done = subprocess.run([*command, "--dry-run", "--only", "yolo12*"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: --only: no line of this table is called 'yolo12*'; --dry-run shows them all\n"
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=os.environ | {"COCO": "."})
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: COCO: {tmp_path}/images/val2017 does not exist\n"


@pytest.fixture
def run(tmp_path):
    path = write_experiment(tmp_path)
    return pipeline.run(load_config(path, [f"run_dir={tmp_path}/yolo11s/w4a8/ours", "training.epochs=0"]))


def table_of(run, capsys, *options):
    assert collect_results.main([str(run), "--paper", "yolo11", *options]) == 0
    lines = capsys.readouterr().out.splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    return {row[0]: dict(zip(cells[0], row, strict=True)) for row in cells[2:]}, lines[-1]


def test_ours_stands_beside_the_papers_number_with_the_difference(run, capsys):
    rows = results(run)["rows"]
    rows[0] |= {"AP": 0.4712, "AP50": 0.6}
    rows[1] |= {"AP": 0.4307, "AP50": 0.6001}
    update_results(run, rows=rows)
    found, source = table_of(run, capsys)
    own = found["yolo11s/w4a8/ours"]
    assert (own["paper AP"], own["AP"], own["difference"]) == ("42.6", "43.1", "0.5")
    assert (own["paper AP50"], own["AP50"], own["difference50"]) == ("58.9", "60.0", "1.1")
    assert (own["FP"], own["paper FP"]) == ("47.1", "47.0")
    assert own["evaluated"] == "4 at 64"
    assert own["evaluator"].startswith("pycocotools")
    assert own["not quantized"] == "2 of 4: first output"
    assert own["read"] == "nothing"
    assert "arXiv 2507.16782" in source


def test_cells_without_a_run_are_shown_as_missing(run, capsys, tmp_path):
    found, _ = table_of(run, capsys, "--csv", str(tmp_path / "t.csv"), "--json", str(tmp_path / "t.json"))
    assert len(found) == 1 + 45
    assert found["yolo11l/w8a8/lsq_full"]["AP"] == "missing"
    assert found["yolo11l/w8a8/lsq_full"]["paper AP"] == "50.4"
    assert found["yolo11l/w8a8/lsq_full"]["difference"] == "-"
    assert len(json.loads((tmp_path / "t.json").read_text())) == 46
    update_results(run, rows=[])
    found, _ = table_of(run, capsys)
    assert (found["yolo11s/w4a8/ours"]["AP"], found["yolo11s/w4a8/ours"]["paper AP"]) == ("missing", "42.6")


def test_a_table_that_the_paper_does_not_have_says_so(run, capsys):
    assert collect_results.main([str(run), "--paper", "ablations"]) == 0
    out = capsys.readouterr().out
    assert "The paper has no numbers for ablations" in out
    assert "missing" not in out


def test_the_papers_numbers_are_complete_and_plausible():
    tables = paper_table.read_json(paper_table.NUMBERS)["tables"]
    counts = {name: sum(len(own) for own in table["cells"].values()) for name, table in tables.items()}
    assert counts == {"yolov5": 45, "yolo11": 45, "swin": 18}
    for table in tables.values():
        assert table["source"]
        for place, own in table["cells"].items():
            full = table["full_precision"][place.partition("/")[0]]
            assert all(20 < ap < full[0] and ap < ap50 < full[1] for ap, ap50 in own.values())
