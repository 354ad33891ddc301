"""Distance between the raw predictions of teacher and student, before NMS, and its curvature."""

import torch
from torch import Tensor
from torch.nn import functional as F

from common.detection.types import HeadOutput, HeadTerm


def prediction_distance(teacher: HeadOutput, student: HeadOutput) -> Tensor:
    """Confidence-weighted distance of the predictions, summed over the terms, mean over images; a scalar.

    Per row: KL divergence for `sigmoid` (K independent Bernoulli variables) and `softmax`, smooth L1 for `offset`.
    Rows are weighted by the confidence of teacher or student, whichever is higher: background rows, the vast majority,
    do not dominate, and false positives of the student count. After the teacher-confidence weighting of PGD (Yang et
    al., arXiv 2205.01529).
    """
    total = torch.zeros((), device=student.maps[0].device)
    for name, term in teacher.terms.items():
        other = student.terms[name]
        weight = torch.maximum(term.confidence, other.confidence.detach()).float()  # [B, N]
        distance = _row_distance(term, other.values.float())
        total = total + ((weight * distance).sum(1) / weight.sum(1).clamp(min=1e-6)).mean()
    return total


def _row_distance(term: HeadTerm, values: Tensor) -> Tensor:
    """The distance of each row, [B, N]."""
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


def random_predictions(teacher: HeadOutput, generator: torch.Generator) -> Tensor:
    """A random sum of the predictions whose gradients g have E[g g^T] = H; a scalar.

    H is the second derivative of `prediction_distance`, summed over the images, by the student's predictions where
    they are the teacher's: a change d costs d H d / 2. Signs are drawn at random for every value.
    """
    total = torch.zeros((), device=teacher.maps[0].device)
    for term in teacher.terms.values():
        values, weight = term.values.float(), term.confidence.float()
        root = (weight / weight.sum(1, keepdim=True).clamp(min=1e-6)).sqrt()
        signs = torch.randint(0, 2, values.shape, generator=generator).to(values).mul_(2).sub_(1)
        if term.kind == "sigmoid":
            p = values.detach().sigmoid()
            signs *= (p * (1 - p)).sqrt()
        elif term.kind == "softmax":
            p = values.detach().softmax(-1)
            signs *= p.sqrt()
            signs -= p * signs.sum(-1, keepdim=True)
        total = total + (root.view(*root.shape, *[1] * (values.ndim - 2)) * signs * values).sum()
    return total
