"""Fidelity is AP with the original's sure detections as ground truth, on images that need no label."""

import cv2
import numpy as np
import pytest
from toy.coco import correct, detections, reference

from common.evaluation.fidelity import fidelity, unlabelled
from common.reporting.tables import metric_lines, result_lines
from common.runtime.errors import UserError

METRICS = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large")


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
    few, many = result_lines({"rows": [], "fidelity": {"rows": [row, row | {"objects": 50}]}})
    assert "fidelity 0.9400 (49 objects): few, so only a rough number; a surer one by zsqdet evaluate RUN" in few
    assert many.endswith("fidelity 0.9400 (50 objects)")


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
