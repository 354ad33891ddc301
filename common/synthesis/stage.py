"""Stage one: finds or completes the set of synthetic images that a configuration asks for."""

import hashlib
import json
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from common.config.schema import SynthesisConfig
from common.detection.detector import Detector, TransformerDetector
from common.detection.masks import decode
from common.detection.types import Targets
from common.runtime.distributed import barrier, rank_zero, shard
from common.runtime.errors import UserError
from common.runtime.files import lock, read_json, sha256, write_json
from common.runtime.images import read_image
from common.synthesis.batch import Job, image_indices, record_file, write_batches
from common.synthesis.batch_norm_loss import BatchNormLoss
from common.synthesis.imageset import ANNOTATIONS, DESCRIPTION, IMAGES, coco, image_name
from common.synthesis.labels import TrueLabels, labels_of_files, read_labels
from common.synthesis.optimize import freeze
from common.synthesis.sources import list_images

log = logging.getLogger("zsqdet")

# Configuration keys that the images of each source depend on.
_COMMON = {"source", "num_images", "image_size", "batch_size"}
_LABELS = {"labels", "annotations"}
_OPTIMIZATION = {
    *("image", "iterations", "learning_rate", "loss", "weights", "label_sampling", "mixed_precision"),
    *("low_resolution_size", "low_resolution_iterations", "low_resolution_learning_rate"),
    *("erase", "flip", "jitter"),
}
_KEYS = {
    "task": _COMMON | _LABELS | _OPTIMIZATION,
    "batch_norm": _COMMON | _OPTIMIZATION,
    "noise": _COMMON | _LABELS,
    "real": _COMMON | {"real_images"},
}
DISTANCE_IMAGES = 256  # images of a set from which its BatchNorm statistics are measured
# Where the labels of a set come from, for its description; for other sources they are detections.
_LABELS_FROM = {"task": "sampled at random, updated by adaptive label sampling", "noise": "sampled at random"}


def synthesize(
    detector: Detector, config: SynthesisConfig, *, seed: int, device: torch.device, weights_sha256: str
) -> Path:
    """Returns the folder of the set for this configuration; synthesizes what is missing of it.

    The folder's name hashes everything the images depend on: the keys that the source reads, seed, weights and class
    names. Each batch depends on the seed and its number alone and is recorded when it is finished. So a set that was
    interrupted or lost files is completed to the same images, and any number of processes makes the same set.

    Args:
        detector: full-precision detector.
        config: settings of stage one.
        seed: random seed of the set.
        device: of the optimization.
        weights_sha256: SHA-256 of the checkpoint.

    Raises:
        UserError: sizes that are no multiple of the stride, unreadable labels or images, an unwritable folder, NaN.
    """
    _check_sizes(detector, config)
    pool, files = _inputs(detector, config)
    key = _key(detector, config, files, seed, weights_sha256)
    folder = config.directory / f"{config.source}-{key}"
    job = Job(detector, config, seed, device, folder, pool, files)
    with lock(folder):
        _complete(job, weights_sha256)
    return folder


def _complete(job: Job, weights_sha256: str) -> None:
    """Makes the batches that are missing."""
    batches = math.ceil(job.config.num_images / job.config.batch_size)
    todo, finished = rank_zero(lambda: _missing(job, batches))
    if finished:
        log.info("synthetic set %s is complete", job.folder)
        return
    if len(todo) < batches:
        log.info("synthetic set %s: resuming, %d of %d batches are missing", job.folder, len(todo), batches)
    (job.folder / DESCRIPTION).unlink(missing_ok=True)
    write_batches(job, shard(todo))
    barrier()
    rank_zero(lambda: _finish(job, batches, weights_sha256))


def _missing(job: Job, batches: int) -> tuple[list[int], bool]:
    """Numbers of the batches to make, and whether the set is finished."""
    todo = [number for number in range(batches) if not _is_done(job, number)]
    return todo, not todo and (job.folder / DESCRIPTION).is_file()


def _check_sizes(detector: Detector, config: SynthesisConfig) -> None:
    for name in ("image_size", "low_resolution_size"):
        size = getattr(config, name)
        if size % detector.stride:
            allowed = f"multiples of {detector.stride}, for instance {round(size / detector.stride) * detector.stride}"
            raise UserError(f"synthesis.{name}: {size} does not fit the detector; allowed are {allowed}")


def _inputs(detector: Detector, config: SynthesisConfig) -> tuple[list[TrueLabels], list[Path]]:
    """What is read from disk: true labels, and the image files of the source `real`."""
    pool, files = [], []
    if config.labels == "true_label" and "labels" in _KEYS[config.source]:
        assert config.annotations is not None
        pool = read_labels(config.annotations, detector.class_names, config.image_size)
    if config.source == "real":
        assert config.real_images is not None
        files = list_images(config.real_images)
        if len(files) < config.num_images:
            found = f"{config.real_images} has {len(files)} images"
            raise UserError(f"synthesis.num_images: {config.num_images}, but {found}; lower num_images or add images")
        files = files[: config.num_images]
        if config.labels == "true_label":
            assert config.annotations is not None
            pool = labels_of_files(config.annotations, files, detector.class_names, config.image_size)
    return pool, files


def _key(detector: Detector, config: SynthesisConfig, files: Sequence[Path], seed: int, weights_sha256: str) -> str:
    """Twelve hexadecimal digits for everything that the images depend on; files count by content, not by place."""
    used = {name: value for name, value in config.model_dump(mode="json").items() if name in _KEYS[config.source]}
    used.pop("annotations", None)
    if "weights" in used and not isinstance(detector, TransformerDetector):
        used["weights"].pop("patch_similarity")
    if config.source == "batch_norm":
        used["weights"].pop("task")
        used["label_sampling"] = config.label_sampling.confidence
    if config.labels == "true_label" and (config.source == "real" or "labels" in used):
        assert config.annotations is not None
        used["annotations"] = sha256(config.annotations)
    if config.source == "real":
        used["real_images"] = [[file.name, file.stat().st_size] for file in files]
    content = [used, seed, weights_sha256, list(detector.class_names)]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def _is_done(job: Job, number: int) -> bool:
    """Whether the batch was finished and its images are still there, whole."""
    try:
        record = read_json(record_file(job, number))
        paths = [job.folder / IMAGES / image_name(i) for i in image_indices(job, number)]
        return len(paths) == len(record["bytes"]) == len(record["masks"]) and all(
            path.is_file() and path.stat().st_size == size for path, size in zip(paths, record["bytes"], strict=True)
        )
    except (UserError, KeyError, TypeError):
        return False


@torch.no_grad()
def _statistics_distance(job: Job) -> dict[str, float] | None:
    """Distance of the finished set's BatchNorm statistics, over all its images, to the running statistics.

    Squared errors of mean and standard deviation over the running variance, averaged over channels and layers; None for
    a detector without BatchNorm. Needs no real image.
    """
    frozen, count = freeze(job.detector, job.device), 0
    loss = frozen.statistics_loss
    if not isinstance(loss, BatchNormLoss):
        return None
    first = second = torch.zeros((), device=job.device)
    for number in range(math.ceil(min(job.config.num_images, DISTANCE_IMAGES) / job.config.batch_size)):
        paths = [job.folder / IMAGES / image_name(i) for i in image_indices(job, number)]
        images = torch.stack([read_image(path) for path in paths]).to(job.device).float() / 255
        frozen.detector.head_output(frozen.module, images.contiguous(memory_format=torch.channels_last))
        mean_error, variance = loss.statistics()
        first, second = first + len(paths) * mean_error, second + len(paths) * (variance + mean_error.square())
        count += len(paths)
    mean_error = first / count
    of_mean, of_deviation = loss.relative(mean_error, (second / count - mean_error.square()).clamp(min=0))
    return {"mean": of_mean.mean().item(), "deviation": of_deviation.mean().item()}


def _finish(job: Job, batches: int, weights_sha256: str) -> None:
    """Joins the records of all batches and writes set.json, which marks the set as complete."""
    config, records = job.config, [read_json(record_file(job, number)) for number in range(batches)]
    size = config.image_size
    targets = [
        Targets(
            torch.tensor(boxes).view(-1, 4),
            torch.tensor(labels, dtype=torch.int64),
            None if masks is None else decode(masks, size, size),
        )
        for record in records
        for boxes, labels, masks in zip(record["boxes"], record["labels"], record["masks"], strict=True)
    ]
    sizes = [(size, size)] * len(targets)
    write_json(job.folder / ANNOTATIONS, coco(targets, sizes, job.detector.class_names))
    read = [str(file) for file in job.files]
    if job.pool:
        read.append(str(config.annotations))
    description = {
        "config": config.model_dump(mode="json"),
        "seed": job.seed,
        "weights_sha256": weights_sha256,
        "seconds": sum(record["seconds"] for record in records),
        "labels_from": "the annotations"
        if job.files and job.pool
        else _LABELS_FROM.get(config.source, f"detections above {config.label_sampling.confidence}"),
        "data_read": read,
        "statistics_distance": _statistics_distance(job),
        "history": _mean_history([record["history"] for record in records]),
        "snapshots": records[0]["snapshots"],
    }
    write_json(job.folder / DESCRIPTION, description)


def _mean_history(histories: Sequence[Sequence[Mapping[str, float]]]) -> list[dict[str, float]]:
    """Mean over batches, row by row; all have the same rows."""
    return [
        {
            name: sum(row[name] for row in rows) / len(rows) if name not in ("size", "iteration") else first
            for name, first in rows[0].items()
        }
        for rows in zip(*histories, strict=True)
    ]
