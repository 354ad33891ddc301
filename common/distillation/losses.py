"""How far a student is from its teacher: raw predictions and feature maps. All losses are means over images."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from common.types import HeadOutput, HeadTerm


def rows_loss(teacher: HeadOutput, student: HeadOutput) -> Tensor:
    """Difference of the predictions, place by place, the sum over the terms; a scalar.

    Of the Kullback-Leibler divergence for `sigmoid` (K independent Bernoulli variables) and `softmax`, of the smooth
    L1 distance for `offset`, summed over what one row predicts. A row counts by the confidence of the teacher or the
    student, whichever is surer that it shows an object, so that the thousands of empty places do not drown the rest
    and a false alarm is not free. Weighting by the teacher's confidence: Yang et al., arXiv 2205.01529.
    """
    total = torch.zeros((), device=student.maps[0].device)
    for name, term in teacher.terms.items():
        other = student.terms[name]
        weight = torch.maximum(term.confidence, other.confidence.detach()).float()  # [B, N]
        distance = _row_distance(term, other.values.float())
        total = total + ((weight * distance).sum(1) / weight.sum(1).clamp(min=1e-6)).mean()
    return total


def _row_distance(term: HeadTerm, values: Tensor) -> Tensor:
    """[B, N]"""
    reference = term.values.float()
    if term.kind == "sigmoid":
        p = reference.sigmoid()
        cross = F.binary_cross_entropy_with_logits(values, p, reduction="none")
        entropy = F.binary_cross_entropy_with_logits(reference, p, reduction="none")
        distance = cross - entropy
    elif term.kind == "softmax":
        distance = F.kl_div(values.log_softmax(-1), reference.log_softmax(-1), reduction="none", log_target=True)
    else:
        distance = F.smooth_l1_loss(values, reference, reduction="none")
    return distance.flatten(2).sum(2)


def flat_kl_loss(teacher: Sequence[Tensor], student: Sequence[Tensor], temperature: float) -> Tensor:
    """The published logit distillation: one softmax over a whole raw map [B, C, h, w], summed over the maps; a scalar.

    tau^2 KL(softmax(T / tau) || softmax(S / tau)) (Hinton et al., arXiv 1503.02531, on maps flattened to [B, C h w]).
    """
    total = torch.zeros((), device=student[0].device)
    for t, s in zip(teacher, student, strict=True):
        t_log, s_log = (x.float().flatten(1).div(temperature).log_softmax(1) for x in (t, s))
        total = total + temperature**2 * F.kl_div(s_log, t_log, reduction="batchmean", log_target=True)
    return total


def relative_loss(teacher: Mapping[str, Tensor], student: Mapping[str, Tensor]) -> Tensor:
    """Squared error of each map [B, ...] over its squared teacher, for each image, a mean over images and maps."""
    parts = []
    for name, reference in teacher.items():
        power = reference.square().flatten(1).sum(1).clamp(min=1e-6)
        parts.append(((student[name] - reference).square().flatten(1).sum(1) / power).mean())
    return torch.stack(parts).mean()


def mse_loss(teacher: Mapping[str, Tensor], student: Mapping[str, Tensor]) -> Tensor:
    """The published feature distillation: mean squared error of each map, a mean over the maps; a scalar."""
    return torch.stack([F.mse_loss(student[name], reference) for name, reference in teacher.items()]).mean()
