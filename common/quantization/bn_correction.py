"""Relative correction of BatchNorm: what quantization did to a layer's output, undone in its running statistics."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from common.detection.types import StatisticsLayer
from common.quantization.observers import Feed, watching


class _Moments:
    """Mean and variance of the channels of everything that was added; sums are float64."""

    def __init__(self) -> None:
        self.count = 0
        self.total: Tensor | None = None
        self.squares: Tensor | None = None

    def add(self, x: Tensor) -> None:
        """Adds a map [B, C, h, w]."""
        count = x.numel() // x.shape[1]
        # One pass over the map; torch.var_mean takes four to twenty times as long.
        mean, variance = (s.double() for s in torch.ops.aten.batch_norm_update_stats(x, None, None, 0.0))
        total, squares = count * mean, count * (variance + mean.square())
        self.total = total if self.total is None else self.total + total
        self.squares = squares if self.squares is None else self.squares + squares
        self.count += count

    def statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and biased variance, [C] float64."""
        assert self.total is not None
        assert self.squares is not None
        mean = self.total / self.count
        return mean, (self.squares / self.count - mean.square()).clamp(min=0)


@torch.no_grad()
def correct_batch_norm(
    teacher: nn.Module, student: nn.Module, layers: Sequence[StatisticsLayer], batches: Sequence[Feed]
) -> None:
    """Moves the student's running statistics by the difference of its BatchNorm inputs from the teacher's.

    mean = mean_T + (mu_S - mu_T) and var = var_T * var(S) / var(T), where mean_T and var_T are the teacher's running
    statistics and the others are measured on the same images. Unlike measuring them anew, this does not make the
    detector one for the statistics of those images.
    """
    names = [layer.batch_norm for layer in layers]
    references = _statistics_so_far(teacher, names, batches)
    measured = {name: _Moments() for name in names}
    for run, reference in zip(batches, references, strict=True):
        # A layer is corrected before it runs, so that the layers after it see what they will see.
        def correct(name: str, x: Tensor, reference: Any = reference) -> None:
            measured[name].add(x)
            (mean_t, var_t), (mean_s, var_s) = reference[name], measured[name].statistics()
            original: Any = teacher.get_submodule(name)
            corrected: Any = student.get_submodule(name)
            corrected.running_mean.copy_(original.running_mean + (mean_s - mean_t))
            corrected.running_var.copy_(original.running_var * ((var_s + 1e-12) / (var_t + 1e-12)))

        with watching(student, names, inputs=correct):
            run(student)


def _statistics_so_far(
    module: nn.Module, names: Sequence[str], batches: Sequence[Feed]
) -> list[dict[str, tuple[Tensor, Tensor]]]:
    """Mean and variance of each layer's input over the batches up to each one."""
    moments = {name: _Moments() for name in names}
    found = []
    with watching(module, names, inputs=lambda name, x: moments[name].add(x)):
        for run in batches:
            run(module)
            found.append({name: m.statistics() for name, m in moments.items()})
    return found
