"""Stage one: finds or completes the set of synthetic images that a configuration asks for."""

import hashlib
import json
import logging
import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from common.config.schema import SynthesisConfig
from common.detection.detector import Detector, TransformerDetector, has_masks
from common.runtime.distributed import barrier, rank_zero, shard
from common.runtime.errors import UserError
from common.runtime.files import lock, read_checked_json, read_ordinary, sha256, sha256_of_files, write_checked_json
from common.synthesis.batch import Job, image_indices, read_files, record_file, write_batches
from common.synthesis.imageset import (
    DESCRIPTION,
    IMAGES,
    READERS,
    ImageRecord,
    decoded,
    image_name,
    is_complete,
    list_images,
    write_set,
)
from common.synthesis.labels import TrueLabels, labels_of_files, read_labels
from common.synthesis.losses import BatchNormLoss
from common.synthesis.optimize import freeze

log = logging.getLogger("zsqdet")

# Configuration keys that the images of each source depend on.
_COMMON = {"source", "num_images", "image_size", "batch_size"}
_LABELS = {"labels", "annotations"}
_OPTIMIZATION = {
    *("image", "iterations", "learning_rate", "loss", "weights", "label_sampling", "autocast"),
    *("low_resolution_size", "low_resolution_iterations", "low_resolution_learning_rate"),
    *("erase", "flip", "jitter"),
}
# Keys of the optimisation that came later: left out of a set's name where they change nothing, so that it stays.
_LATER = ("low_resolution_factors", "noise", "clip", "warm_up", "betas", "epsilon")
_KEYS = {
    "task": _COMMON | _LABELS | _OPTIMIZATION,
    "batch_norm": _COMMON | _OPTIMIZATION,
    "noise": _COMMON | _LABELS,
    "real": _COMMON | {"real_images"},
}
SET_VERSION = 2  # raise it by hand when code changes which images or labels come out
HASHED_AT_START = 4 * 2**30  # bytes of images
POSITION = ("size", "iteration")  # in a row of the loss history; the other columns are losses
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
    key = rank_zero(lambda: _key(detector, config, files, seed, weights_sha256))
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
        rank_zero(lambda: _find_again(job))
        return
    if len(todo) < batches:
        log.info("synthetic set %s: resuming, %d of %d batches are missing", job.folder, len(todo), batches)
    (job.folder / DESCRIPTION).unlink(missing_ok=True)
    write_batches(job, shard(todo))
    barrier()
    rank_zero(lambda: _finish(job, batches, weights_sha256))


def _find_again(job: Job) -> None:
    """Tells a complete set of real images where they are now; its name depends on their content alone."""
    description = read_checked_json(job.folder / DESCRIPTION)
    if job.files and description.get("streamed_from") not in (None, str(job.config.real_images)):
        write_checked_json(job.folder / DESCRIPTION, description | _streamed(job))


def _streamed(job: Job) -> dict[str, str]:
    return {"streamed_from": str(job.config.real_images)} if job.files else {}


def _missing(job: Job, batches: int) -> tuple[list[int], bool]:
    """Numbers of the batches to make, and whether the set is finished."""
    with ThreadPoolExecutor(READERS) as pool:
        done = list(pool.map(lambda number: _is_done(job, number), range(batches)))
    todo = [number for number in range(batches) if not done[number]]
    return todo, not todo and is_complete(job.folder)


def _check_sizes(detector: Detector, config: SynthesisConfig) -> None:
    for name in ("image_size", "low_resolution_size"):
        size = getattr(config, name)
        if size % detector.stride:
            allowed = f"multiples of {detector.stride}, for instance {round(size / detector.stride) * detector.stride}"
            raise UserError(f"synthesis.{name}: {size} does not fit the detector; allowed are {allowed}")


def _inputs(detector: Detector, config: SynthesisConfig) -> tuple[list[TrueLabels], list[Path]]:
    """What is read from disk: true labels, and the image files of the source `real`."""
    pool, files, masks = [], [], has_masks(detector)
    if config.labels == "true_label" and "labels" in _KEYS[config.source]:
        assert config.annotations is not None
        pool = read_labels(config.annotations, detector.class_names, config.image_size, masks)
    if config.source == "real":
        assert config.real_images is not None
        files = list_images(config.real_images)
        if len(files) < config.num_images:
            found = f"{config.real_images} has {len(files)} images"
            raise UserError(f"synthesis.num_images: {config.num_images}, but {found}; lower num_images or add images")
        files = files[: config.num_images]
        if config.labels == "true_label":
            assert config.annotations is not None
            pool = labels_of_files(config.annotations, files, detector.class_names, config.image_size, masks)
    return pool, files


def _key(detector: Detector, config: SynthesisConfig, files: Sequence[Path], seed: int, weights_sha256: str) -> str:
    """Twelve hexadecimal digits for everything that the images depend on; files count by content, not by place."""
    dump, plain = config.model_dump(mode="json"), SynthesisConfig().model_dump(mode="json")
    keys = _KEYS[config.source]
    if keys >= _OPTIMIZATION:
        keys = keys | {name for name in _LATER if dump[name] != plain[name]}
    used = {name: value for name, value in dump.items() if name in keys}
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
        if config.labels != "true_label":
            used["label_sampling"] = config.label_sampling.confidence  # of the detections that are its labels
        used["real_images"] = [[file.name for file in files], sha256_of_files(files)]
    content = [SET_VERSION, used, seed, weights_sha256, list(detector.class_names)]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def _paths(job: Job, number: int) -> list[Path]:
    """The image files of a batch."""
    indices = image_indices(job, number)
    return [job.files[i] if job.files else job.folder / IMAGES / image_name(i) for i in indices]


def _is_done(job: Job, number: int) -> bool:
    """Whether the batch was finished and its images are still those that were written.

    In a set above `HASHED_AT_START` their sizes are compared here, and their hashes when they are read.
    """
    try:
        record = read_checked_json(record_file(job, number))
        sizes, hashes = record["bytes"], record["sha256_of_images"]
        for row in record["snapshots"]:  # sets of older versions have no hashes of them
            found = [sha256(job.folder / name) for name in row["files"]]
            if found != row.get("sha256", found):
                return False
        paths = _paths(job, number)
        if [path.stat().st_size for path in paths] != sizes:
            return False
        small = sum(sizes) / len(sizes) * job.config.num_images <= HASHED_AT_START
        return not small or [sha256(path) for path in paths] == hashes
    except (UserError, OSError, KeyError):
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
        paths = _paths(job, number)
        bounds = read_checked_json(record_file(job, number)).get("ranges") or [None] * len(paths)
        if job.files:
            read = read_files(job, image_indices(job, number))
        else:
            read = [decoded(read_ordinary(path), own) for path, own in zip(paths, bounds, strict=True)]
        images = torch.stack(read).to(job.device)
        images = images.float() / 255 if images.dtype == torch.uint8 else images
        frozen.detector.head_output(frozen.module, images.contiguous(memory_format=torch.channels_last))
        mean_error, variance = loss.statistics()
        first, second = first + len(paths) * mean_error, second + len(paths) * (variance + mean_error.square())
        count += len(paths)
    mean_error = first / count
    of_mean, of_deviation = loss.relative(mean_error, (second / count - mean_error.square()).clamp(min=0))
    return {"mean": of_mean.mean().item(), "deviation": of_deviation.mean().item()}


class _Finished:
    """The records of all batches, read one after the other, and what they add up to."""

    def __init__(self, job: Job, batches: int) -> None:
        self.job, self.batches = job, batches
        self.seconds = 0.0
        self.snapshots: list[dict[str, Any]] = []
        self.history: list[dict[str, float]] = []  # row by row the sum over batches; all have the same rows

    def records(self) -> Iterator[ImageRecord]:
        """One for each image."""
        size, files = self.job.config.image_size, self.job.files
        for number in range(self.batches):
            batch = read_checked_json(record_file(self.job, number))
            self._add(batch)
            columns = (batch[name] for name in ("sha256_of_images", "boxes", "labels", "masks"))
            indices = image_indices(self.job, number)
            bounds = batch.get("ranges") or [None] * len(indices)
            for i, own, digest, boxes, labels, masks in zip(indices, bounds, *columns, strict=True):
                source = files[i].name if files else None
                yield ImageRecord(digest, size, size, boxes, labels, masks, source, own)

    def _add(self, batch: dict[str, Any]) -> None:
        self.seconds += batch["seconds"]
        self.snapshots = self.snapshots or batch["snapshots"]
        if not self.history:
            self.history = batch["history"]
            return
        for row, more in zip(self.history, batch["history"], strict=True):
            row |= {name: row[name] + value for name, value in more.items() if name not in POSITION}

    def mean_history(self) -> list[dict[str, float]]:
        """Mean over batches, row by row."""
        return [
            {name: value if name in POSITION else value / self.batches for name, value in row.items()}
            for row in self.history
        ]


def _finish(job: Job, batches: int, weights_sha256: str) -> None:
    """Joins the records of all batches and writes set.json, which marks the set as complete."""
    config, finished = job.config, _Finished(job, batches)
    read = ([config.real_images] if job.files else []) + ([config.annotations] if job.pool else [])
    labels_from = _LABELS_FROM.get(config.source, f"detections above {config.label_sampling.confidence}")

    def describe() -> dict[str, Any]:
        return {
            "config": config.model_dump(mode="json"),
            "seed": job.seed,
            "weights_sha256": weights_sha256,
            "seconds": finished.seconds,
            "labels_from": "the annotations" if job.files and job.pool else labels_from,
            "data_read": [str(path) for path in read],
            "statistics_distance": _statistics_distance(job),
            "history": finished.mean_history(),
            "snapshots": finished.snapshots,
            **_streamed(job),
        }

    write_set(job.folder, finished.records(), job.detector.class_names, describe)
