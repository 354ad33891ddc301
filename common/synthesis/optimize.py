"""Model inversion: optimizes images with the detector's weights frozen (after DeepInversion, arXiv 1912.08795)."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from common.config.schema import LabelSamplingConfig, SynthesisConfig
from common.detection.detector import Detector, TransformerDetector, has_masks
from common.detection.types import Detections, Targets
from common.runtime.environment import multiplies_bfloat16
from common.runtime.errors import UserError
from common.synthesis.labels import relabel, scale_labels, update_masks
from common.synthesis.losses import BatchNormLoss, PatchSimilarityLoss, total_variation
from common.synthesis.pixels import (
    Parameterization,
    Pixels,
    Pyramid,
    augment_images,
    augment_targets,
    noise,
    resize,
    sample_augmentation,
    smooth_noise,
)

LOG_EVERY = 10  # iterations; reading the losses synchronizes with the device
CANDIDATES = (0.8, 0.9, 1.0)  # fractions of the iterations at which an image is a candidate for the result
SNAPSHOTS = (0.0, 0.3, 1.0)  # fractions of the iterations at which the report shows some images
SNAPSHOT_IMAGES = 4
NMS_IOU = 0.6  # of the detections that update labels (published code)
MAX_DETECTIONS = 300

Progress = Callable[[int, Mapping[str, float]], None]
LabelUpdate = Callable[[Targets, Detections, int, LabelSamplingConfig], Targets]


@dataclass(frozen=True)
class Snapshot:
    """The first images of a batch at one iteration, with their labels at that iteration."""

    size: int  # pixels
    iteration: int
    images: Tensor  # [up to SNAPSHOT_IMAGES, 3, size, size] in [0, 1], on the device
    targets: list[Targets]  # in pixels of `images`


@dataclass(frozen=True)
class Synthesized:
    """The result of one pass, or of all passes, over one batch."""

    images: Tensor  # [B, 3, S, S] in [0, 1]
    targets: list[Targets]  # on the CPU, pixels of `images`
    history: list[dict[str, float]]  # per pass: size, iteration and unweighted losses, every few iterations
    snapshots: list[Snapshot]


@dataclass(frozen=True)
class FrozenDetector:
    """A detector without weight gradients, and the statistics loss that hooks into it."""

    detector: Detector
    module: nn.Module
    statistics_loss: BatchNormLoss | PatchSimilarityLoss
    device: torch.device

    @property
    def terms(self) -> tuple[str, ...]:
        """Names of the loss terms, in order; the keys of `synthesis.weights`."""
        return "task", *self.statistics_loss.terms, "total_variation"


def freeze(detector: Detector, device: torch.device) -> FrozenDetector:
    """A frozen copy of the detector on `device`, with BatchNorm folded into the convolutions.

    Raises:
        UserError: the detector has neither BatchNorm nor attention.
    """
    module = detector.build()
    loss: BatchNormLoss | PatchSimilarityLoss
    if layers := detector.statistics_layers(module):
        loss = BatchNormLoss(module, layers).to(device)
    elif isinstance(detector, TransformerDetector):
        loss = PatchSimilarityLoss(module, detector.attention_layers(module)).to(device)
    else:
        raise UserError(
            "synthesis: found neither BatchNorm nor attention layers in this detector; stage one needs one of them"
        )
    module = module.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return FrozenDetector(detector, module, loss, device)


def saved_bytes(frozen: FrozenDetector, size: int) -> int:
    """Bytes that autograd keeps between the forward and the backward pass of one image with sides of `size` pixels."""
    saved: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    image = torch.full((1, 3, size, size), 0.5, device=frozen.device, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        frozen.detector.head_output(frozen.module, image)
    own = {parameter.data_ptr() for parameter in frozen.module.parameters()}
    return sum(number for place, number in saved.items() if place not in own)


def optimize_images(
    frozen: FrozenDetector,
    config: SynthesisConfig,
    targets: Sequence[Targets],
    generator: torch.Generator,
    progress: Progress,
) -> Synthesized:
    """Optimizes one batch: a low-resolution pass that updates the labels, then a full-resolution pass.

    With `pyramid` the second pass starts from the upsampled images of the first. With `pixels` it starts from new
    noise, as published, and only the labels of the first pass are used. Masks, if the detector predicts them, are
    updated in both passes. Without labels (`batch_norm`) or with true labels nothing is updated.

    Args:
        frozen: from `freeze`.
        config: settings of stage one.
        targets: initial labels in pixels of `config.image_size`, on the CPU; empty without labels.
        generator: the only source of randomness; a CPU generator.
        progress: called every few iterations with the number of iterations since the last call, and the losses.

    Raises:
        UserError: a loss became NaN.
    """
    pyramid, size, small = config.image == "pyramid", config.image_size, config.low_resolution_size
    adaptive = config.source == "task" and config.labels != "true_label"
    first = None
    if config.low_resolution_iterations and (pyramid or adaptive):
        update = relabel if adaptive else None
        steps, rate = config.low_resolution_iterations, config.low_resolution_learning_rate
        weights, factors = config.weights.model_dump(), config.low_resolution_factors.model_dump()
        weights = {name: value * factors[name] for name, value in weights.items()}
        low_resolution = OptimizationPass(frozen, config, generator, small, steps, rate, weights, update)
        start = _initial(len(targets), small, config, generator).to(frozen.device)
        first = low_resolution.run(_parameterize(start, config), scale_labels(targets, small / size), progress)
        targets = scale_labels(first.targets, size / small)
    if first is not None and pyramid:
        start = resize(first.images, size, size)
    else:
        start = _initial(len(targets), size, config, generator).to(frozen.device)
    update = update_masks if adaptive and has_masks(frozen.detector) else None
    weights = config.weights.model_dump()
    full = OptimizationPass(frozen, config, generator, size, config.iterations, config.learning_rate, weights, update)
    result = full.run(_parameterize(start, config), targets, progress)
    if first is None:
        return result
    return Synthesized(
        result.images, result.targets, first.history + result.history, first.snapshots + result.snapshots
    )


def _initial(count: int, size: int, config: SynthesisConfig, generator: torch.Generator) -> Tensor:
    """The images [count, 3, size, size] that a pass without predecessor starts from, on the CPU."""
    if config.image == "pyramid":
        return smooth_noise(count, size, generator)
    return noise(count, size, generator, config.noise)


def _parameterize(start: Tensor, config: SynthesisConfig) -> Parameterization:
    return Pyramid(start) if config.image == "pyramid" else Pixels(start, config.clip)


@dataclass(frozen=True)
class OptimizationPass:
    """One optimization at one resolution."""

    frozen: FrozenDetector
    config: SynthesisConfig
    generator: torch.Generator
    size: int
    iterations: int
    learning_rate: float
    weights: Mapping[str, float]  # of the loss terms
    update: LabelUpdate | None  # of the labels from detections; None keeps them

    def run(self, parameterization: Parameterization, targets: Sequence[Targets], progress: Progress) -> Synthesized:
        """Adam with a cosine learning rate; keeps for each image the candidate with the lowest task loss."""
        betas, eps = self.config.betas, self.config.epsilon
        optimizer = torch.optim.Adam(
            parameterization.parameters, lr=self.learning_rate, betas=betas, eps=eps, fused=True
        )  # fmt: skip
        candidates = {math.ceil(self.iterations * f) for f in CANDIDATES}
        snapshot_at = {math.ceil(self.iterations * f) for f in SNAPSHOTS}
        targets, snapshots, losses = list(targets), [], []
        best = _BestImages(parameterization.render().detach())
        for iteration in range(self.iterations):
            if iteration in snapshot_at:
                images = parameterization.render()[:SNAPSHOT_IMAGES].detach().clone()
                snapshots.append(Snapshot(self.size, iteration, images, targets[:SNAPSHOT_IMAGES]))
            if self._updates_at(iteration):
                updated = self._updated(parameterization, targets)
                if any(new is not old for new, old in zip(updated, targets, strict=True)):
                    best.reset()  # earlier candidates have other labels
                targets = updated
            for group in optimizer.param_groups:
                group["lr"] = self.learning_rate * self._rate_factor(iteration)
            offered = best if iteration in candidates else None
            losses.append(self._step(parameterization, optimizer, targets, offered))
            if (iteration + 1) % LOG_EVERY == 0 or iteration + 1 == self.iterations:
                progress(iteration % LOG_EVERY + 1, dict(zip(self.frozen.terms, losses[-1].tolist(), strict=True)))
        if self.iterations:
            self._offer(best, parameterization, targets)
        snapshots.append(Snapshot(self.size, self.iterations, best.images[:SNAPSHOT_IMAGES], targets[:SNAPSHOT_IMAGES]))
        return Synthesized(best.images, targets, self._history(losses), snapshots)

    def _rate_factor(self, iteration: int) -> float:
        """Of the learning rate: a linear warm-up, then half a cosine."""
        warm_up = min(self.config.warm_up, self.iterations)
        if iteration < warm_up:
            return (iteration + 1) / warm_up
        return (1 + math.cos(math.pi * (iteration - warm_up) / max(self.iterations - warm_up, 1))) / 2

    def _step(
        self,
        parameterization: Parameterization,
        optimizer: torch.optim.Optimizer,
        targets: Sequence[Targets],
        best: "_BestImages | None",
    ) -> Tensor:
        """One optimizer step; returns the unweighted losses [terms] without synchronizing with the device.

        The images before it are offered to `best`, with the losses of the forward pass that the step needs anyway.
        """
        config = self.config
        images = parameterization.render()
        augmentation = sample_augmentation(
            len(images), self.size, config.flip, config.jitter, config.erase, self.generator
        )
        augmented = augment_images(images, augmentation)
        per_image = self._task_loss(augmented, augment_targets(targets, augmentation, self.size))
        if best is not None:
            best.offer(images.detach(), per_image.detach())
        statistics = self.frozen.statistics_loss.losses(config.loss)
        terms = torch.stack([per_image.mean(), *statistics, total_variation(images, config.loss)])
        factors = [self.weights[name] for name in self.frozen.terms]
        loss = sum(term * factor for term, factor in zip(terms, factors, strict=True) if factor)
        optimizer.zero_grad()
        if isinstance(loss, Tensor):
            # backward() gives gradients the strides of the parameters, which fused Adam needs; autograd.grad does not.
            (loss * len(images)).backward()
            optimizer.step()
            parameterization.project()
        return terms.detach()

    def _task_loss(self, images: Tensor, targets: Sequence[Targets]) -> Tensor:
        """The detector's training loss of each image [B], zero for a source without labels; always runs the detector,
        whose hooks feed the statistics loss."""
        device = self.frozen.device
        labelled = self.config.source == "task" and self.config.weights.task > 0
        with autocast(self.config, self.frozen.device):
            labels = _to_device(targets, device) if labelled else None
            output = self.frozen.detector.head_output(self.frozen.module, images, labels)
        if not labelled:
            return images.new_zeros(len(images))
        return torch.stack([loss.float() for loss in output.losses.values()]).sum(0)

    @torch.no_grad()
    def _offer(self, best: "_BestImages", parameterization: Parameterization, targets: Sequence[Targets]) -> None:
        images = parameterization.render().detach()
        best.offer(images, self._task_loss(images, targets))

    def _updates_at(self, iteration: int) -> bool:
        sampling = self.config.label_sampling
        if self.update is None or iteration % sampling.every:
            return False
        return sampling.start * self.iterations <= iteration <= sampling.stop * self.iterations

    def _updated(self, parameterization: Parameterization, targets: Sequence[Targets]) -> list[Targets]:
        assert self.update is not None
        sampling = self.config.label_sampling
        with autocast(self.config, self.frozen.device):
            found = detections(self.frozen, parameterization.render(), sampling.confidence)
        return [self.update(t, f, self.size, sampling) for t, f in zip(targets, found, strict=True)]

    def _history(self, losses: Sequence[Tensor]) -> list[dict[str, float]]:
        every = max(len(losses) // 50, 1)
        rows = torch.stack(list(losses)).tolist() if losses else []
        if not all(math.isfinite(value) for row in rows for value in row):
            raise UserError("synthesis: a loss became NaN; lower the learning rates or the weights of synthesis")
        return [
            {"size": self.size, "iteration": i} | dict(zip(self.frozen.terms, row, strict=True))
            for i, row in enumerate(rows)
            if i % every == 0 or i + 1 == len(rows)
        ]


class _BestImages:
    """For each image of a batch the candidate with the lowest loss; never synchronizes with the device."""

    def __init__(self, images: Tensor) -> None:
        self.images = images.clone()
        self.reset()

    def reset(self) -> None:
        """The next candidate replaces all images."""
        self.losses = self.images.new_full((len(self.images),), math.inf)

    def offer(self, images: Tensor, losses: Tensor) -> None:
        """Replaces each image whose loss is not above the best; with equal losses (all zero) the last one stays."""
        better = losses <= self.losses
        self.images = torch.where(better.view(-1, 1, 1, 1), images, self.images)
        self.losses = torch.where(better, losses, self.losses)


def autocast(config: SynthesisConfig, device: torch.device) -> torch.autocast:
    """In which the detector runs."""
    enabled = config.autocast and multiplies_bfloat16(device)
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled)


@torch.no_grad()
def detections(frozen: FrozenDetector, images: Tensor, confidence: float) -> list[Detections]:
    """Detections in images [B, 3, S, S] after NMS, on the CPU."""
    found = frozen.detector.detect(frozen.module, images, confidence, NMS_IOU, MAX_DETECTIONS)
    return [
        Detections(f.boxes.cpu(), f.scores.cpu(), f.labels.cpu(), None if f.masks is None else f.masks.cpu())
        for f in found
    ]


def _to_device(targets: Sequence[Targets], device: torch.device) -> list[Targets]:
    """Labels on the device; one copy for all boxes and one for all classes."""
    numbers = [len(t.labels) for t in targets]
    boxes = torch.cat([t.boxes for t in targets]).to(device, non_blocking=True).split(numbers)
    labels = torch.cat([t.labels for t in targets]).to(device, non_blocking=True).split(numbers)
    masks = [None if t.masks is None else t.masks.to(device, non_blocking=True) for t in targets]
    return [Targets(b, n, m) for b, n, m in zip(boxes, labels, masks, strict=True)]
