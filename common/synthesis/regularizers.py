"""Regularizers of images: total variation, and patch similarity entropy.

The latter is the loss for transformers, which have no BatchNorm (PSAQ-ViT, arXiv 2203.02250).

Noise has the same similarity between all patches; an image with foreground and background does not. The density of the
similarities is a Gaussian kernel estimate, its differential entropy is maximized.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from common.detection.types import AttentionLayer

# BANDWIDTH, POINTS and DENSITY_EPS are those of the published code.
BANDWIDTH = 0.01  # of the Gaussian kernel
POINTS = 10  # grid of the density estimate, from the smallest similarity to the largest
DENSITY_EPS = 1e-4  # added to the density, so that its logarithm is finite
CHUNK = 2**22  # most similarities in memory at once; the backward pass recomputes them (gradient checkpointing)
PUBLISHED_SHAPE = (32, 3, 640, 640)  # of the batch whose value the published loss weights are for


class PatchSimilarityLoss:
    """Reads the attention output of each block (softmax times values) by hooks. The module's weights are frozen."""

    terms = ("patch_similarity",)

    def __init__(self, module: nn.Module, layers: Sequence[AttentionLayer]) -> None:
        module.eval().requires_grad_(False)
        self.description = f"patch similarity entropy of {len(layers)} blocks (no BatchNorm)"
        self._layers = list(layers)
        self._images = dict.fromkeys(range(len(layers)), 0)
        self._seen: dict[int, Tensor] = {}
        for index, layer in enumerate(layers):
            module.get_submodule(layer.block).register_forward_pre_hook(self._count(index))
            module.get_submodule(layer.projection).register_forward_pre_hook(self._remember(index))

    def _count(self, index: int) -> Any:
        def count(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            self._images[index] = len(inputs[0])

        return count

    def _remember(self, index: int) -> Any:
        def remember(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            self._seen[index] = inputs[0]

        return remember

    def to(self, device: torch.device) -> "PatchSimilarityLoss":
        """Nothing to move; as `BatchNormLoss.to`."""
        return self

    def entropies(self, kind: str) -> Tensor:
        """Patch similarity entropy of each block and image in the last forward pass, [blocks, B].

        normalized: over all patches, grid of each image by itself.
        paper: as the published code, which was written for ViT and DeiT: without the first patch of every window (their
        class token), and with one grid for the whole batch.
        """
        found = []
        for i, layer in enumerate(self._layers):
            heads = self._seen[i].float().unflatten(-1, (layer.heads, -1)).mean(-2)
            patches = heads.unflatten(0, (self._images[i], -1))  # [B, windows, N, d]
            if kind == "paper":
                patches = patches[:, :, 1:]
            found.append(similarity_entropy(patches, shared_grid=kind == "paper"))
        return torch.stack(found)

    def losses(self, kind: str) -> tuple[Tensor, ...]:
        """The negative entropy, mean over images; over blocks the mean (normalized) or the sum (paper); one scalar."""
        blocks = -self.entropies(kind).mean(1)
        return (blocks.mean() if kind == "normalized" else blocks.sum(),)


def similarity_entropy(patches: Tensor, shared_grid: bool) -> Tensor:
    """Differential entropy of the cosine similarities of all pairs of patches in a window, pooled over windows; [B].

    Never synchronizes with the device and holds at most CHUNK similarities at a time.

    Args:
        patches: [B, windows, N, d].
        shared_grid: whether all images use one grid for the density, from the smallest to the largest of all.
    """
    count, _, size, _ = patches.shape
    units = F.normalize(patches, dim=-1).split(max(CHUNK // (count * size * size), 1), 1)
    with torch.no_grad():
        bounds = [_similarities(part).aminmax(dim=1) for part in units]
        low = torch.stack([b.min for b in bounds]).amin(0)
        high = torch.stack([b.max for b in bounds]).amax(0)
        if shared_grid:
            low, high = low.min().expand(count), high.max().expand(count)
        points = low[:, None] + (high - low)[:, None] * torch.linspace(0, 1, POINTS, device=low.device)  # [B, POINTS]
    sums: Any = [
        checkpoint(_kernel_sums, part, points, use_reentrant=False, preserve_rng_state=False) for part in units
    ]
    pairs = patches.shape[1] * size * size
    density = torch.stack(sums).sum(0) / (pairs * math.sqrt(2 * math.pi) * BANDWIDTH) + DENSITY_EPS
    return torch.trapezoid(-density * density.log(), points, dim=1)


def _similarities(units: Tensor) -> Tensor:
    """Cosine similarities of unit vectors [B, windows, N, d], [B, windows * N * N]."""
    return (units @ units.transpose(-1, -2)).flatten(1)


def _kernel_sums(units: Tensor, points: Tensor) -> Tensor:
    """The unnormalized kernel density at each grid point, [B, POINTS]."""
    similarities = _similarities(units)
    scaled = [(similarities - point[:, None]) / BANDWIDTH for point in points.unbind(1)]
    return torch.stack([(-x.square() / 2).exp().sum(1) for x in scaled], 1)


class _TotalVariation(torch.autograd.Function):
    """The normalized one with its gradient, in half the passes over the images that autograd takes."""

    @staticmethod
    def forward(ctx: Any, images: Tensor) -> Tensor:
        total = images.new_zeros(())
        gradient = torch.zeros_like(images) if ctx.needs_input_grad[0] else None
        for axis in (2, 3):
            length = images.shape[axis] - 1
            difference = images.narrow(axis, 1, length) - images.narrow(axis, 0, length)
            total += difference.abs().mean() / 2
            if gradient is not None:
                share = difference.sign_().mul_(0.5 / difference.numel())
                gradient.narrow(axis, 1, length).add_(share)
                gradient.narrow(axis, 0, length).sub_(share)
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (gradient,) = ctx.saved_tensors
        return gradient * gradients[0]


def total_variation(images: Tensor, kind: str) -> Tensor:
    """Total variation of images [B, 3, H, W], a scalar that depends on neither batch size nor, for noise, resolution.

    normalized: the mean absolute difference of neighbouring pixels, horizontal and vertical averaged.
    paper: the sum of the Frobenius norms of the differences along both axes and both diagonals (DeepInversion, arXiv
    1912.08795; arXiv 2507.16782), rescaled to a batch of PUBLISHED_SHAPE.
    """
    if kind == "normalized":
        value: Tensor = _TotalVariation.apply(images)
        return value
    across, down = images[..., 1:] - images[..., :-1], images[..., 1:, :] - images[..., :-1, :]
    falling = images[..., 1:, 1:] - images[..., :-1, :-1]
    rising = images[..., 1:, :-1] - images[..., :-1, 1:]
    differences = (across, down, falling, rising)
    published = math.prod(PUBLISHED_SHAPE)
    return torch.stack([torch.linalg.vector_norm(d) * math.sqrt(published / d.numel()) for d in differences]).sum()
