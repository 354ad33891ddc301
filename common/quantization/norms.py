"""BatchNorm and LayerNorm of a quantized detector.

BatchNorm's relative correction undoes, in its running statistics, what quantization did to a layer's output. After a
LayerNorm the channels' own ranges are folded into the layer that reads it (RepQ-ViT, Li et al. 2023, arXiv 2212.08254,
section 3.3): those that channels would have of their own move into the LayerNorm's affine parameters and, undone, into
the next layer's weight and bias. One scale and zero point then fit all channels.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from common.detection.detector import TransformerDetector
from common.detection.types import NormedLayer, StatisticsLayer
from common.quantization.hooks import Feed, watching
from common.quantization.policy import FLOAT, LayerPlan


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


@torch.no_grad()
def fold_layernorm(
    detector: TransformerDetector, module: nn.Module, plan: Sequence[LayerPlan], batches: Sequence[Feed]
) -> list[NormedLayer]:
    """Changes the parameters of a float `module` in place; its function stays the same. Returns the pairs folded.

    Args:
        detector: says which layers read a LayerNorm.
        module: in eval mode, on the batches' device.
        plan: layers whose input stays in float are left as they are.
        batches: on which the ranges of channels are measured.
    """
    rounded = {entry.name for entry in plan if entry.activation_bits < FLOAT}
    pairs = [pair for pair in detector.normed_layers(module) if pair.layer in rounded]
    lows: dict[str, Tensor] = {}
    highs: dict[str, Tensor] = {}

    def see(name: str, x: Tensor) -> None:
        low, high = x.flatten(0, -2).aminmax(dim=0)
        lows[name] = torch.minimum(lows.get(name, low), low)
        highs[name] = torch.maximum(highs.get(name, high), high)

    with watching(module, [pair.norm for pair in pairs], outputs=see):
        for run in batches:
            run(module)
    for pair in pairs:
        parts = module.get_submodule(pair.norm), module.get_submodule(pair.layer)
        fold(*parts, lows[pair.norm], highs[pair.norm], pair.shift)
    return pairs


@torch.no_grad()
def fold(norm: Any, layer: Any, low: Tensor, high: Tensor, shift: bool) -> None:
    """Makes the channels of the LayerNorm's output equally wide and, with `shift`, equally placed, both in place.

    Args:
        norm: with a weight and a bias [C].
        layer: a Linear or convolution whose weight [out, C, ...] reads it; with a bias where `shift` is given.
        low: smallest output of each channel [C].
        high: largest output of each channel [C].
        shift: whether channels may be moved; not where zeros are added between the two, as padding.
    """
    width = (high - low if shift else torch.maximum(high.abs(), low.abs())).clamp(min=1e-8)
    ratio = width / width.mean()
    if shift:
        place = -low / width  # of zero, from 0 at the lower end to 1 at the upper one
        moved = width * (place - place.mean())
        norm.bias.add_(moved)
        layer.bias.sub_((layer.weight.flatten(2).sum(2) if layer.weight.ndim > 2 else layer.weight) @ moved)
    norm.weight.div_(ratio)
    norm.bias.div_(ratio)
    layer.weight.mul_(ratio.view(-1, *[1] * (layer.weight.ndim - 2)))
