"""Fidelity: how close a quantized detector is to its full-precision original, measured without any label.

It is COCO's AP with the original's detections of score .3 and more as ground truth. So it falls when objects are lost,
moved, or ranked behind what the original did not find, and is 1 for the original itself. It says nothing of how good
the original is. Lower scores are mostly no objects to a user; a few dozen synthetic images have too few of .3 and count
those of .1 and more. Runs are ranked alike by .1 to .5 (results/findings_calibration.md). Training chooses its epoch by
a variant with one ranking for all classes (`common.distillation.selection`).
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from common.config.schema import EvaluationConfig
from common.detection.average_precision import as_objects, score
from common.detection.coco_json import CocoFile
from common.detection.detector import Detector
from common.evaluation.coco import detect_set
from common.evaluation.datasets import CocoSet
from common.runtime.distributed import rank_zero
from common.runtime.errors import UserError
from common.runtime.image_files import SUFFIXES, find_images, image_size

OBJECT = 0.3  # lowest score of a detection of full precision that counts as an object
SYNTHETIC_OBJECT = 0.1  # the same in synthetic images
Rows = list[dict[str, Any]]
Load = Callable[[], tuple[Detector, nn.Module]]


def fidelity(
    content: dict[str, Any], full: Sequence[Mapping[str, Any]], found: Rows, lowest: float = OBJECT
) -> dict[str, Any]:
    """Fidelity of boxes, mean over the classes.

    Args:
        content: a COCO file with the images and categories; its annotations play no part.
        full: COCO results of full precision.
        found: COCO results of the quantized detector.
        lowest: score of full precision's detections that count as objects.

    Returns:
        As `average_precision.score`, with the number of `objects`; all metrics are -1 without any.
    """
    truth = as_objects(full, lowest)
    return score(content | {"annotations": truth}, found) | {"objects": len(truth)}


def unlabelled(folder: Path, class_names: Sequence[str]) -> CocoSet:
    """The images of a folder and of those below it, without annotations; category c is class c.

    Raises:
        UserError: no image, or one that cannot be read.
    """
    files = list(find_images(folder))
    if not files:
        raise UserError(f"data.images: no image in {folder}; allowed are {', '.join(sorted(SUFFIXES))}")
    sizes = [image_size(file) for file in files]
    images: list[Any] = [
        {"id": i, "file_name": str(file.relative_to(folder)), "width": width, "height": height}
        for i, (file, (height, width)) in enumerate(zip(files, sizes, strict=True), 1)
    ]
    categories: list[Any] = [{"id": i, "name": name} for i, name in enumerate(class_names)]
    coco = CocoFile(folder, images, [], categories)
    return CocoSet(coco, False, files, [image["id"] for image in images], sizes, [*range(len(class_names))])


def measure_fidelity(
    images: CocoSet,
    detectors: Mapping[str, Load],
    config: EvaluationConfig,
    device: torch.device,
    predictions: Callable[[str], Path],
    lowest: float = OBJECT,
) -> Rows:
    """A row of metrics for each detector but the first one, which is full precision.

    Args:
        images: what they look at.
        detectors: by name; each is loaded, and forgotten after its turn.
        config: settings of evaluation.
        device: where to compute.
        predictions: the file for the detections of a detector.
        lowest: as in `fidelity`.
    """
    found = {}
    for name, load in detectors.items():
        detector, module = load()
        found[name] = detect_set(detector, module.to(device), images, config, device, predictions(name))
    first, *others = detectors
    return rank_zero(
        lambda: [{"name": name} | fidelity(images.coco.content, found[first], found[name], lowest) for name in others]
    )
