"""Folds the channels' own ranges after a LayerNorm into the layer that reads it (RepQ-ViT, Li et al. 2023).

One scale and zero point then fit all channels: those that channels would have of their own move into the LayerNorm's
affine parameters and, undone, into the next layer's weight and bias (arXiv 2212.08254, section 3.3).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from common.detection.detector import TransformerDetector
from common.detection.types import NormedLayer
from common.quantization.observers import Feed, watching
from common.quantization.policy import FLOAT, LayerPlan


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
