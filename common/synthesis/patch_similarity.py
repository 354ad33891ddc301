"""What an image should look like to a transformer, which has no BatchNorm: patches that differ from each other.

The entropy of the similarities between patches (PSAQ-ViT: Li et al., arXiv 2203.02250): noise looks alike everywhere,
an image has a foreground and a background. The density of the similarities is estimated with a Gaussian kernel.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from common.detection.types import AttentionLayer

BANDWIDTH = 0.01  # of the kernel; this, POINTS and FLOOR are those of the published code
POINTS = 10  # at which the density is taken, from the smallest similarity to the largest
FLOOR = 1e-4  # added to the density, so that its logarithm is finite
CHUNK = 2**22  # similarities at work at once; the others are computed again in the backward pass


class SimilarityPrior:
    """Watches the values that the attention of each block has gathered. The module's weights are frozen for good."""

    terms = ("patch_similarity",)

    def __init__(self, module: nn.Module, layers: Sequence[AttentionLayer]) -> None:
        module.eval().requires_grad_(False)
        self.description = f"the entropy of the similarities between patches in {len(layers)} blocks: no BatchNorm"
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

    def to(self, device: torch.device) -> "SimilarityPrior":
        """There is nothing to move."""
        return self

    def entropies(self, kind: str) -> Tensor:
        """Of each block and image in the last forward pass, [blocks, B].

        paper: the code's leftovers of plain transformers are kept, which leave out the first patch of every window and
        take the range of the similarities over the whole batch. normalized: all patches, each image by itself.
        """
        found = []
        for i, layer in enumerate(self._layers):
            heads = self._seen[i].float().unflatten(-1, (layer.heads, -1)).mean(-2)
            patches = heads.unflatten(0, (self._images[i], -1))  # [B, windows, N, d]
            if kind == "paper":
                patches = patches[:, :, 1:]
            found.append(similarity_entropy(patches, together=kind == "paper"))
        return torch.stack(found)

    def losses(self, kind: str) -> tuple[Tensor, ...]:
        """Minus the entropies, mean over images; normalized: mean over blocks, paper: sum over blocks; a scalar."""
        blocks = -self.entropies(kind).mean(1)
        return (blocks.mean() if kind == "normalized" else blocks.sum(),)


def similarity_entropy(patches: Tensor, together: bool) -> Tensor:
    """Differential entropy of the cosine similarities of all pairs of patches in a window, pooled over windows; [B].

    Neither waits for the device nor holds more than CHUNK similarities at a time.

    Args:
        patches: [B, windows, N, d].
        together: whether the images share the points at which the density is taken.
    """
    count, _, size, _ = patches.shape
    units = F.normalize(patches, dim=-1).split(max(CHUNK // (count * size * size), 1), 1)
    with torch.no_grad():
        bounds = [_similarities(part).aminmax(dim=1) for part in units]
        low = torch.stack([b.min for b in bounds]).amin(0)
        high = torch.stack([b.max for b in bounds]).amax(0)
        if together:
            low, high = low.min().expand(count), high.max().expand(count)
        points = low[:, None] + (high - low)[:, None] * torch.linspace(0, 1, POINTS, device=low.device)  # [B, POINTS]
    sums: Any = [
        checkpoint(_kernel_sums, part, points, use_reentrant=False, preserve_rng_state=False) for part in units
    ]
    pairs = patches.shape[1] * size * size
    density = torch.stack(sums).sum(0) / (pairs * math.sqrt(2 * math.pi) * BANDWIDTH) + FLOOR
    return torch.trapezoid(-density * density.log(), points, dim=1)


def _similarities(units: Tensor) -> Tensor:
    """[B, windows N N]"""
    return (units @ units.transpose(-1, -2)).flatten(1)


def _kernel_sums(units: Tensor, points: Tensor) -> Tensor:
    """The sum over all similarities of the kernel's exponential at each point, [B, POINTS]."""
    similarities = _similarities(units)
    scaled = [(similarities - point[:, None]) / BANDWIDTH for point in points.unbind(1)]
    return torch.stack([(-x.square() / 2).exp().sum(1) for x in scaled], 1)
