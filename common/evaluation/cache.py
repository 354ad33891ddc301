"""Full precision is measured once for all runs of a detector, not again for each bit-width and ablation."""

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from common.config.schema import EvaluationConfig
from common.detection.detector import Detector
from common.evaluation.datasets import CocoSet
from common.runtime.distributed import rank_zero
from common.runtime.environment import describe
from common.runtime.errors import UserError
from common.runtime.files import atomic, lock, read_checked_json, sha256, sha256_of_files, write_checked_json

log = logging.getLogger("zsqdet")
MEASUREMENT_VERSION = 1  # raise it by hand when code changes what is measured: adapters, resizing, suppression, scoring
METRICS, PREDICTIONS = "metrics.json", "predictions.json"
SAME_MACHINE = ("versions", "cpu", "gpu", "cuda")  # of `describe`


def measurement_key(
    detector: Detector, weights_sha256: str, files: Mapping[str, str], config: EvaluationConfig, device: torch.device
) -> str:
    """Sixteen hexadecimal digits for all that the AP of a float detector depends on; files count by content.

    Args:
        detector: the adapter; its family counts.
        weights_sha256: identifies the checkpoint.
        files: SHA-256 of the annotations and of the images, as `set_hashes` gives them.
        config: settings; where measurements are kept does not count.
        device: where it is measured.
    """
    environment = describe(device)
    content = {
        "version": MEASUREMENT_VERSION,
        "family": type(detector).__module__.partition(".")[0],
        "weights": weights_sha256,
        **files,
        "settings": config.model_dump(mode="json", exclude={"directory"}),
        "environment": {name: environment[name] for name in SAME_MACHINE},
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def set_hashes(coco: CocoSet, annotations: Path | None) -> dict[str, str]:
    """SHA-256 of the `images` of a set and, where there is such a file, of its `annotations`."""
    own = {} if annotations is None else {"annotations": sha256(annotations)}
    return own | {"images": sha256_of_files(coco.files)}


def measure_once(folder: Path, predictions: Path, measure: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    """What `measure` gives, kept in `folder` and found there the next time, if both of its files are still whole.

    Args:
        folder: of this measurement alone, see `measurement_key`.
        predictions: file of the run that gets the detections.
        measure: writes the detections to the file that it is given; called by all processes.

    Raises:
        UserError: a folder that cannot be written.
    """
    with lock(folder):
        found = rank_zero(lambda: _stored(folder))
        if found is None:
            found = measure(folder / PREDICTIONS)
            rank_zero(lambda: _store(folder, found))
        else:
            log.info("measured before, see %s", folder)
        rank_zero(lambda: _copy(folder / PREDICTIONS, predictions))
    return found


def _store(folder: Path, metrics: dict[str, Any]) -> None:
    """Last, since it marks the measurement as complete."""
    stored = {"metrics": metrics, "predictions_sha256": sha256(folder / PREDICTIONS)}
    write_checked_json(folder / METRICS, stored)


def _stored(folder: Path) -> dict[str, Any] | None:
    """The metrics of a measurement whose files have the hashes that were recorded; None if it is to be made again."""
    if not (folder / METRICS).exists():
        return None
    try:
        stored = read_checked_json(folder / METRICS)
        if sha256(folder / PREDICTIONS) == stored["predictions_sha256"]:
            return stored["metrics"]
    except (UserError, OSError, KeyError):
        pass
    log.warning("%s: damaged; full precision is measured again", folder)
    return None


def _copy(source: Path, target: Path) -> None:
    with atomic(target) as temporary:
        shutil.copyfile(source, temporary)
