"""Detection on a COCO-format set, and COCO's mAP of it."""

import json
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from common.config.schema import DataConfig, EvaluationConfig
from common.detection.average_precision import evaluator, score
from common.detection.detector import Detector, has_masks
from common.detection.masks import encode_pasted
from common.detection.types import Detections
from common.evaluation.datasets import CocoSet, read_set
from common.evaluation.resize import Batch, Placement, as_floats, plan_batches, view
from common.runtime.distributed import gather_to_rank_zero, rank_zero, shard
from common.runtime.environment import is_first
from common.runtime.errors import UserError
from common.runtime.files import atomic
from common.runtime.image_files import read_image

READERS = 2  # threads that decode the images of the next batch while the detector works


def evaluate(
    detector: Detector,
    module: nn.Module,
    data: DataConfig,
    config: EvaluationConfig,
    *,
    device: torch.device,
    predictions: Path | None = None,
) -> dict[str, Any]:
    """Measures a module of `detector` on a set.

    Args:
        detector: the adapter.
        module: float or quantized, on `device`.
        data: the set; both of its keys are given.
        config: settings, by default those of Ultralytics' validator.
        device: where to compute.
        predictions: file for the detections as COCO results; boxes are rounded to 1e-3 pixels, scores to 1e-5.

    Returns:
        AP, AP50, AP75, AP_small, AP_medium, AP_large, AR100, AP50_voc07 in [0, 1] (-1: nothing to measure), per_class,
        images, evaluator, image_size (pixels), seconds. Where the detector gives masks and the
        set has them, `segm` holds the same metrics of masks.

    Raises:
        UserError: a set that cannot be read or whose classes do not fit; an unreadable image.
    """
    start = time.perf_counter()
    coco = read_set(data, detector.class_names, has_masks(detector))
    rows = detect_set(detector, module, coco, config, device, predictions)
    return rank_zero(lambda: _scores(coco, rows)) | {
        "images": len(coco.files),
        "evaluator": evaluator(),
        "image_size": config.image_size,
        "seconds": round(time.perf_counter() - start, 2),
    }


def detect_set(
    detector: Detector,
    module: nn.Module,
    coco: CocoSet,
    config: EvaluationConfig,
    device: torch.device,
    predictions: Path | None = None,
) -> list[dict[str, Any]]:
    """The detections in all images as COCO results, in the first of several processes; also written, see `evaluate`."""
    module.eval()
    rows = []
    for index, found in _detections(detector, module, coco, config, device):
        rows += _results(coco.image_ids[index], found, coco.category_ids, coco.sizes[index])
    rows = gather_to_rank_zero(rows)
    rows.sort(key=lambda row: row["image_id"])  # stable: the same file whatever the batches
    if predictions is not None:
        rank_zero(lambda: _write(predictions, rows))
    return rows


def _scores(coco: CocoSet, rows: list[dict[str, Any]]) -> dict[str, Any]:
    metrics = score(coco.coco.content, rows)
    masks = coco.has_masks and bool(rows) and all("segmentation" in row for row in rows)
    return metrics | ({"segm": score(coco.coco.content, rows, "segm")} if masks else {})


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    """A row a line. Without `indent` Python encodes JSON in C, ten times as fast."""
    with atomic(path) as temporary, temporary.open("w", encoding="utf-8") as stream:
        separator = "["
        for row in rows:
            stream.write(separator + json.dumps(row))
            separator = ",\n"
        stream.write("]\n" if rows else "[]\n")


def _detections(
    detector: Detector, module: nn.Module, coco: CocoSet, config: EvaluationConfig, device: torch.device
) -> Iterator[tuple[int, Detections]]:
    """The detections of each image, boxes in its own pixels; of several processes each looks at some batches."""
    batches = shard(plan_batches(coco.sizes, config, detector.stride))
    hidden = None if is_first() else True
    total = sum(len(batch.indices) for batch in batches)
    with ThreadPoolExecutor(READERS) as pool, tqdm(total=total, desc="evaluation", disable=hidden) as bar:
        for batch, loaded in _loaded(pool, coco, config, batches):
            images = as_floats(torch.stack([image for image, _ in loaded]).to(device))
            found = detector.detect(module, images, config.confidence, config.iou, config.max_detections)
            for index, (_, placement), one in zip(batch.indices, loaded, found, strict=True):
                yield index, placement.detections(one)
            bar.update(len(batch.indices))


def _loaded(
    pool: ThreadPoolExecutor, coco: CocoSet, config: EvaluationConfig, batches: Sequence[Batch]
) -> Iterator[tuple[Batch, list[tuple[Tensor, Placement]]]]:
    """Each batch with its images; while the caller works on them, those of the next one are read."""
    reading: deque[tuple[Batch, list[Future[tuple[Tensor, Placement]]]]] = deque()
    for batch in (*batches, None):
        if batch is not None:
            reading.append((batch, [pool.submit(_load, coco, i, config, batch) for i in batch.indices]))
        if reading and (batch is None or len(reading) > 1):
            done, images = reading.popleft()
            yield done, [image.result() for image in images]


def _load(coco: CocoSet, index: int, config: EvaluationConfig, batch: Batch) -> tuple[Tensor, Placement]:
    image = read_image(coco.files[index])
    if tuple(image.shape[1:]) != coco.sizes[index]:
        height, width = coco.sizes[index]
        raise UserError(
            f"{coco.files[index]}: {image.shape[2]}x{image.shape[1]} pixels, but {width}x{height} in the annotations; "
            "evaluate on the files that the annotations describe"
        )
    return view(image, config, batch)


def _results(
    image_id: int, found: Detections, category_ids: list[int | None], size: tuple[int, int]
) -> list[dict[str, Any]]:
    """COCO results of one image of `size` (height, width) pixels."""
    rows = []
    boxes, scores, labels = found.boxes.tolist(), found.scores.tolist(), found.labels.tolist()
    masks = [None] * len(labels) if found.masks is None else encode_pasted(found.masks, found.boxes, *size)
    for (x1, y1, x2, y2), confidence, label, mask in zip(boxes, scores, labels, masks, strict=True):
        category = category_ids[label]
        if category is not None:
            box = [round(value, 3) for value in (x1, y1, x2 - x1, y2 - y1)]
            row = {"image_id": image_id, "category_id": category, "bbox": box, "score": round(confidence, 5)}
            rows.append(row if mask is None else row | {"segmentation": mask})
    return rows
