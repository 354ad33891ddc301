"""results.csv: one row a run, written by the runner, checked against tables, schema and run folders."""

import dataclasses
import json
import re
import shutil
import threading
from pathlib import Path

import pytest
from test_run import start_here, write_table

from common.detection.average_precision import score
from common.pipeline.run_dir import predictions_file, results, update_results
from common.runtime.files import read_json, sha256
from tools.experiments import fidelity, show, store
from tools.experiments.__main__ import main
from tools.experiments.compare_ap import difference
from tools.experiments.show import NUMBERS, PAPER_COLUMNS, cell, paper_numbers
from tools.experiments.store import Result, grouped
from tools.experiments.table import table_lines


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with the toy table, run once: tables/small.yaml, results.csv, runs/."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        path = write_table(folder, patch)
        start_here(patch)
        assert main(["run", str(path), "--runs", str(folder / "runs"), "--results", str(folder / "results.csv")]) == 0
        yield folder


@pytest.fixture
def made(finished, tmp_path):
    """A copy of the results of the toy table, the folder of its trained run, and the folder of the table."""
    path = tmp_path / "results.csv"
    shutil.copyfile(finished / "results.csv", path)
    return path, finished / "runs/small/toy/w4a8/ours/seed0", finished / "tables"


def test_the_results_of_the_project_are_what_its_tables_say():
    assert list(store.check(store.RESULTS)) == []


def test_a_row_says_what_was_run_and_what_was_measured(made):
    path, run, _ = made
    row = store.read(path)[0]
    measured = {one["name"]: one for one in results(run)["rows"]}
    assert (row.full_ap, row.ptq_ap) == (round(measured["full precision"]["AP"], 4), round(measured["ptq"]["AP"], 4))
    assert (row.trained_ap, row.trained_ap50) == tuple(round(measured["trained"][m], 4) for m in ("AP", "AP50"))
    assert (row.bits, row.quantizer, row.weight_levels, row.activation_levels) == ("W4A8", "lsq", "uniform", "uniform")
    assert row.mean_weight_bits == 4
    assert row.float_layers == "2 of 4: first output"
    assert (row.images, row.num_images, row.zero_shot) == ("synthetic", 6, True)
    assert (row.evaluated_on, row.evaluated_images, row.image_size) == ("shapes", 4, 64)
    assert row.seconds == round(sum(results(run)["seconds"].values()))
    assert store.parsed(row.command).run_dir == run


def test_fidelity_is_the_ap_with_full_precisions_detections_as_the_truth(made):
    path, run, _ = made
    stored = results(run)
    content = read_json(run.parents[5] / "annotations.json")
    full = [row for row in read_json(predictions_file(run, "full precision")) if row["score"] >= 0.3]
    area = [{"area": row["bbox"][2] * row["bbox"][3], "iscrowd": 0, "id": i} for i, row in enumerate(full, 1)]
    truth = content | {"annotations": [row | more for row, more in zip(full, area, strict=True)]}
    row = store.read(path)[0]
    for name, found in (("ptq", row.ptq_fidelity), ("trained", row.trained_fidelity)):
        assert found == round(score(truth, read_json(predictions_file(run, name)))["AP"], 4)
    assert stored["rows"]


def test_ranks_by_fidelity_are_compared_with_those_by_ap(made, capsys):
    assert fidelity.rank_correlation([1, 2, 3, 4], [10, 20, 30, 25]) == pytest.approx(0.8)  # 1 - 6 * 2 / (4 * 15)
    assert fidelity.rank_correlation([1, 1, 2], [3, 3, 9]) == pytest.approx(1)
    run = made[1]
    figure = run.parent / "ranks.svg"
    assert fidelity.main([str(run), str(run), "--figure", str(figure)]) == 0
    assert "<svg" in figure.read_text()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 7
    assert lines[-1].startswith("| rank correlation with AP (Spearman) | 1 | ")
    assert fidelity.main([str(run)]) == 2
    assert "ranks are compared of three or more" in capsys.readouterr().err


def test_rows_survive_writing_and_reading_in_any_order_and_the_same_ones_make_the_same_bytes(made, tmp_path):
    path, _, _ = made
    rows = store.read(path)
    store.write(tmp_path / "again.csv", reversed(rows))
    assert store.read(tmp_path / "again.csv") == rows
    assert (tmp_path / "again.csv").read_bytes() == path.read_bytes()


def test_a_row_takes_the_place_of_the_one_before_and_many_may_write_at_once(made, tmp_path):
    row = store.read(made[0])[0]
    target = tmp_path / "many.csv"
    rows = [row.model_copy(update={"seed": seed, "seconds": i}) for seed in range(4) for i in range(3)]
    threads = [threading.Thread(target=store.put, args=(target, one)) for one in rows]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [one.seed for one in store.read(target)] == [0, 1, 2, 3]
    assert {file.name for file in tmp_path.iterdir() if "many" in file.name} == {"many.csv"}


def changed(path, **values):
    rows = store.read(path)
    store.write(path, [rows[0].model_copy(update=values), *rows[1:]])


WRONG = [
    ({"trained_ap": 0.9}, "trained_ap: found 0.9; "),
    ({"name": "toy/w4a8/theirs"}, "has no such line"),
    ({"weight_levels": "codebook"}, "levels: found codebook, uniform; its command has uniform, uniform"),
    ({"evaluated_on": "coco_val"}, "evaluated_on: found coco_val"),
    ({"command": "python train.py"}, "command: found 'python train.py'"),
    ({"command": "zsqdet run nothing.yaml"}, "nothing.yaml: cannot be read"),
]


@pytest.mark.parametrize(("values", "message"), WRONG)
def test_a_row_that_is_not_what_the_tables_say_is_found(made, values, message):
    path, _, tables = made
    assert list(store.check(path, tables)) == []
    changed(path, **values)
    assert any(message in problem for problem in store.check(path, tables))


@pytest.fixture
def perfect(made):
    """While it is used, the PTQ predictions of the trained run are the objects themselves."""
    _, run, _ = made
    file = predictions_file(run, "ptq")
    kept = file.read_text()
    objects = read_json(Path(results(run)["measured_on"]["annotations"]))["annotations"]
    rows = [{key: row[key] for key in ("image_id", "category_id", "bbox")} | {"score": 0.9} for row in objects]
    file.write_text(json.dumps(rows))
    stored = results(run)["rows"]
    digest = {"predictions_sha256": sha256(file)}
    update_results(run, rows=[row | digest if row["name"] == "ptq" else row for row in stored])
    yield
    file.write_text(kept)
    update_results(run, rows=stored)


def test_the_ap_of_a_row_is_computed_anew_from_the_predictions_that_are_here(made, perfect):
    path, run, tables = made
    (found,) = (line for line in store.check(path, tables, rescore=True) if "its predictions" in line)
    assert found.endswith(f"seed 0: ptq: AP 0.0; its predictions in {run} have 1.0; run the line again")
    assert not any("its predictions" in line for line in store.check(path, tables))


def test_a_row_whose_line_has_other_settings_by_now_is_found(made, tmp_path):
    path, _, tables = made
    text = (tables / "small.yaml").read_text()
    (tmp_path / "small.yaml").write_text(f"{text}\nsettings: {{training.flip: false}}")
    assert "training.flip is True; the table has False" in next(iter(store.check(path, tmp_path)))


def test_a_file_by_hand_is_refused_with_its_line(made, capsys):
    path, _, _ = made
    text = path.read_text()
    path.write_text(text.replace(",W4A8,", ",4 bits,", 1))
    assert main(["results", "--check", "--results", str(path)]) == 2
    assert f"{path}:2: bits: " in capsys.readouterr().err
    path.write_text(text.replace("table,name", "name,table", 1))
    assert main(["results", "--check", "--results", str(path)]) == 2
    assert "needed are table, name, seed" in capsys.readouterr().err


def test_seeds_become_mean_and_sample_deviation(made):
    row = store.read(made[0])[1]
    rows = [row.model_copy(update={"seed": seed, "ptq_ap": ap}) for seed, ap in enumerate((0.1, 0.12, 0.17))]
    (group,) = grouped(rows)
    assert (group.seeds, group.mean["ptq_ap"], group.deviation["ptq_ap"]) == (3, 0.13, 0.0361)  # sqrt(.0013)
    assert (group.mean["trained_ap"], group.deviation["trained_ap"]) == (None, None)


def test_any_run_folders_are_collected_and_one_without_results_is_one_line(made, tmp_path, capsys):
    capsys.readouterr()
    assert main(["collect", str(made[1])]) == 0
    assert "| shapes, 4 at 64 " in capsys.readouterr().out
    assert main(["collect", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"error: {tmp_path}: holds no results.json; name folders that `zsqdet run` made\n"


@pytest.fixture
def beside(made):
    """A function: the cell of YOLO11s at W4A8 beside the paper's, with a row of ours."""
    template = store.read(made[0])[0].model_dump()
    lines = {line.name: line for line in table_lines(made[2] / "small.yaml")}
    real = {line.name: line for line in table_lines(store.TABLES / "yolo11.yaml")} | lines

    def call(row, **values):
        name = f"yolo11s/w4a8/{row}"
        values = {"name": name, "evaluated_on": "coco_val", "full_ap": 0.4717, "trained_ap": 0.4307} | values
        (group,) = grouped([Result.model_validate(template | {"trained_ap50": 0.6001} | values)])
        return cell(real[name], group, paper_numbers("yolo11"))

    return call


def test_ours_with_uniform_levels_stands_beside_the_papers_number_with_both_gaps_and_the_difference(beside):
    found = beside("ours")
    assert (found["paper AP"], found["paper gap"]) == ("42.6", "4.4")  # 47.0 - 42.6
    assert (found["AP"], found["gap"], found["difference"]) == ("43.1", "4.1", "+0.5")
    assert (found["AP50"], found["difference50"]) == ("60.0", "+1.1")
    assert set(found) == set(PAPER_COLUMNS)


def test_codebooks_and_other_images_stand_beside_it_without_a_difference(beside):
    other = beside("ours_codebook", weight_levels="codebook", activation_levels="minifloat")
    assert (other["levels"], other["AP"], other["difference"]) == ("codebook / minifloat", "43.1", "-")
    assert beside("ours", evaluated_on="shared_test")["difference"] == "-"


def test_what_was_not_run_is_missing_and_the_metric_is_named_on_both_sides(tmp_path, capsys):
    words = ["show", "configs/tables/yolo11.yaml", "--only", "yolo11l/w8a8/*", "--results", str(tmp_path / "none.csv")]
    assert main(words) == 0
    out = capsys.readouterr().out
    (line,) = [line for line in out.splitlines() if line.startswith("| yolo11l/w8a8/lsq_full ")]
    assert [c.strip() for c in line.strip("|").split("|")][3:8] == ["50.4", "3.0", "missing", "-", "-"]
    assert "Paper: quantized by Ultralytics' own mAP" in out
    assert "zsqdet: all by pycocotools" in out
    assert "arXiv 2507.16782" in out


def test_the_papers_numbers_are_complete_and_plausible():
    counts = {"yolov5": 45, "yolo11": 45, "swin": 18}
    for name, count in counts.items():
        table = paper_numbers(name)
        assert sum(len(own) for own in table["cells"].values()) == count
        assert table["source"]
        for place, own in table["cells"].items():
            full = table["full_precision"][place.partition("/")[0]]
            assert all(20 < ap < full[0] and ap < ap50 < full[1] for ap, ap50 in own.values())


def test_what_others_have_measured_stands_below_with_its_source_and_data(tmp_path, capsys):
    words = ["show", "configs/tables/yolov5.yaml", "--only", "yolov5s/w3a3/*", "--results", str(tmp_path / "none.csv")]
    assert main(words) == 0
    below = capsys.readouterr().out.partition("Elsewhere")[2]
    assert re.search(r"\| yolov5s/w3a3 \| GoodQ +\| no images +\| - +\| - +\| 10\.2 \|", below)
    assert "from a summary, not verified" in below
    assert "RepQ" not in below
    rows = read_json(NUMBERS)["elsewhere"]
    assert {row[-1] for row in rows["rows"]} == set(rows["sources"])
    assert all(len(row) == 8 and (row[4] is None or row[5] < row[4]) for row in rows["rows"])


def test_two_rows_are_compared_with_the_interval_of_their_difference(made, perfect):
    _, run, tables = made
    lines = [dataclasses.replace(line, run_dir=run.parents[1] / line.name.rpartition("/")[2] / "seed0")
             for line in table_lines(tables / "small.yaml")]  # fmt: skip
    assert list(show.differences(lines, lines, 40)) == ["No two runs that are compared are here."]
    ours, ptq = lines
    ptq = dataclasses.replace(ptq, isolates="Against ours: without training.")
    (row,) = list(show.differences([ptq], [ours, ptq], 40))[2:]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells == ["toy/w4a8/ptq/seed0", "ours", "ptq", "-1.0000", "-1.0000 to -1.0000", "yes"]
    assert difference((run, "ptq"), (run, "full precision"), 40, 0) == (1.0, [1.0, 1.0])


def test_a_row_with_more_bits_somewhere_stands_beside_the_papers_without_a_difference(made):
    template = store.read(made[0])[0].model_dump()
    (line,) = [line for line in table_lines(store.TABLES / "swin.yaml") if line.name == "swin_t/w4a8/ours"]
    values = {"name": line.name, "evaluated_on": "coco_val", "full_ap": 0.46, "trained_ap": 0.44}
    (group,) = grouped([Result.model_validate(template | {"trained_ap50": 0.6} | values)])
    found = cell(line, group, paper_numbers("swin"))
    assert (found["paper AP"], found["AP"], found["difference"]) == ("43.0", "44.0", "-")
