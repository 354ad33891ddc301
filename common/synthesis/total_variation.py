"""Total variation, the smoothness regularizer."""

import math

import torch
from torch import Tensor

PUBLISHED_SHAPE = (32, 3, 640, 640)  # of the batch whose value the published loss weights are for


def total_variation(images: Tensor, kind: str) -> Tensor:
    """Total variation of images [B, 3, H, W], a scalar that depends on neither batch size nor, for noise, resolution.

    normalized: the mean absolute difference of neighbouring pixels, horizontal and vertical averaged.
    paper: the sum of the Frobenius norms of the differences along both axes and both diagonals (DeepInversion, arXiv
    1912.08795; arXiv 2507.16782), rescaled to a batch of PUBLISHED_SHAPE.
    """
    across, down = images[..., 1:] - images[..., :-1], images[..., 1:, :] - images[..., :-1, :]
    if kind == "normalized":
        return (across.abs().mean() + down.abs().mean()) / 2
    falling = images[..., 1:, 1:] - images[..., :-1, :-1]
    rising = images[..., 1:, :-1] - images[..., :-1, 1:]
    differences = (across, down, falling, rising)
    published = math.prod(PUBLISHED_SHAPE)
    return torch.stack([torch.linalg.vector_norm(d) * math.sqrt(published / d.numel()) for d in differences]).sum()
