"""Writes a synthetic set batch by batch: images, labels, and a record of each finished batch."""

import hashlib
import logging
import math
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from common.config.schema import SynthesisConfig
from common.detection.detector import Detector
from common.detection.masks import paste
from common.detection.types import Targets
from common.runtime.distributed import in_workers
from common.runtime.environment import count, free_memory, is_first, torch_threads
from common.runtime.errors import UserError
from common.runtime.files import read_ordinary, write_checked_json
from common.synthesis.imageset import (
    IMAGES,
    NO_LABELS,
    READERS,
    encoded,
    image_name,
    letterboxed,
    with_range,
    write_image,
)
from common.synthesis.labels import TrueLabels, sample_labels, take_labels, with_masks
from common.synthesis.optimize import (
    FrozenDetector,
    Progress,
    Synthesized,
    detections,
    freeze,
    optimize_images,
    saved_bytes,
)
from common.synthesis.pixels import noise

log = logging.getLogger("zsqdet")
FEW = 4  # batches, below which each has more threads than it would have of so many
MEMORY_FACTOR = 1.5  # what a batch takes, in units of what autograd saves of it
RESIDENT = 2**30  # bytes of a process besides


@dataclass(frozen=True)
class Job:
    """What every batch of one set depends on."""

    detector: Detector
    config: SynthesisConfig
    seed: int
    device: torch.device
    folder: Path
    pool: Sequence[TrueLabels]  # true labels; with the source `real` those of `files`, in their order
    files: Sequence[Path]  # images of the source `real`, else empty


def record_file(job: Job, number: int) -> Path:
    """Where batch `number` is recorded once all its images are written."""
    return job.folder / "batches" / f"{number:06d}.json"


def image_indices(job: Job, number: int) -> range:
    """The images of batch `number`."""
    start = number * job.config.batch_size
    return range(start, min(start + job.config.batch_size, job.config.num_images))


def read_files(job: Job, indices: Iterable[int]) -> list[Tensor]:
    """Real images of the set, letterboxed, uint8 [3, S, S].

    Raises:
        UserError: a file that is not a readable image.
    """

    def read(index: int) -> Tensor:
        path = job.files[index]
        try:
            return letterboxed(path, read_ordinary(path), job.config.image_size, known=False)
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror}); mend or remove it") from error

    with ThreadPoolExecutor(READERS) as pool:
        return list(pool.map(read, indices))


def write_batches(job: Job, todo: Sequence[int]) -> None:
    """Synthesizes and writes the batches `todo`, with a progress bar on the first process.

    On a CPU several processes share them. The images do not depend on how many these are, only on the threads of each,
    and these on the number of cores.
    """
    config, workers, threads, frozen = job.config, 1, None, None
    optimized = config.source in ("task", "batch_norm")
    if optimized:
        frozen = freeze(job.detector, job.device)
        log.info("synthesis: images are optimized for the %s", frozen.statistics_loss.description)
        if job.device.type == "cpu" and count() == 1:
            cores, batches = torch.get_num_threads(), math.ceil(config.num_images / config.batch_size)
            threads = max(cores // max(batches, FEW), 1)
            workers = max(min(cores // threads, len(todo), _fitting(config, frozen)), 1)
    steps = config.iterations + config.low_resolution_iterations if optimized else 1
    images = sum(len(image_indices(job, number)) for number in todo)
    with tqdm(
        total=images * steps,
        desc="images",
        unit="",
        disable=not is_first(),
        mininterval=0.1 if sys.stderr.isatty() else 10,  # in a file each state is a line of its own
        bar_format="{desc}: {percentage:3.0f}%|{bar}| {elapsed} elapsed, {remaining} remaining{postfix}",
    ) as bar:
        show = _progress(bar)
        if workers > 1:
            for told in in_workers(_write_some, [(job, todo[i::workers], workers) for i in range(workers)], threads):
                show(*told)
        else:
            with torch_threads(threads):
                _write_some((job, todo, 1), lambda told: show(*told), frozen)


def _fitting(config: SynthesisConfig, frozen: FrozenDetector) -> int:
    """How many batches the free memory suffices for."""
    return int(free_memory() / (config.batch_size * saved_bytes(frozen, config.image_size) * MEMORY_FACTOR + RESIDENT))


def _write_some(
    part: tuple[Job, Sequence[int], int],
    tell: Callable[[tuple[int, Mapping[str, float]]], None],
    frozen: FrozenDetector | None = None,
) -> None:
    """Some batches, one after the other; tells the iterations of images that were made, and the losses."""
    job, numbers, workers = part
    frozen = frozen or freeze(job.detector, job.device)
    with torch.enable_grad():  # whatever the caller has
        for number in numbers:
            write_batch(job, number, frozen, _told(len(image_indices(job, number)), tell), workers)


def _told(images: int, tell: Callable[[tuple[int, Mapping[str, float]]], None]) -> Progress:
    return lambda iterations, losses: tell((iterations * images, losses))


def _progress(bar: tqdm) -> Progress:
    def show(iterations: int, losses: Mapping[str, float]) -> None:
        names = {"batch_norm": "BN distance", "patch_similarity": "patch similarity"}
        shown = [(name, f"{losses[key]:.2g}") for key, name in names.items() if key in losses]
        bar.set_postfix(dict(shown[:1]), refresh=False)
        bar.update(iterations)

    return show


def write_batch(job: Job, number: int, frozen: FrozenDetector, progress: Progress, workers: int = 1) -> None:
    """Synthesizes batch `number`; writes its images, the snapshots of batch 0, and last the record. Real images stay
    where they are. So many `workers` do this at the same time.

    Its random numbers depend on the seed of the run and on `number` alone.
    """
    start = time.monotonic()
    indices = image_indices(job, number)
    digest = hashlib.sha256(f"{job.seed}/{number}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    batch = _synthesize(job, indices, frozen, generator, progress)
    ranged = job.config.source in ("task", "batch_norm") and job.config.image == "pixels" and not job.config.clip
    stored: list[tuple[np.ndarray, list[float]]] = []
    if not batch.history:
        progress(1, {})
    if job.files:
        contents = [read_ordinary(job.files[i]) for i in indices]
        files = [(len(content), hashlib.sha256(content).hexdigest()) for content in contents]
    elif ranged:
        stored = [with_range(image) for image in batch.images]
        files = [write_image(job.folder / IMAGES / image_name(i), c) for i, (c, _) in zip(indices, stored, strict=True)]
    else:
        images = zip(indices, _to_bytes(batch.images), strict=True)
        files = [write_image(job.folder / IMAGES / image_name(i), image) for i, image in images]
    record = {
        "bytes": [size for size, _ in files],
        "sha256_of_images": [digest for _, digest in files],
        "boxes": [t.boxes.tolist() for t in batch.targets],
        "labels": [t.labels.tolist() for t in batch.targets],
        "masks": [encoded(t.masks) for t in batch.targets],
        "history": batch.history,
        "snapshots": _save_snapshots(job, batch) if number == 0 else [],
        **({"ranges": [bounds for _, bounds in stored]} if ranged else {}),
        "seconds": (time.monotonic() - start) / (count() * workers),  # they work at the same time
    }
    write_checked_json(record_file(job, number), record)


def _synthesize(
    job: Job, indices: range, frozen: FrozenDetector, generator: torch.Generator, progress: Progress
) -> Synthesized:
    """Images and labels of one batch, from the configured source."""
    config, size = job.config, job.config.image_size
    if config.source == "real":
        images = torch.stack(read_files(job, indices)).float() / 255
        if job.pool:
            return Synthesized(images, [with_masks(job.pool[i], size) for i in indices], [], [])
        return Synthesized(images, _detected(images, job, frozen), [], [])
    targets = _initial_labels(job, indices, generator)
    if config.source == "noise":
        return Synthesized(noise(len(indices), size, generator), targets, [], [])
    batch = optimize_images(frozen, config, targets, generator, progress)
    if config.source == "task":
        return batch
    return Synthesized(batch.images, _detected(batch.images, job, frozen), batch.history, batch.snapshots)


def _initial_labels(job: Job, indices: range, generator: torch.Generator) -> list[Targets]:
    """The labels that optimization starts from; empty for a source without labels."""
    config, count = job.config, len(indices)
    if job.pool:
        return [with_masks(t, config.image_size) for t in take_labels(job.pool, indices.start, count, job.seed)]
    if config.source == "batch_norm":
        return [NO_LABELS] * count
    return sample_labels(config.labels, count, config.image_size, len(job.detector.class_names), generator)


def _detected(images: Tensor, job: Job, frozen: FrozenDetector) -> list[Targets]:
    """The detector's own detections as labels, in the images as they are saved (8 bits per channel)."""
    size = job.config.image_size
    saved = (_to_bytes(images).float() / 255).to(job.device)
    found = detections(frozen, saved, job.config.label_sampling.confidence)
    return [
        Targets(f.boxes.clamp(0, size), f.labels, None if f.masks is None else paste(f.masks, f.boxes, size, size))
        for f in found
    ]


def _to_bytes(images: Tensor) -> Tensor:
    """Images in [0, 1] as uint8, on the CPU."""
    return (images.detach() * 255).round().clamp(0, 255).to(torch.uint8).cpu()


def _save_snapshots(job: Job, batch: Synthesized) -> list[dict[str, Any]]:
    rows = []
    for number, snapshot in enumerate(batch.snapshots):  # the number, since two passes may have one size
        digests: list[str] = []
        begin = f"snapshots/{number:02d}-{snapshot.size}-{snapshot.iteration:05d}"
        names = [f"{begin}-{i}.png" for i in range(len(snapshot.images))]
        for name, image in zip(names, _to_bytes(snapshot.images), strict=True):
            digests.append(write_image(job.folder / name, image)[1])
        boxes = [t.boxes.tolist() for t in snapshot.targets]
        labels = [t.labels.tolist() for t in snapshot.targets]
        row = {"size": snapshot.size, "iteration": snapshot.iteration, "files": names, "sha256": digests}
        rows.append(row | {"boxes": boxes, "labels": labels})
    return rows
