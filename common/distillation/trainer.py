"""Training of a quantized copy on synthetic images until it detects like the original."""

import copy
import json
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from common.config.schema import TrainingConfig
from common.detection.detector import Detector
from common.detection.prediction_distance import prediction_distance
from common.detection.types import HeadOutput, Targets
from common.distillation.augment import augment
from common.distillation.losses import flat_kl_loss, joint_kl_loss, mse_loss, relative_loss
from common.distillation.optimizer import Optimizer, accumulated, freeze, rate_factor, update_average
from common.distillation.progress import FILE, Progress, Write, load_state, save_state, scalars, take_over
from common.distillation.selection import Found, chosen_epoch, detections, fidelity
from common.quantization.hooks import overwritten, watching
from common.runtime.distributed import all_reduce, shard
from common.runtime.environment import is_first
from common.runtime.errors import UserError
from common.runtime.files import atomic
from common.synthesis.imageset import ImageSet

log = logging.getLogger("zsqdet")
CHECKED_EVERY = 16  # steps between two looks at the loss, so that a GPU need not be waited for


@dataclass(frozen=True)
class Job:
    """What all epochs of one training have in common."""

    detector: Detector
    teacher: nn.Module
    images: ImageSet
    config: TrainingConfig
    seed: int
    device: torch.device
    directory: Path
    features: dict[str, bool]  # modules whose outputs are compared -> whether what follows overwrites the output
    training: list[int]  # indices of images
    held_out: list[int]

    @cached_property
    def seen(self) -> Found:
        """What the teacher detects in the held-out images."""
        return detections(self.detector, self.teacher, _held_out(self))


def train(
    detector: Detector,
    teacher: nn.Module,
    student: nn.Module,
    images: ImageSet,
    config: TrainingConfig,
    *,
    seed: int,
    device: torch.device,
    directory: Path,
) -> None:
    """Trains `student` in place; afterwards it is in eval mode and holds the averaged weights of the chosen epoch.

    Interrupted training goes on from the last finished `checkpoint_every` epochs and gives the same result. Several
    processes share the images of each step (`batch_size` is that of all of them), and hold the same student after it.

    Args:
        detector: the adapter of both modules.
        teacher: full precision; unchanged afterwards.
        student: quantized and calibrated.
        images: a finished synthetic set. A share of it, `holdout`, is kept for the choice of the epoch.
        config: settings.
        seed: of the split, the order and the augmentation.
        device: where both modules are.
        directory: for the state, history.jsonl and TensorBoard's events.

    Raises:
        UserError: too few images, a loss that is not finite, a damaged state, a folder that cannot be written.
    """
    prepare(teacher, student, config)
    training, held_out = split(len(images), config, seed)
    features = features_of(detector, teacher, images.batch([0], device)[0], config)
    job = Job(detector, teacher, images, config, seed, device, directory, features, training, held_out)
    average, best = copy.deepcopy(student).eval(), copy.deepcopy(student).eval()
    optimizer = Optimizer(student, config)
    progress = _resume(job, student, average, best, optimizer)
    if progress.epoch == 0 and not progress.history:
        choose(job, progress, average, best, {"epoch": 0})
    if is_first():
        _write_history(job, progress)
    steps = -(-len(training) // config.batch_size)
    description, hidden = f"training, epoch {progress.epoch}", None if is_first() else True
    with (
        scalars(directory, progress.epoch, config.wandb) as write,
        tqdm(total=steps * config.epochs, initial=steps * progress.epoch, desc=description, disable=hidden) as bar,
    ):
        while progress.epoch < config.epochs and not _gave_up(progress, config):
            row = train_epoch(job, student, average, optimizer, progress, bar)
            choose(job, progress, average, best, row)
            if is_first():
                _report(job, progress, write)
                last = progress.epoch == config.epochs or _gave_up(progress, config)
                if last or progress.epoch % config.checkpoint_every == 0:
                    parts = {"student": student, "average": average, "best": best}
                    states = {name: module.state_dict() for name, module in parts.items()}
                    save_state(directory, progress, states | {"optimizer": optimizer.state()})
    log.info("training: %s", _taken(progress.best_epoch, config.epochs))
    student.load_state_dict(best.state_dict())
    student.eval()


def _taken(epoch: int, epochs: int) -> str:
    if epoch == 0:
        return "no epoch was better than calibration, whose weights are kept"
    return f"epoch {epoch} of {epochs} is taken"


def prepare(teacher: nn.Module, student: nn.Module, config: TrainingConfig) -> None:
    """Sets, in place, what is trained."""
    part: Any
    for part in (*teacher.modules(), *student.modules()):
        if hasattr(part, "inplace"):
            part.inplace = False  # so that few of the compared outputs are overwritten
    teacher.eval().requires_grad_(False)
    freeze(student, config)


def split(count: int, config: TrainingConfig, seed: int) -> tuple[list[int], list[int]]:
    """Indices of `count` images for training and for the choice of the epoch.

    Raises:
        UserError: too few images to hold one back.
    """
    held = 0
    if config.selection == "holdout":
        held = max(round(count * config.holdout), 1)
        if held >= count:
            raise UserError(
                f"training.selection: holdout needs at least 2 images, the set has {count}; "
                "raise synthesis.num_images, or selection=last"
            )
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    return sorted(order[held:]), sorted(order[:held])


def features_of(detector: Detector, teacher: nn.Module, images: Tensor, config: TrainingConfig) -> dict[str, bool]:
    """Names of the modules whose outputs are compared -> whether what follows overwrites them, seen on `images`."""
    if not config.feature_weight:
        return {}
    if config.feature_loss != "all_mse":
        names = detector.feature_layers(teacher)
    else:
        names = [name for name, part in teacher.named_modules() if isinstance(part, nn.Conv2d | nn.BatchNorm2d)]
    changed = overwritten(teacher, names, lambda module: detector.head_output(module, images))
    return {name: name in changed for name in names}


def _gave_up(progress: Progress, config: TrainingConfig) -> bool:
    """Whether `patience` epochs have gone by without a better one."""
    return config.patience is not None and progress.epoch - progress.best_epoch >= config.patience


def _resume(job: Job, student: nn.Module, average: nn.Module, best: nn.Module, optimizer: Optimizer) -> Progress:
    found = load_state(job.directory)
    if found is None:
        return Progress()
    progress, parts = found
    for name, module in (("student", student), ("average", average), ("best", best)):
        take_over(module, parts.get(name, {}), job.directory / FILE)
    try:
        optimizer.load(parts.get("optimizer", {}))  # none where all learning rates are 0
    except (LookupError, RuntimeError) as error:
        raise UserError(f"{job.directory / FILE}: of another detector; remove it to start over") from error
    log.info("training goes on after epoch %d", progress.epoch)
    return progress


def train_epoch(
    job: Job, student: nn.Module, average: nn.Module, optimizer: Optimizer, progress: Progress, bar: Any
) -> dict[str, Any]:
    """One pass over the training images; returns the epoch's row of the history."""
    config, start = job.config, time.perf_counter()
    epoch = progress.epoch + 1
    bar.set_description(f"training, epoch {epoch}")
    student.train(not config.freeze_batch_norm)
    generator = torch.Generator().manual_seed(job.seed * 1_000_003 + epoch)
    order = [job.training[i] for i in torch.randperm(len(job.training), generator=generator).tolist()]
    batches = [order[i : i + config.batch_size] for i in range(0, len(order), config.batch_size)]
    sums: dict[str, Tensor] = {}
    done, total, added = len(batches) * progress.epoch, len(batches) * config.epochs, 0
    for number, indices in enumerate(batches):
        losses = _gradients(job, student, indices, torch.rand(len(indices), 4, generator=generator), added > 0)
        added += 1
        if added >= accumulated(config, done + number, total) or number == len(batches) - 1:
            optimizer.update(done + number, total)
            update_average(average, student, config.ema_decay, progress.updates)
            progress.updates, added = progress.updates + 1, 0
        sums = {name: sums.get(name, 0) + value for name, value in losses.items()}
        if number % CHECKED_EVERY == 0 or number == len(batches) - 1:
            _check_finite(sums["loss"], epoch, number, job)
            bar.set_postfix(loss=f"{float(losses['loss']):.4f}")
        bar.update()
    progress.epoch = epoch
    means = {name: float(value) / len(batches) for name, value in sums.items()}
    rate = rate_factor(config, done + len(batches), total)
    return {"epoch": epoch, **means, "rate": rate, "seconds": round(time.perf_counter() - start, 2)}


def _gradients(
    job: Job, student: nn.Module, indices: Sequence[int], draws: Tensor, add: bool = False
) -> dict[str, Tensor]:
    """Leaves the gradients of a batch, the images `indices`, in the student, or adds them to those there; returns its
    losses.

    The processes share the images. `draws` [images, 4] are of their augmentation, the same whoever sees an image.
    """
    own = shard(range(len(indices)))
    part = len(own) / len(indices)
    own = own or [0]  # an image too few: one that does not count
    images, targets = job.images.batch([indices[i] for i in own], job.device, labels=bool(job.config.task_weight))
    images, targets = augment(images, targets, job.config.flip, job.config.zoom, draws[own])
    losses = _losses(job, student, images, targets)
    held = {parameter: parameter.grad for parameter in student.parameters() if add and parameter.grad is not None}
    for parameter in student.parameters():
        parameter.grad = None
    if losses["loss"].requires_grad:  # not where all learning rates are 0
        (losses["loss"] * part).backward()
    found = {name: value.detach() * part for name, value in losses.items()}
    gradients = [parameter.grad for parameter in student.parameters() if parameter.grad is not None]
    statistics = _running_statistics(student)
    for value in statistics:
        value.mul_(part)
    all_reduce([*found.values(), *gradients, *statistics])
    for parameter, earlier in held.items():
        parameter.grad = earlier if parameter.grad is None else parameter.grad.add_(earlier)
    return found


def _running_statistics(student: nn.Module) -> list[Tensor]:
    """Those that a step changes: each process has seen its own images."""
    layers = [m for m in student.modules() if isinstance(m, nn.BatchNorm2d) and m.training and m.track_running_stats]
    return [value for m in layers for value in (m.running_mean, m.running_var) if value is not None]


def _check_finite(total: Tensor, epoch: int, step: int, job: Job) -> None:
    if not torch.isfinite(total):
        kept = f"epoch {epoch - 1} is kept in {job.directory}" if epoch > 1 else "nothing was changed"
        raise UserError(
            f"training: the loss is not finite any more in epoch {epoch}, by step {step + 1}; {kept}; "
            "lower training.learning_rate, affine_learning_rate or scale_learning_rate and use a new run_dir"
        )


def _losses(job: Job, student: nn.Module, images: Tensor, targets: Sequence[Targets]) -> dict[str, Tensor]:
    """`loss`, the weighted sum, and the terms it is made of; means over images."""
    config = job.config
    with torch.no_grad():
        reference, reference_features = _run(job, job.teacher, images, None, None)
    wanted = targets if config.task_weight else None
    output, features = _run(job, student, images, wanted, reference.proposals)
    terms: dict[str, tuple[float, Tensor]] = {}
    if config.logit_weight:
        if config.logit_loss == "rows":
            value = prediction_distance(reference, output)
        else:
            divergence = flat_kl_loss if config.logit_loss == "flat_kl" else joint_kl_loss
            value = divergence(reference.maps, output.maps, config.temperature)
        terms["logit"] = (config.logit_weight, value)
    if job.features:
        compare = relative_loss if config.feature_loss == "blocks" else mse_loss
        terms["feature"] = (config.feature_weight, compare(reference_features, features))
    if output.losses:
        terms["task"] = (config.task_weight, torch.stack([v.mean() for v in output.losses.values()]).sum())
    total = torch.stack([weight * value for weight, value in terms.values()]).sum()
    return {"loss": total} | {name: value for name, (_, value) in terms.items()}


def _run(
    job: Job, module: nn.Module, images: Tensor, targets: Sequence[Targets] | None, proposals: object
) -> tuple[HeadOutput, dict[str, Tensor]]:
    """The head's output and the feature maps of those layers that ran."""
    features: dict[str, Tensor] = {}

    def keep(name: str, x: Tensor) -> None:
        features[name] = x.clone() if job.features[name] else x

    with watching(module, job.features, outputs=keep):
        output = job.detector.head_output(module, images, targets, proposals)
    return output, features


@torch.no_grad()
def choose(job: Job, progress: Progress, average: nn.Module, best: nn.Module, row: dict[str, Any]) -> None:
    """Scores an epoch on the held-out images, keeps it if it is the best one, and adds its row to the history."""
    if job.held_out:
        total = 0.0
        for indices in _shared_batches(job):
            images, targets = job.images.batch(indices, job.device, labels=bool(job.config.task_weight))
            total += float(_losses(job, average, images, targets)["loss"]) * len(indices)
        everywhere = torch.tensor(total, dtype=torch.float64, device=job.device)
        all_reduce([everywhere])
        row["held_out"] = float(everywhere) / len(job.held_out)
        row["fidelity"] = fidelity(job.seen, detections(job.detector, average, _held_out(job)))
    progress.history.append(row)
    if chosen_epoch(progress.history) == row["epoch"]:
        progress.best_epoch = row["epoch"]
        best.load_state_dict(average.state_dict())


def _shared_batches(job: Job) -> list[list[int]]:
    """The held-out images that this process looks at."""
    size = job.config.batch_size
    return shard([job.held_out[start : start + size] for start in range(0, len(job.held_out), size)])


def _held_out(job: Job) -> Iterator[tuple[list[int], Tensor]]:
    for indices in _shared_batches(job):
        yield indices, job.images.batch(indices, job.device, labels=False)[0]


def _report(job: Job, progress: Progress, write: Write) -> None:
    row = progress.history[-1]
    write(row["epoch"], {name: value for name, value in row.items() if name != "epoch"})
    _write_history(job, progress)


def _write_history(job: Job, progress: Progress) -> None:
    with atomic(job.directory / "history.jsonl") as temporary:
        temporary.write_text("".join(json.dumps(r) + "\n" for r in progress.history), encoding="utf-8")
