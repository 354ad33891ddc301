"""Relative correction of BatchNorm: what quantization did to a layer's output, undone in its running statistics."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from common.quantization.observe import watching
from common.types import StatisticsLayer

PASSES = 2  # the first one corrects each layer while those before it are still being corrected


class _Moments:
    """Mean and variance of the channels of everything that was added."""

    def __init__(self) -> None:
        self.count, self.total, self.squares = 0, torch.zeros(1), torch.zeros(1)

    def add(self, x: Tensor) -> None:
        """Adds a map [B, C, h, w]; sums are kept in float64."""
        count = x.numel() // x.shape[1]
        variance, mean = torch.var_mean(x, (0, 2, 3), correction=0)
        mean, variance = mean.double(), variance.double()
        self.total = self.total.to(x.device) + count * mean
        self.squares = self.squares.to(x.device) + count * (variance + mean.square())
        self.count += count

    def statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and biased variance, [C] float64."""
        mean = self.total / self.count
        return mean, (self.squares / self.count - mean.square()).clamp(min=0)


@torch.no_grad()
def correct_batch_norm(
    teacher: nn.Module, student: nn.Module, layers: Sequence[StatisticsLayer], batches: Sequence[Tensor]
) -> None:
    """Moves the student's running statistics by the difference of its BatchNorm inputs from the teacher's.

    mean = mean_T + (mu_S - mu_T) and var = var_T * var(S) / var(T), where mean_T and var_T are the teacher's running
    statistics and the others are measured on the same images. Unlike measuring them anew, this does not make the
    detector one for the statistics of those images.
    """
    names = [layer.batch_norm for layer in layers]
    for _ in range(PASSES):
        reference = {name: _Moments() for name in names}
        measured = {name: _Moments() for name in names}

        def observe(name: str, x: Tensor, reference: Any = reference) -> None:
            reference[name].add(x)

        # Each layer is corrected before it runs, so that the layers after it see what they will see.
        def update(name: str, x: Tensor, reference: Any = reference, measured: Any = measured) -> None:
            measured[name].add(x)
            (mean_t, var_t), (mean_s, var_s) = reference[name].statistics(), measured[name].statistics()
            original: Any = teacher.get_submodule(name)
            corrected: Any = student.get_submodule(name)
            corrected.running_mean.copy_(original.running_mean + (mean_s - mean_t))
            corrected.running_var.copy_(original.running_var * ((var_s + 1e-12) / (var_t + 1e-12)))

        for images in batches:
            with watching(teacher, names, inputs=observe):
                teacher(images)
            with watching(student, names, inputs=update):
                student(images)
