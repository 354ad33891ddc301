"""Stage one as a whole: a set of images on disk, made batch by batch."""

import hashlib
import json
import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from common.config.schema import SynthesisConfig
from common.detection.detector import Detector, TransformerDetector
from common.detection.masks import decode, encode, paste
from common.detection.types import Targets
from common.runtime.distributed import barrier, rank_zero, shard
from common.runtime.environment import count, is_first
from common.runtime.errors import UserError
from common.runtime.files import lock, read_json, sha256, write_json
from common.runtime.images import read_image
from common.synthesis.canvas import noise
from common.synthesis.imageset import ANNOTATIONS, DESCRIPTION, IMAGES, coco, image_name, write_image
from common.synthesis.labels import TrueLabels, draw_labels, labels_of_files, read_labels, take_labels, with_masks
from common.synthesis.optimize import FrozenDetector, Made, Progress, detections, freeze, make_images
from common.synthesis.priors import StatisticsPrior
from common.synthesis.sources import letterboxed, list_images

log = logging.getLogger("zsqdet")

# Keys of the configuration that each source reads besides these.
_COMMON = {"source", "num_images", "image_size", "batch_size"}
_LABELS = {"labels", "annotations"}
_OPTIMISED = {
    *("image", "iterations", "learning_rate", "low_resolution_size", "low_resolution_iterations"),
    *(
        "low_resolution_learning_rate",
        "loss",
        "weights",
        "label_sampling",
        "erase",
        "flip",
        "jitter",
        "mixed_precision",
    ),
}
_KEYS = {
    "task": _COMMON | _LABELS | _OPTIMISED,
    "batch_norm": _COMMON | _OPTIMISED,
    "noise": _COMMON | _LABELS,
    "real": _COMMON | {"real_images"},
}
MEASURED = 256  # images of a set on which the distance of its statistics is measured
_LABELS_FROM = {"task": "drawn, edited by the detector", "noise": "drawn"}  # the others: the detector's own detections
_NO_LABELS = Targets(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))


@dataclass(frozen=True)
class _Job:
    detector: Detector
    config: SynthesisConfig
    seed: int
    device: torch.device
    folder: Path
    pool: Sequence[TrueLabels]  # labels of `true_label`; for the source `real` those of `files`
    files: Sequence[Path]  # images of the source `real`


def synthesize(
    detector: Detector, config: SynthesisConfig, *, seed: int, device: torch.device, weights_sha256: str
) -> Path:
    """Makes the set of images that a configuration asks for, or finds it; returns its folder.

    The folder's name depends on what the images depend on: the keys that the source reads, the seed, the weights and
    the class names. Each batch is written when it is done and depends on the seed and its own number alone, so that a
    set that was interrupted, or lost files, is completed to what it would have been, and that several processes, which
    share the batches, make the same set as one.

    Args:
        detector: full-precision detector.
        config: settings of stage one.
        seed: of everything random.
        device: where the images are optimised.
        weights_sha256: identifies the detector's checkpoint.

    Raises:
        UserError: sizes the detector cannot take, unreadable labels or images, a folder that cannot be written, NaN.
    """
    _check_sizes(detector, config)
    pool, files = _material(detector, config)
    key = _key(detector, config, files, seed, weights_sha256)
    folder = config.directory / f"{config.source}-{key}"
    job = _Job(detector, config, seed, device, folder, pool, files)
    with lock(folder):
        _complete(job, weights_sha256)
    return folder


def _complete(job: _Job, weights_sha256: str) -> None:
    """Makes the batches that are missing."""
    batches = math.ceil(job.config.num_images / job.config.batch_size)
    todo, finished = rank_zero(lambda: _missing(job, batches))
    if finished:
        log.info("synthetic set %s is complete", job.folder)
        return
    if len(todo) < batches:
        log.info("synthetic set %s: going on, %d of %d batches are missing", job.folder, len(todo), batches)
    (job.folder / DESCRIPTION).unlink(missing_ok=True)
    _make_batches(job, shard(todo))
    barrier()
    rank_zero(lambda: _finish(job, batches, weights_sha256))


def _missing(job: _Job, batches: int) -> tuple[list[int], bool]:
    """Numbers of the batches to make, and whether the set is finished."""
    todo = [number for number in range(batches) if not _is_done(job, number)]
    return todo, not todo and (job.folder / DESCRIPTION).is_file()


def _check_sizes(detector: Detector, config: SynthesisConfig) -> None:
    for name in ("image_size", "low_resolution_size"):
        size = getattr(config, name)
        if size % detector.stride:
            allowed = f"multiples of {detector.stride}, for instance {round(size / detector.stride) * detector.stride}"
            raise UserError(f"synthesis.{name}: {size} does not fit the detector; allowed are {allowed}")


def _material(detector: Detector, config: SynthesisConfig) -> tuple[list[TrueLabels], list[Path]]:
    """What is read from disk: the labels of `true_label`, the files of `real`."""
    pool, files = [], []
    if config.labels == "true_label" and "labels" in _KEYS[config.source]:
        assert config.annotations is not None
        pool = read_labels(config.annotations, detector.class_names, config.image_size)
    if config.source == "real":
        assert config.real_images is not None
        files = list_images(config.real_images)
        if len(files) < config.num_images:
            found = f"{config.real_images} has {len(files)} images"
            raise UserError(f"synthesis.num_images: {config.num_images}, but {found}; ask for at most so many")
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


def _record(job: _Job, number: int) -> Path:
    return job.folder / "batches" / f"{number:06d}.json"


def _indices(job: _Job, number: int) -> range:
    start = number * job.config.batch_size
    return range(start, min(start + job.config.batch_size, job.config.num_images))


def _is_done(job: _Job, number: int) -> bool:
    """Whether the batch was finished and its images are still there, whole."""
    try:
        record = read_json(_record(job, number))
        paths = [job.folder / IMAGES / image_name(i) for i in _indices(job, number)]
        return len(paths) == len(record["bytes"]) == len(record["masks"]) and all(
            path.is_file() and path.stat().st_size == size for path, size in zip(paths, record["bytes"], strict=True)
        )
    except (UserError, KeyError, TypeError):
        return False


def _make_batches(job: _Job, todo: Sequence[int]) -> None:
    frozen = freeze(job.detector, job.device)
    config = job.config
    optimised = config.source in ("task", "batch_norm")
    if optimised:
        log.info("synthesis: images match %s", frozen.prior.description)
    steps = config.iterations + config.low_resolution_iterations if optimised else 1
    images = sum(len(_indices(job, number)) for number in todo)
    with tqdm(
        total=images * steps,
        desc="synthesis",
        unit="",
        disable=not is_first(),
        bar_format="{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}",
    ) as bar:
        for number in todo:
            _make_batch(job, number, frozen, _progress(bar, len(_indices(job, number)), steps))


def _progress(bar: tqdm, count: int, steps: int) -> Progress:
    def show(iterations: int, losses: Mapping[str, float]) -> None:
        bar.update(iterations * count)
        rate = bar.n / steps / max(bar.format_dict["elapsed"], 1e-9)
        bar.set_postfix({name: f"{value:.3g}" for name, value in losses.items()} | {"images/s": f"{rate:.2f}"})

    return show


def _make_batch(job: _Job, number: int, frozen: FrozenDetector, progress: Progress) -> None:
    """Makes one batch and writes its images, its snapshots if it is the first, and last its record."""
    begun = time.monotonic()
    indices = _indices(job, number)
    digest = hashlib.sha256(f"{job.seed}/{number}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    made = _content(job, indices, frozen, generator, progress)
    if not made.history:
        progress(1, {})
    images = _to_bytes(made.images)
    sizes = [write_image(job.folder / IMAGES / image_name(i), image) for i, image in zip(indices, images, strict=True)]
    record = {
        "bytes": sizes,
        "boxes": [t.boxes.tolist() for t in made.targets],
        "labels": [t.labels.tolist() for t in made.targets],
        "masks": [None if t.masks is None else encode(t.masks) for t in made.targets],
        "history": made.history,
        "snapshots": _save_snapshots(job, made) if number == 0 else [],
        "seconds": (time.monotonic() - begun) / count(),  # of the time that all of them take
    }
    write_json(_record(job, number), record)


def _content(job: _Job, indices: range, frozen: FrozenDetector, generator: torch.Generator, progress: Progress) -> Made:
    config, count, size = job.config, len(indices), job.config.image_size
    targets = [_NO_LABELS] * count
    if job.files and job.pool:
        images = torch.stack([letterboxed(job.files[i], size) for i in indices])
        return Made(images, [with_masks(job.pool[i], size) for i in indices], [], [])
    if job.pool:
        targets = [with_masks(t, size) for t in take_labels(job.pool, indices.start, count, job.seed)]
    elif "labels" in _KEYS[config.source]:
        targets = draw_labels(config.labels, count, size, len(job.detector.class_names), generator)
    if config.source == "noise":
        return Made(noise(count, size, generator), targets, [], [])
    if config.source == "real":
        images = torch.stack([letterboxed(job.files[i], size) for i in indices])
        made = Made(images, targets, [], [])
    else:
        made = make_images(frozen, config, targets, generator, progress)
    if config.source == "task":
        return made
    # The detector's own detections, in what is saved: the images of 8 bits.
    saved = (_to_bytes(made.images).float() / 255).to(job.device)
    found = detections(frozen, saved, config.label_sampling.confidence)
    targets = [
        Targets(f.boxes.clamp(0, size), f.labels, None if f.masks is None else paste(f.masks, f.boxes, size, size))
        for f in found
    ]
    return Made(made.images, targets, made.history, made.snapshots)


def _to_bytes(images: Tensor) -> Tensor:
    return (images.detach() * 255).round().clamp(0, 255).to(torch.uint8).cpu()


def _save_snapshots(job: _Job, made: Made) -> list[dict[str, Any]]:
    rows = []
    for snapshot in made.snapshots:
        names = [f"snapshots/{snapshot.size}-{snapshot.iteration:05d}-{i}.png" for i in range(len(snapshot.images))]
        for name, image in zip(names, _to_bytes(snapshot.images), strict=True):
            write_image(job.folder / name, image)
        boxes = [t.boxes.tolist() for t in snapshot.targets]
        labels = [t.labels.tolist() for t in snapshot.targets]
        row = {"size": snapshot.size, "iteration": snapshot.iteration, "files": names}
        rows.append(row | {"boxes": boxes, "labels": labels})
    return rows


@torch.no_grad()
def _distance(job: _Job) -> dict[str, float] | None:
    """How far the BatchNorm inputs of the finished set as a whole are from the trained statistics; needs no real image.

    Squared errors of mean and of deviation, in units of the trained deviation, averaged over channels and layers; None
    for a detector without BatchNorm.
    """
    frozen, count = freeze(job.detector, job.device), 0
    prior = frozen.prior
    if not isinstance(prior, StatisticsPrior):
        return None
    first = second = torch.zeros((), device=job.device)
    for number in range(math.ceil(min(job.config.num_images, MEASURED) / job.config.batch_size)):
        paths = [job.folder / IMAGES / image_name(i) for i in _indices(job, number)]
        images = torch.stack([read_image(path) for path in paths]).to(job.device).float() / 255
        frozen.detector.head_output(frozen.module, images.contiguous(memory_format=torch.channels_last))
        mean_error, variance = prior.statistics()
        first, second = first + len(paths) * mean_error, second + len(paths) * (variance + mean_error.square())
        count += len(paths)
    mean_error = first / count
    of_mean, of_deviation = prior.relative(mean_error, (second / count - mean_error.square()).clamp(min=0))
    return {"mean": of_mean.mean().item(), "deviation": of_deviation.mean().item()}


def _finish(job: _Job, batches: int, weights_sha256: str) -> None:
    """Joins the records of all batches and writes the description, which marks the set as complete."""
    config, records = job.config, [read_json(_record(job, number)) for number in range(batches)]
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
        "statistics_distance": _distance(job),
        "history": _mean_history([record["history"] for record in records]),
        "snapshots": records[0]["snapshots"],
    }
    write_json(job.folder / DESCRIPTION, description)


def _mean_history(histories: Sequence[Sequence[Mapping[str, float]]]) -> list[dict[str, float]]:
    """Row by row the mean over batches; all have the same rows."""
    return [
        {
            name: sum(row[name] for row in rows) / len(rows) if name not in ("size", "iteration") else first
            for name, first in rows[0].items()
        }
        for rows in zip(*histories, strict=True)
    ]
