"""Images out of a detector: an optimisation of the image, with the weights frozen."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from common.config.schema import LabelSamplingConfig, SynthesisConfig
from common.detection.detector import Detector, TransformerDetector
from common.detection.types import Detections, Targets
from common.runtime.errors import UserError
from common.synthesis.augment import change_images, change_targets, draw_change
from common.synthesis.canvas import Canvas, Pixels, Pyramid, noise, resize, soft_noise
from common.synthesis.label_sampling import relabel, take_masks
from common.synthesis.labels import scale_labels
from common.synthesis.patch_similarity import SimilarityPrior
from common.synthesis.priors import StatisticsPrior, total_variation

READ_EVERY = 10  # iterations between two looks at the losses, each of which waits for the device
CANDIDATES = (0.8, 0.9, 1.0)  # of the iterations: where an image may be taken
SNAPSHOTS = (0.0, 0.3, 1.0)  # of the iterations: where the report shows some images
SHOWN = 4  # images of a snapshot
SUPPRESSION_IOU = 0.6  # of the detections that edit labels (arXiv 2507.16782, code)
MAX_DETECTIONS = 300

Progress = Callable[[int, Mapping[str, float]], None]
Edit = Callable[[Targets, Detections, int, LabelSamplingConfig], Targets]


@dataclass(frozen=True)
class Snapshot:
    """The first images of a batch as they looked at one iteration, and the labels they were made for."""

    size: int
    iteration: int
    images: Tensor  # [up to SHOWN, 3, size, size] on the device
    targets: list[Targets]  # in pixels of `images`


@dataclass(frozen=True)
class Made:
    """Finished images of one batch or pass."""

    images: Tensor  # [B, 3, S, S] in [0, 1]
    targets: list[Targets]  # on the CPU, pixels of `images`
    history: list[dict[str, float]]  # of each pass: size, iteration and the unweighted losses, every few iterations
    snapshots: list[Snapshot]


@dataclass(frozen=True)
class FrozenDetector:
    """A detector ready for the optimisation of images: no weight has a gradient, statistics are watched."""

    detector: Detector
    module: nn.Module
    prior: StatisticsPrior | SimilarityPrior
    device: torch.device

    @property
    def terms(self) -> tuple[str, ...]:
        """Names of the loss terms, which are those of their weights."""
        return "task", *self.prior.terms, "total_variation"


def freeze(detector: Detector, device: torch.device) -> FrozenDetector:
    """A frozen copy of the detector on `device`, with BatchNorm folded where statistics are matched.

    Raises:
        UserError: the detector offers nothing that its images could be matched to.
    """
    module = detector.build()
    prior: StatisticsPrior | SimilarityPrior
    if layers := detector.statistics_layers(module):
        prior = StatisticsPrior(module, layers).to(device)
    elif isinstance(detector, TransformerDetector):
        prior = SimilarityPrior(module, detector.attention_layers(module)).to(device)
    else:
        raise UserError("synthesis: this detector has neither BatchNorm nor attention that images could be matched to")
    module = module.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return FrozenDetector(detector, module, prior, device)


def make_images(
    frozen: FrozenDetector,
    config: SynthesisConfig,
    targets: Sequence[Targets],
    generator: torch.Generator,
    progress: Progress,
) -> Made:
    """Optimises one batch: a low-resolution pass that edits the labels, then the pass at full size.

    Masks, where the detector gives them, follow it at both sizes. A pyramid goes on from the low-resolution image;
    pixels begin anew from noise, as published, so that only the labels of the first pass are used. Sources without
    labels (`batch_norm`) edit none, and true labels and their masks stay as they are.

    Args:
        frozen: from `freeze`.
        config: settings of stage one.
        targets: first labels in pixels of `config.image_size`, on the CPU; empty ones where no labels are used.
        generator: the only source of randomness, on the CPU.
        progress: called every few iterations with the iterations done since and the losses.

    Raises:
        UserError: a loss became NaN.
    """
    count, pyramid, size = len(targets), config.image == "pyramid", config.image_size
    edited = config.source == "task" and config.labels != "true_label"
    first = None
    if config.low_resolution_iterations and (pyramid or edited):
        small = config.low_resolution_size
        start = (soft_noise if pyramid else noise)(count, small, generator).to(frozen.device)
        canvas = (Pyramid if pyramid else Pixels)(start)
        rate, steps = config.low_resolution_learning_rate, config.low_resolution_iterations
        loop = Pass(frozen, config, generator, small, steps, rate, relabel if edited else None)
        first = loop.run(canvas, scale_labels(targets, small / size), progress)
        targets = scale_labels(first.targets, size / small)
    if first is not None and pyramid:
        start = resize(first.images, size, size)
    else:
        start = (soft_noise if pyramid else noise)(count, size, generator).to(frozen.device)
    edit = take_masks if edited else None
    loop = Pass(frozen, config, generator, size, config.iterations, config.learning_rate, edit)
    made = loop.run((Pyramid if pyramid else Pixels)(start), targets, progress)
    if first is None:
        return made
    return Made(made.images, made.targets, first.history + made.history, first.snapshots + made.snapshots)


@dataclass(frozen=True)
class Pass:
    """One optimisation at one size."""

    frozen: FrozenDetector
    config: SynthesisConfig
    generator: torch.Generator
    size: int
    iterations: int
    learning_rate: float
    edit: Edit | None  # of the labels, by what the detector finds

    def run(self, canvas: Canvas, targets: Sequence[Targets], progress: Progress) -> Made:
        """Adam with a cosine schedule; each image is taken where its own task loss was lowest."""
        # Gradients of means over many pixels are tiny, so Adam's constant has to be far below them.
        optimizer = torch.optim.Adam(canvas.parameters, lr=self.learning_rate, eps=1e-12, fused=True)
        candidates = {math.ceil(self.iterations * f) for f in CANDIDATES}
        shown = {math.ceil(self.iterations * f) for f in SNAPSHOTS}
        targets, snapshots, seen = list(targets), [], []
        best = _Best(canvas.render().detach())
        for iteration in range(self.iterations):
            if iteration in shown:
                images = canvas.render()[:SHOWN].detach().clone()
                snapshots.append(Snapshot(self.size, iteration, images, targets[:SHOWN]))
            if self._edits_at(iteration):
                edited = self._edited(canvas, targets)
                if any(new is not old for new, old in zip(edited, targets, strict=True)):
                    best.forget()  # those images were chosen for other labels
                targets = edited
            if iteration in candidates:
                self._offer(best, canvas, targets)
            for group in optimizer.param_groups:
                group["lr"] = self.learning_rate * (1 + math.cos(math.pi * iteration / self.iterations)) / 2
            seen.append(self._step(canvas, optimizer, targets))
            if (iteration + 1) % READ_EVERY == 0 or iteration + 1 == self.iterations:
                progress(iteration % READ_EVERY + 1, dict(zip(self.frozen.terms, seen[-1].tolist(), strict=True)))
        if self.iterations:
            self._offer(best, canvas, targets)
        snapshots.append(Snapshot(self.size, self.iterations, best.images[:SHOWN], targets[:SHOWN]))
        return Made(best.images, targets, self._history(seen), snapshots)

    def _step(self, canvas: Canvas, optimizer: torch.optim.Optimizer, targets: Sequence[Targets]) -> Tensor:
        """One step; returns the unweighted losses [terms] without waiting for them."""
        config, weights = self.config, self.config.weights
        images = canvas.render()
        change = draw_change(len(images), self.size, config.flip, config.jitter, config.erase, self.generator)
        per_image = self._task_loss(change_images(images, change), change_targets(targets, change, self.size))
        roughness = total_variation(images, config.loss)
        terms = torch.stack([per_image.mean(), *self.frozen.prior.losses(config.loss), roughness])
        factors = [getattr(weights, name) for name in self.frozen.terms]
        loss = sum(term * factor for term, factor in zip(terms, factors, strict=True) if factor)
        optimizer.zero_grad()
        if isinstance(loss, Tensor):
            # Unlike torch.autograd.grad this gives gradients the parameters' strides, on which fused Adam relies.
            (loss * len(images)).backward()
            optimizer.step()
            canvas.after_step()
        return terms.detach()

    def _task_loss(self, images: Tensor, targets: Sequence[Targets]) -> Tensor:
        """The detector's loss for each image [B]; zero where the source has none. The prior sees the images."""
        device = self.frozen.device
        wanted = self.config.source == "task" and self.config.weights.task > 0
        with torch.autocast(device.type, torch.bfloat16, enabled=self.config.mixed_precision and device.type == "cuda"):
            labels = _on(targets, device) if wanted else None
            output = self.frozen.detector.head_output(self.frozen.module, images, labels)
        if not wanted:
            return images.new_zeros(len(images))
        return torch.stack([loss.float() for loss in output.losses.values()]).sum(0)

    @torch.no_grad()
    def _offer(self, best: "_Best", canvas: Canvas, targets: Sequence[Targets]) -> None:
        images = canvas.render().detach()
        best.offer(images, self._task_loss(images, targets))

    def _edits_at(self, iteration: int) -> bool:
        edits = self.config.label_sampling
        if self.edit is None or iteration % edits.every:
            return False
        return edits.start * self.iterations <= iteration <= edits.stop * self.iterations

    def _edited(self, canvas: Canvas, targets: Sequence[Targets]) -> list[Targets]:
        assert self.edit is not None
        edits = self.config.label_sampling
        found = detections(self.frozen, canvas.render(), edits.confidence)
        return [self.edit(t, f, self.size, edits) for t, f in zip(targets, found, strict=True)]

    def _history(self, seen: Sequence[Tensor]) -> list[dict[str, float]]:
        every = max(len(seen) // 50, 1)
        rows = torch.stack(list(seen)).tolist() if seen else []
        if not all(math.isfinite(value) for row in rows for value in row):
            raise UserError("synthesis: a loss became NaN; lower the learning rates or the weights of synthesis")
        return [
            {"size": self.size, "iteration": i} | dict(zip(self.frozen.terms, row, strict=True))
            for i, row in enumerate(rows)
            if i % every == 0 or i + 1 == len(rows)
        ]


class _Best:
    """For each image of a batch the candidate with the lowest score; no value is read on the host."""

    def __init__(self, images: Tensor) -> None:
        self.images = images.clone()
        self.forget()

    def forget(self) -> None:
        """The next candidate wins whatever its score."""
        self.scores = self.images.new_full((len(self.images),), math.inf)

    def offer(self, images: Tensor, scores: Tensor) -> None:
        """Takes each image whose score is not above the best one; without scores (all zero) that is the last one."""
        better = scores <= self.scores
        self.images = torch.where(better.view(-1, 1, 1, 1), images, self.images)
        self.scores = torch.where(better, scores, self.scores)


@torch.no_grad()
def detections(frozen: FrozenDetector, images: Tensor, confidence: float) -> list[Detections]:
    """What the detector finds in images [B, 3, S, S], on the CPU."""
    found = frozen.detector.detect(frozen.module, images, confidence, SUPPRESSION_IOU, MAX_DETECTIONS)
    return [
        Detections(f.boxes.cpu(), f.scores.cpu(), f.labels.cpu(), None if f.masks is None else f.masks.cpu())
        for f in found
    ]


def _on(targets: Sequence[Targets], device: torch.device) -> list[Targets]:
    """Labels on the device by one copy each of boxes and classes."""
    numbers = [len(t.labels) for t in targets]
    boxes = torch.cat([t.boxes for t in targets]).to(device, non_blocking=True).split(numbers)
    labels = torch.cat([t.labels for t in targets]).to(device, non_blocking=True).split(numbers)
    masks = [None if t.masks is None else t.masks.to(device, non_blocking=True) for t in targets]
    return [Targets(b, n, m) for b, n, m in zip(boxes, labels, masks, strict=True)]
