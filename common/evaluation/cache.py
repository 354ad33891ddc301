"""Full precision is measured once for all runs of a detector, not again for each bit-width and ablation."""

import hashlib
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from common.config.schema import DataConfig, EvaluationConfig
from common.detection.detector import Detector
from common.runtime.distributed import rank_zero
from common.runtime.environment import ROOT, describe
from common.runtime.files import atomic, lock, read_json, sha256, write_json

log = logging.getLogger("zsqdet")
METRICS, PREDICTIONS = "metrics.json", "predictions.json"
SAME_MACHINE = ("versions", "cpu", "gpu", "cuda")  # of `describe`


def measurement_key(
    detector: Detector, weights_sha256: str, data: DataConfig, config: EvaluationConfig, device: torch.device
) -> str:
    """Sixteen hexadecimal digits for all that the AP of a float detector depends on, the source code included.

    Args:
        detector: the adapter; its folder is part of the source code that counts.
        weights_sha256: identifies the checkpoint.
        data: the set; annotations count by content, the folder of the images by its place.
        config: settings; where measurements are kept does not count.
        device: where it is measured.
    """
    assert data.annotations is not None
    assert data.images is not None
    environment = describe(device)
    content = {
        "weights": weights_sha256,
        "annotations": sha256(data.annotations),
        "images": str(data.images.resolve()),
        "settings": config.model_dump(mode="json", exclude={"directory"}),
        "environment": {name: environment[name] for name in SAME_MACHINE},
        "code": _code(detector),
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def _code(detector: Detector) -> dict[str, str]:
    folders = ("common", type(detector).__module__.partition(".")[0])
    files = sorted(file for folder in folders for file in (ROOT / folder).rglob("*.py"))
    return {str(file.relative_to(ROOT)): sha256(file) for file in files}


def measure_once(folder: Path, predictions: Path, measure: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    """What `measure` gives, kept in `folder` and found there the next time.

    Args:
        folder: of this measurement alone, see `measurement_key`.
        predictions: file of the run that gets the detections.
        measure: writes the detections to the file that it is given; called by all processes.

    Raises:
        UserError: a damaged measurement, or a folder that cannot be written.
    """
    with lock(folder):
        found = rank_zero(lambda: read_json(folder / METRICS) if (folder / METRICS).exists() else None)
        if found is None:
            found = measure(folder / PREDICTIONS)
            rank_zero(lambda: write_json(folder / METRICS, found))  # last: it marks the measurement as complete
        else:
            log.info("measured before, see %s", folder)
        rank_zero(lambda: _copy(folder / PREDICTIONS, predictions))
    return found


def _copy(source: Path, target: Path) -> None:
    with atomic(target) as temporary:
        shutil.copyfile(source, temporary)
