"""How far the raw predictions of one module are from those of another of the same detector."""

import torch
from torch import Tensor
from torch.nn import functional as F

from common.detection.types import HeadOutput, HeadTerm


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
