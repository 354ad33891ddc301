"""How far a student's feature maps are from its teacher's, as means over images."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def flat_kl_loss(teacher: Sequence[Tensor], student: Sequence[Tensor], temperature: float) -> Tensor:
    """The published logit distillation: one softmax over a whole raw map [B, C, h, w], summed over the maps; a scalar.

    tau^2 KL(softmax(T / tau) || softmax(S / tau)) (Hinton et al., arXiv 1503.02531, on maps flattened to [B, C h w]).
    """
    total = torch.zeros((), device=student[0].device)
    for t, s in zip(teacher, student, strict=True):
        t_log, s_log = (x.float().flatten(1).div(temperature).log_softmax(1) for x in (t, s))
        total = total + temperature**2 * F.kl_div(s_log, t_log, reduction="batchmean", log_target=True)
    return total


def joint_kl_loss(teacher: Sequence[Tensor], student: Sequence[Tensor], temperature: float) -> Tensor:
    """As `flat_kl_loss`, with one softmax over all raw maps of an image together, as published for transformers."""
    together = [[torch.cat([m.flatten(1) for m in maps], 1)] for maps in (teacher, student)]
    return flat_kl_loss(together[0], together[1], temperature)


def relative_loss(teacher: Mapping[str, Tensor], student: Mapping[str, Tensor]) -> Tensor:
    """Squared error of each map [B, ...] over its squared teacher, for each image, a mean over images and maps."""
    parts = []
    for name, reference in teacher.items():
        power = reference.square().flatten(1).sum(1).clamp(min=1e-6)
        parts.append(((student[name] - reference).square().flatten(1).sum(1) / power).mean())
    return torch.stack(parts).mean()


def mse_loss(teacher: Mapping[str, Tensor], student: Mapping[str, Tensor]) -> Tensor:
    """The published feature distillation: mean squared error of each map, a mean over the maps; a scalar.

    Maps of other regions than the teacher's, which have another shape, are left out, as published.
    """
    pairs = [(student[name], reference) for name, reference in teacher.items()]
    return torch.stack([F.mse_loss(own, other) for own, other in pairs if own.shape == other.shape]).mean()
