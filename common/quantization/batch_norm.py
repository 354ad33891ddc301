"""Relative correction of BatchNorm: what quantization did to a layer's output, undone in its running statistics."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from common.quantization.observe import watching
from common.types import StatisticsLayer

PASSES = 2  # in the first one, the layers before a layer know only the batches so far


class _Moments:
    """Mean and variance of the channels of one map for each batch; a later map of the same batch replaces it."""

    def __init__(self) -> None:
        self.parts: dict[int, Tensor] = {}

    def put(self, batch: int, x: Tensor) -> None:
        """Takes in a map [B, C, h, w]; sums are float64."""
        count = x.numel() // x.shape[1]
        # One pass over the map; torch.var_mean takes four to twenty times as long.
        mean, variance = (s.double() for s in torch.ops.aten.batch_norm_update_stats(x, None, None, 0.0))
        self.parts[batch] = torch.stack([torch.ones_like(mean), mean, variance + mean.square()]) * count

    def statistics(self, batches: Iterable[int]) -> tuple[Tensor, Tensor]:
        """Mean and biased variance over some of the batches, [C] float64."""
        count, total, squares = torch.stack([self.parts[batch] for batch in batches]).sum(0)
        mean = total / count
        return mean, (squares / count - mean.square()).clamp(min=0)


@torch.no_grad()
def correct_batch_norm(
    teacher: nn.Module, student: nn.Module, layers: Sequence[StatisticsLayer], batches: Sequence[Tensor]
) -> None:
    """Moves the student's running statistics by what sets its BatchNorm inputs apart from the teacher's.

    var = var_T * a^2 and mean = mean_T + (mu_S - mu_T) + (a - 1) * (mean_T - mu_T), a the ratio of the standard
    deviations of student and teacher, where mean_T and var_T are the teacher's running statistics and the others are
    measured on the same images. Each layer's output then has the teacher's mean and variance on them, and unlike
    measuring the statistics anew, this does not make the detector one for the statistics of those images.
    """
    names = [layer.batch_norm for layer in layers]
    reference = {name: _Moments() for name in names}
    measured = {name: _Moments() for name in names}
    for batch, images in enumerate(batches):

        def observe(name: str, x: Tensor, batch: int = batch) -> None:
            reference[name].put(batch, x)

        with watching(teacher, names, inputs=observe):
            teacher(images)
    for _ in range(PASSES):
        for batch, images in enumerate(batches):
            # A layer is corrected before it runs, so that the layers after it see what they will see.
            def correct(name: str, x: Tensor, batch: int = batch) -> None:
                measured[name].put(batch, x)
                _correct(teacher.get_submodule(name), student.get_submodule(name), reference[name], measured[name])

            with watching(student, names, inputs=correct):
                student(images)


def _correct(original: Any, corrected: Any, reference: _Moments, measured: _Moments) -> None:
    (mean_t, var_t), (mean_s, var_s) = (m.statistics(measured.parts) for m in (reference, measured))
    ratio = (var_s + 1e-12) / (var_t + 1e-12)
    # Written so that a student that is the teacher keeps every bit.
    shift = mean_s - mean_t + (ratio.sqrt() - 1) * (original.running_mean - mean_t)
    corrected.running_mean.copy_(original.running_mean + shift)
    corrected.running_var.copy_(original.running_var * ratio)
