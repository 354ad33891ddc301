"""Fidelity AP: how close a quantized copy is to its original, with the original's detections as ground truth."""

from pathlib import Path
from typing import Any

from common.detection.average_precision import as_objects, score
from common.detection.coco_json import read_coco
from common.pipeline.run_dir import FULL, predictions_file, results
from common.runtime.files import read_json, write_json

SCORE = 0.3  # a detection of full precision counts as an object from here on
FILE = "fidelity.json"


def measured_fidelity(run: Path) -> dict[str, float]:
    """Fidelity AP of boxes for each quantized detector of a run; kept in its folder, where it is looked up first.

    Returns:
        "ptq" and, after training, "trained"; empty where full precision detects nothing of score .3 or more.

    Raises:
        UserError: predictions that are missing or damaged.
    """
    stored = results(run)
    basis = {"measured_on": stored.get("measured_on"), "AP": {row["name"]: row["AP"] for row in stored["rows"]}}
    kept = read_json(run / FILE) if (run / FILE).exists() else {}
    if kept.get("basis") == basis:
        return dict(kept["fidelity"])
    content = with_detections(
        read_coco(Path(stored["measured_on"]["annotations"]), masks=True, to_score=True).content,
        read_json(predictions_file(run, FULL)),
        SCORE,
    )
    names = [row["name"] for row in stored["rows"] if row["name"] != FULL] if content["annotations"] else []
    found = {name: score(content, read_json(predictions_file(run, name)))["AP"] for name in names}
    write_json(run / FILE, {"basis": basis, "score": SCORE, "fidelity": found})
    return found


def with_detections(content: dict[str, Any], detections: list[dict[str, Any]], lowest: float) -> dict[str, Any]:
    """A COCO file whose objects are those detections that have a score of `lowest` or more."""
    return content | {"annotations": as_objects(detections, lowest)}
