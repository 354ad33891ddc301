"""How an image is parametrised while it is optimised."""

from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

LEVELS = 5  # of the pyramid: 1, 1/2, 1/4, 1/8, 1/16 of the size
SOFT_CONTRAST = 0.4  # of the noise a pyramid starts from; 1 leaves colours too saturated


class Canvas(Protocol):
    """A batch of images as parameters of an optimiser."""

    parameters: list[Tensor]

    def render(self) -> Tensor:
        """The images [B, 3, S, S] in [0, 1], differentiable."""

    def after_step(self) -> None:
        """What follows a step of the optimiser."""


class Pixels:
    """Every pixel by itself, brought back to [0, 1] after each step (arXiv 2507.16782)."""

    def __init__(self, start: Tensor) -> None:
        self.parameters = [start.contiguous(memory_format=torch.channels_last).requires_grad_()]

    def render(self) -> Tensor:
        return self.parameters[0]

    @torch.no_grad()
    def after_step(self) -> None:
        self.parameters[0].clamp_(0, 1)


class Pyramid:
    """`clamp(start + sum of five resolutions)`: one step moves whole regions, so that tens of iterations are enough."""

    def __init__(self, start: Tensor) -> None:
        self.start = start.contiguous(memory_format=torch.channels_last)
        batch, _, height, width = start.shape
        sizes = [(max(height >> k, 1), max(width >> k, 1)) for k in range(LEVELS)]
        zeros = [start.new_zeros(batch, 3, *size).contiguous(memory_format=torch.channels_last) for size in sizes]
        self.parameters = [z.requires_grad_() for z in zeros]

    def render(self) -> Tensor:
        x = self.parameters[-1]
        for level in reversed(self.parameters[:-1]):
            x = level + resize(x, *level.shape[2:])
        return (self.start + x).clamp(0, 1)

    def after_step(self) -> None:
        pass


def resize(images: Tensor, height: int, width: int) -> Tensor:
    """Bilinear interpolation [B, C, height, width]."""
    return F.interpolate(images, size=(height, width), mode="bilinear", align_corners=False)


def noise(count: int, size: int, generator: torch.Generator) -> Tensor:
    """Uniform noise in [0, 1], [count, 3, size, size], on the CPU."""
    return torch.rand(count, 3, size, size, generator=generator)


def soft_noise(count: int, size: int, generator: torch.Generator) -> Tensor:
    """Weak noise around grey, interpolated from an eighth of the size to [count, 3, size, size]; it has no grain."""
    coarse = 0.5 + SOFT_CONTRAST * (noise(count, max(size // 8, 1), generator) - 0.5)
    return resize(coarse, size, size)
