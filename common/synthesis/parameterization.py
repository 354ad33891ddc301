"""Differentiable image parameterizations: what the optimizer updates, and how it becomes an image."""

from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # mean and standard deviation, of torchvision and mmdet
LEVELS = 5  # of the pyramid: 1, 1/2, 1/4, 1/8, 1/16 of the resolution
SMOOTH_CONTRAST = 0.4  # amplitude of `smooth_noise`; full contrast ends in oversaturated colours


class Parameterization(Protocol):
    """A batch of images as the parameters of an optimizer."""

    parameters: list[Tensor]

    def render(self) -> Tensor:
        """The images [B, 3, S, S], in [0, 1] where they are clipped, differentiable with respect to `parameters`."""

    def project(self) -> None:
        """Called after each optimizer step: projects the parameters back onto the valid range, in place."""


class Pixels:
    """One parameter per pixel, clipped to [0, 1] after each step unless `clip` is False (arXiv 2507.16782)."""

    def __init__(self, start: Tensor, clip: bool = True) -> None:
        self.clip = clip
        self.parameters = [start.contiguous(memory_format=torch.channels_last).requires_grad_()]

    def render(self) -> Tensor:
        return self.parameters[0]

    @torch.no_grad()
    def project(self) -> None:
        if self.clip:
            self.parameters[0].clamp_(0, 1)


class Pyramid:
    """Laplacian-pyramid parameterization: `clamp(start + sum of upsampled levels, 0, 1)`, five resolutions.

    As in feature visualization (Olah et al. 2017, doi 10.23915/distill.00007). Coarse levels move whole regions in one
    step, so that tens of iterations are enough instead of thousands.
    """

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

    def project(self) -> None:
        pass


def resize(images: Tensor, height: int, width: int) -> Tensor:
    """Images [B, C, height, width], bilinear."""
    return F.interpolate(images, size=(height, width), mode="bilinear", align_corners=False)


def noise(count: int, size: int, generator: torch.Generator, kind: str = "uniform") -> Tensor:
    """Noise [count, 3, size, size] on the CPU: uniform in [0, 1], or normal, or with `imagenet` normal with the
    mean and standard deviation of each channel there."""
    if kind == "uniform":
        return torch.rand(count, 3, size, size, generator=generator)
    drawn = torch.randn(count, 3, size, size, generator=generator)
    if kind == "normal":
        return drawn
    mean, deviation = (torch.tensor(values).view(3, 1, 1) for values in IMAGENET)
    return mean + deviation * drawn


def smooth_noise(count: int, size: int, generator: torch.Generator) -> Tensor:
    """Low-contrast, low-frequency noise around grey: drawn at size/8 and upsampled to [count, 3, size, size]."""
    coarse = 0.5 + SMOOTH_CONTRAST * (noise(count, max(size // 8, 1), generator) - 0.5)
    return resize(coarse, size, size)
