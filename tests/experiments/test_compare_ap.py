"""Paired bootstrap of AP: the same numbers as pycocotools on the sets that it draws, and what it says about runs."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from common.detection.average_precision import as_objects, score
from common.detection.masks import encode
from common.runtime.files import write_checked_json
from tools.experiments.compare_ap import average_precisions, class_matches, image_draws, main

CLASSES = ("circle", "star", "never")


def _content(generator, images=12):
    """Objects of two of three classes, some of them crowds, none in the last image."""
    annotations = []
    for image in range(images - 1):
        for _ in range(generator.integers(1, 6)):
            x, y, w, h = generator.uniform((0, 0, 8, 8), (60, 60, 40, 40)).tolist()
            row = {"id": len(annotations) + 1, "image_id": 100 + image, "category_id": int(generator.integers(1, 3))}
            annotations.append(row | {"bbox": [x, y, w, h], "area": w * h, "iscrowd": int(generator.random() < 0.1)})
    return {
        "info": {},
        "images": [{"id": 100 + i, "file_name": f"{i}.png", "width": 100, "height": 100} for i in range(images)],
        "annotations": annotations,
        "categories": [{"id": i + 1, "name": name} for i, name in enumerate(CLASSES)],
    }


def _detections(content, generator, spread):
    """The objects, moved by about `spread` pixels, with scores of which many are equal, and some of nothing."""
    rows = []
    for one in content["annotations"]:
        box = (np.array(one["bbox"]) + generator.normal(0, spread, 4)).clip(1).tolist()
        rows.append({"image_id": one["image_id"], "category_id": one["category_id"], "bbox": box})
    for image in content["images"]:
        rows.append({"image_id": image["id"], "category_id": 1, "bbox": generator.uniform(5, 50, 4).tolist()})
    return [row | {"score": round(float(generator.random()), 1)} for row in rows]


def _drawn(content, rows, draw):
    """The set that a draw stands for, written out, and the detections on it."""
    images, annotations, detections = [], [], []
    for image, times in zip(content["images"], draw, strict=True):
        for _ in range(int(times)):
            new = len(images) + 1
            images.append(image | {"id": new})
            own = [a for a in content["annotations"] if a["image_id"] == image["id"]]
            annotations += [a | {"image_id": new, "id": len(annotations) + k + 1} for k, a in enumerate(own)]
            detections += [d | {"image_id": new} for d in rows if d["image_id"] == image["id"]]
    return content | {"images": images, "annotations": annotations}, detections


def test_the_ap_of_every_draw_is_that_of_pycocotools_on_the_images_drawn():
    generator = np.random.default_rng(0)
    content = _content(generator)
    rows = _detections(content, generator, 2.0)
    for i, row in enumerate(rows):  # equal scores are ordered by image, and a drawn set has another order of them
        row["score"] += i * 1e-5
    draws = image_draws(12, 6, seed=3)
    found = average_precisions(class_matches(content, rows, "bbox"), draws)
    for draw, ap in zip(draws, found, strict=True):
        assert ap == pytest.approx(score(*_drawn(content, rows, draw))["AP"], abs=1e-9)
    assert len(set(found.round(6))) == 7


def test_with_equal_scores_the_ap_of_the_set_itself_is_that_of_pycocotools():
    generator = np.random.default_rng(1)
    content = _content(generator)
    rows = _detections(content, generator, 3.0)
    found = average_precisions(class_matches(content, rows, "bbox"), image_draws(12, 0, seed=0))
    assert found[0] == pytest.approx(score(content, rows)["AP"], abs=1e-9)


def _run(folder, content, full, ptq, **measured):
    folder.mkdir()
    annotations = folder.parent / "annotations.json"
    annotations.write_text(json.dumps(content))
    names = {"full precision": full, "ptq": ptq}
    about = {"weight_bits": 8, "activation_bits": 8, "images": 12, "image_size": 64, "evaluator": "pycocotools"}
    rows = [{"name": name, "AP": 0.5} | about for name in names]
    stored = {"rows": rows, "measured_on": {"annotations": str(annotations)} | measured}
    write_checked_json(folder / "results.json", stored)
    (folder / "predictions").mkdir()
    for name, detections in names.items():
        (folder / "predictions" / f"{name.replace(' ', '_')}.json").write_text(json.dumps(detections))
    return folder


@pytest.fixture
def made(tmp_path):
    generator = np.random.default_rng(2)
    content = _content(generator, images=60)
    full = _detections(content, generator, 0.5)
    scores = [row["score"] for row in full]

    def quantized(spread):
        return [row | {"score": s} for row, s in zip(_detections(content, generator, spread), scores, strict=True)]

    return content, full, quantized


def test_a_large_loss_is_told_from_none_and_the_share_recovered_has_an_interval(made, tmp_path, capsys):
    content, full, quantized = made
    runs = [_run(tmp_path / name, content, full, quantized(s)) for name, s in (("bad", 6.0), ("good", 1.0))]
    assert main([*map(str, runs), "--samples", "60", "--json", str(tmp_path / "out.json")]) == 0
    bad, good = json.loads((tmp_path / "out.json").read_text())
    aps = [score(content, json.loads((run / "predictions/ptq.json").read_text()))["AP"] for run in runs]
    assert [bad["AP"], good["AP"]] == pytest.approx(aps)
    assert bad["loses"] == pytest.approx(score(content, full)["AP"] - aps[0])
    assert bad["loses_95"][0] > 0
    assert bad["recovered"] is None
    assert good["recovered"] == pytest.approx(1 - good["loses"] / bad["loses"])
    assert good["recovered_95"][0] < good["recovered"] < good["recovered_95"][1]
    printed = capsys.readouterr().out
    assert f"recovered {good['recovered']:.0%}" in printed
    assert str(runs[1]) in printed


def test_of_a_loss_that_may_be_chance_no_share_is_given(made, tmp_path, capsys):
    content, full, quantized = made
    runs = [_run(tmp_path / name, content, full, quantized(0.5)) for name in ("a", "b")]
    assert main([*map(str, runs), "--samples", "60"]) == 0
    assert "recovered" not in capsys.readouterr().out


def test_with_fidelity_the_detections_are_the_objects(made, tmp_path):
    content, full, quantized = made
    runs = [_run(tmp_path / name, content, full, rows) for name, rows in (("bad", quantized(3.0)), ("same", full))]
    out = tmp_path / "out.json"
    assert main([*map(str, runs), "--fidelity", "0.5", "--samples", "40", "--json", str(out)]) == 0
    bad, same = json.loads(out.read_text())
    objects = [
        {key: row[key] for key in ("image_id", "category_id", "bbox")} | {"id": i + 1, "iscrowd": 0, "area": 1.0}
        for i, row in enumerate(row for row in full if row["score"] >= 0.5)
    ]
    rows = json.loads((runs[0] / "predictions/ptq.json").read_text())
    assert bad["AP"] == pytest.approx(score(content | {"annotations": objects}, rows)["AP"])
    assert bad["loses"] == pytest.approx(1 - bad["AP"])
    assert same["AP"] == pytest.approx(1)
    assert same["recovered"] == pytest.approx(1)


def test_a_score_that_full_precision_never_reaches_is_refused_in_one_line(made, tmp_path, capsys):
    content, full, quantized = made
    run = _run(tmp_path / "a", content, full, quantized(1.0))
    assert main([str(run), "--fidelity", "1.1"]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: --fidelity")
    assert message.count("\n") == 1


def test_detections_become_objects_with_their_masks():
    mask = encode(torch.zeros(1, 20, 30, dtype=torch.bool).index_fill(1, torch.arange(3, 8), True))[0]
    row = {"image_id": 1, "category_id": 2, "bbox": [0, 3, 30, 5], "score": 0.9, "segmentation": mask}
    found = as_objects([row | {"score": 0.4}, row], 0.5)
    assert found == [row | {"id": 1, "area": 150.0, "iscrowd": 0}]
    content = {"images": [{"id": 1, "width": 30, "height": 20}], "categories": [{"id": 2, "name": "star"}]}
    assert score(content | {"annotations": found}, [row], "segm")["AP"] == pytest.approx(1)


def test_runs_that_cannot_be_compared_are_refused_in_one_line(made, tmp_path, capsys):
    content, full, quantized = made
    first = _run(tmp_path / "a", content, full, quantized(1.0))
    other = _run(tmp_path / "b", content, quantized(0.5), quantized(1.0))
    larger = _run(tmp_path / "c", content, full, quantized(1.0), image_size=640)
    empty = tmp_path / "empty"
    empty.mkdir()
    for second, word in ((other, "another detector"), (larger, "measured otherwise"), (empty, "no measured detectors")):
        assert main([str(first), str(second)]) == 2
        message = capsys.readouterr().err
        assert message.startswith(f"error: {second}")
        assert word in message
        assert message.count("\n") == 1


def test_too_few_draws_for_an_interval_are_refused(capsys):
    with pytest.raises(SystemExit):
        main([str(Path("runs")), "--samples", "10"])
    assert "at least 40" in capsys.readouterr().err
